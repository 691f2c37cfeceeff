"""Deploy a finished model to a SageMaker endpoint, and delete it again.

The endpoint runs AWS' LMI container (DJL Serving with vLLM), which reads the model from S3. It costs money from its creation until it is
deleted, whether it is used or not.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from azrecipe import hardware
from azrecipe.errors import CommandError, Interrupted
from azrecipe.runs.finished_model import FinishedModel, resolve_model
from azrecipe.sagemaker import account as accounts
from azrecipe.sagemaker.account import Account, translate_aws_errors
from azrecipe.sagemaker.s3 import Bucket
from azrecipe.sagemaker.settings import SageMakerSettings, load_settings
from azrecipe.utils.atomic_files import hash_file
from azrecipe.utils.console import print_progress

LMI_VERSION = "0.38.0"
ENDPOINT_NAME = re.compile(r"[a-zA-Z0-9](-?[a-zA-Z0-9])*")
MAX_NAME_LENGTH = 63
SERVED_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model")
VARIANT = "model"
REQUESTS = ("CreateModel", "CreateEndpointConfig", "CreateEndpoint")


@dataclass(frozen=True)
class DeployOptions:
    """Options of a deployment.

    Attributes:
        instance_type: The endpoint's machine.
        instance_count: How many of them.
        name: Of the endpoint; None for one from the run's name.
        image: The container's URI; None for AWS' LMI image of the region.
        region: The AWS region; None for the settings' or the profile's.
    """

    instance_type: str = "ml.g5.2xlarge"
    instance_count: int = 1
    name: str | None = None
    image: str | None = None
    region: str | None = None


@dataclass(frozen=True)
class Deployment:
    """An endpoint to create: its requests in order, and the files it reads."""

    name: str
    region: str
    requests: Mapping[str, dict[str, Any]]
    uploads: Mapping[str, Path]
    cost: str
    authenticated: bool

    @property
    def delete_command(self) -> str:
        """The command that deletes the endpoint."""
        return f"azrecipe sagemaker delete-endpoint {self.name} --region {self.region}"


def build_deployment(run: str, config: str, options: DeployOptions, dry_run: bool = True) -> Deployment:
    """Build what `deploy` would send, and send nothing.

    Args:
        run: A finished run or a folder with a model.
        config: The settings file, for role, bucket, prefix, region, key and tags.
        options: Machine, name and image.
        dry_run: Whether missing credentials are replaced by placeholders.

    Raises:
        CommandError: The run has no model, or an option is wrong.
        CannotRun: AWS refuses.
    """
    accounts.check_packages_installed()
    model = resolve_model(run)
    name = options.name or _name_endpoint(model)
    problems = _list_problems(model, name, options)
    if problems:
        raise CommandError("\n".join(problems))
    settings = load_settings(config, **({"region": options.region} if options.region else {}))
    account = accounts.open_account(settings.region, dry_run=dry_run)
    settings = accounts.resolve_settings(settings, account)
    files = {file.name: file for pattern in SERVED_FILES for file in sorted(Path(model.path).glob(pattern))}
    folder = f"models/{_hash_files(files)}"
    root = f"s3://{settings.bucket}/{settings.prefix}/{folder}/"
    return Deployment(
        name=name,
        region=account.region,
        requests=_build_requests(name, root, settings, account.region, options),
        uploads={f"{folder}/{file}": path for file, path in files.items()},
        cost=_format_cost(options, settings, account.region),
        authenticated=account.authenticated,
    )


def deploy(run: str, config: str, options: DeployOptions, ask: Callable[[str], bool]) -> Deployment:
    """Upload a model and create its endpoint.

    Args:
        run: A finished run or a folder with a model.
        config: The settings file.
        options: Machine, name and image.
        ask: Confirms the price.

    Raises:
        Interrupted: `ask` declines; nothing was sent.
        CommandError, CannotRun: As `build_deployment`; what was created before a failure is deleted.
    """
    deployment = build_deployment(run, config, options, dry_run=False)
    print_progress(f"{deployment.name}: {deployment.cost}")
    if not ask(f"Create the endpoint {deployment.name}? It costs money until it is deleted."):
        raise Interrupted("nothing was deployed", 130)
    settings = load_settings(config, region=deployment.region)
    account = accounts.open_account(deployment.region)
    settings = accounts.resolve_settings(settings, account)
    _upload(Bucket(account, settings.bucket, settings.prefix, settings.kms_key_id), deployment)
    client: Any = account.session.client("sagemaker", region_name=account.region)
    try:
        for action, send in zip(REQUESTS, (client.create_model, client.create_endpoint_config, client.create_endpoint), strict=True):
            with translate_aws_errors(f"sagemaker:{action} {deployment.name}"):
                send(**deployment.requests[action])
    except BaseException:
        delete_endpoint(deployment.name, deployment.region, account)
        raise
    print_progress(f"{deployment.name} is being created; it is ready when its status is InService, and costs money until you run")
    print_progress(f"  {deployment.delete_command}")
    return deployment


def delete_endpoint(name: str, region: str | None = None, account: Account | None = None) -> list[str]:
    """Delete an endpoint, its configuration and its model; the files in S3 stay.

    Returns:
        What was there and is deleted.
    """
    from botocore.exceptions import ClientError

    account = account or accounts.open_account(region)
    client: Any = account.session.client("sagemaker", region_name=account.region)
    deletions: dict[str, Callable[[], Any]] = {
        "endpoint": lambda: client.delete_endpoint(EndpointName=name),
        "endpoint configuration": lambda: client.delete_endpoint_config(EndpointConfigName=name),
        "model": lambda: client.delete_model(ModelName=name),
    }
    deleted = []
    for kind, delete in deletions.items():
        with translate_aws_errors(f"sagemaker:Delete {kind} {name}"):
            try:
                delete()
                deleted.append(kind)
            except ClientError as error:
                message = error.response["Error"]["Message"].lower()
                if error.response["Error"]["Code"] not in ("ValidationException", "404") or not re.search(
                    "could not find|not exist", message
                ):
                    raise
    return deleted


def _name_endpoint(model: FinishedModel) -> str:
    plain = re.sub(r"[^a-zA-Z0-9]+", "-", model.name).strip("-")
    return f"azrecipe-{plain}"[: MAX_NAME_LENGTH - 11].rstrip("-") + time.strftime("-%m%d-%H%M%S")[:11].rstrip("-")


def _list_problems(model: FinishedModel, name: str, options: DeployOptions) -> list[str]:
    problems = []
    if not model.is_local:
        problems.append(f"{model.path} is no run and no folder with a model: only what is on this machine is deployed")
    if not ENDPOINT_NAME.fullmatch(name) or len(name) > MAX_NAME_LENGTH:
        problems.append(f"--name: {name} is no name of an endpoint: letters, digits and single '-' between them, at most {MAX_NAME_LENGTH}")
    if not re.fullmatch(r"ml\.[a-z0-9-]+\.[a-z0-9]+", options.instance_type):
        problems.append(f"--instance-type: {options.instance_type} is no instance type: ml.g5.2xlarge is one")
    if options.instance_count < 1:
        problems.append(f"--instance-count: {options.instance_count}; at least 1")
    return problems


def _hash_files(files: Mapping[str, Path]) -> str:
    digests = "".join(f"{name} {hash_file(file)}\n" for name, file in sorted(files.items()))
    return hashlib.sha256(digests.encode()).hexdigest()[:16]


def _build_requests(name: str, root: str, settings: SageMakerSettings, region: str, options: DeployOptions) -> dict[str, dict[str, Any]]:
    tags = [{"Key": key, "Value": value} for key, value in {**settings.tags, "azrecipe:endpoint": name}.items()]
    source = {"S3Uri": root, "S3DataType": "S3Prefix", "CompressionType": "None"}
    container = {
        "Image": options.image or _find_image(region, options.instance_type),
        "ModelDataSource": {"S3DataSource": source},
        "Environment": {"HF_MODEL_ID": "/opt/ml/model"},
    }
    variant = {
        "VariantName": VARIANT,
        "ModelName": name,
        "InstanceType": options.instance_type,
        "InitialInstanceCount": options.instance_count,
        "ContainerStartupHealthCheckTimeoutInSeconds": 1800,
    }
    model: dict[str, Any] = {"ModelName": name, "ExecutionRoleArn": settings.role, "PrimaryContainer": container, "Tags": tags}
    if settings.subnets:
        model["VpcConfig"] = {"Subnets": settings.subnets, "SecurityGroupIds": settings.security_group_ids}
    configuration: dict[str, Any] = {"EndpointConfigName": name, "ProductionVariants": [variant], "Tags": tags}
    return {
        "CreateModel": model,
        "CreateEndpointConfig": configuration,
        "CreateEndpoint": {"EndpointName": name, "EndpointConfigName": name, "Tags": tags},
    }


def _find_image(region: str, instance_type: str) -> str:
    from sagemaker.core import image_uris

    try:
        uri: str = image_uris.retrieve("djl-lmi", region=region, version=LMI_VERSION, instance_type=instance_type)
    except ValueError as error:
        raise CommandError(f"the container of the endpoint: {' '.join(str(error).split())}. Or name one: --image") from None
    return uri


def _format_cost(options: DeployOptions, settings: SageMakerSettings, region: str) -> str:
    """Format the price of an hour, as the hardware catalog lists it."""
    price = hardware.load_catalog().sagemaker_prices.get(options.instance_type.removeprefix("ml."))
    machines = f"{options.instance_count} x {options.instance_type} in {region}"
    if price is None:
        return f"{machines}; no price is known"
    rate = price.usd_per_hour * options.instance_count
    return f"{machines}: about {rate:,.2f} USD an hour, {rate * 24:,.0f} a day ({price.region or 'your price'}, {price.as_of}, price of training)"


def _upload(bucket: Bucket, deployment: Deployment) -> None:
    folder = next(iter(deployment.uploads)).rpartition("/")[0] + "/"
    sizes = bucket.list_sizes(folder)
    missing = {key: file for key, file in deployment.uploads.items() if sizes.get(file.name) != file.stat().st_size}
    for key, file in missing.items():
        with translate_aws_errors(f"s3:PutObject {bucket.uri(key)}"):
            extra = {"ExpectedBucketOwner": bucket.owner_id, **bucket.encryption_arguments}
            bucket.client.upload_file(str(file), bucket.name, f"{bucket.prefix}/{key}", ExtraArgs=extra)
    print_progress(f"{len(missing)} of {len(deployment.uploads)} files uploaded to {bucket.uri(folder)}")
