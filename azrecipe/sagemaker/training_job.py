"""Requests for training jobs, built by SageMaker's SDK (ModelTrainer)."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from azrecipe import hardware
from azrecipe.errors import CannotRun, CommandError
from azrecipe.sagemaker import cloudwatch_metrics
from azrecipe.sagemaker.account import Account, translate_aws_errors
from azrecipe.sagemaker.bundle import ENTRY_POINT, INPUT_DATA_DIR, Bundle
from azrecipe.sagemaker.settings import SageMakerSettings

CREATE_EVENT = "provide-client-params.sagemaker.CreateTrainingJob"


@dataclass(frozen=True)
class JobSpec:
    """What a job is created from.

    Attributes:
        settings: The settings, with the role's ARN and the bucket's name.
        bundle: The job's files.
        manifest_uris: URIs of the manifests of its input runs, by channel.
    """

    settings: SageMakerSettings
    bundle: Bundle
    manifest_uris: Mapping[str, str]

    @property
    def root_uri(self) -> str:
        """The URI of the prefix in the bucket."""
        return f"s3://{self.settings.bucket}/{self.settings.prefix}"

    @property
    def run_uri(self) -> str:
        """The URI of the run directory, shared by its jobs."""
        return f"{self.root_uri}/runs/{self.bundle.run_path}/"  # without the slash it would match other runs too

    @property
    def code_uri(self) -> str:
        return f"{self.root_uri}/{self.bundle.archive_key}"

    @property
    def base_job_name(self) -> str:
        """The start of the job's name; the SDK adds a time.

        SageMaker allows letters, digits and hyphens, 63 in all.
        """
        name = re.sub(r"[^A-Za-z0-9]+", "-", f"azrecipe-{self.bundle.run_path}").strip("-")
        return name[:46].rstrip("-")


class _DryRunRequest(Exception):
    """Carries a request out of the SDK before it is sent."""

    def __init__(self, request: dict[str, Any]) -> None:
        super().__init__("dry run")
        self.request = request


def dry_run_request(spec: JobSpec, account: Account) -> dict[str, Any]:
    """Build a job's request with the SDK, and send nothing."""

    def stop(params: dict[str, Any], **_: Any) -> None:
        raise _DryRunRequest(dict(params))

    events = account.session.events
    events.register(CREATE_EVENT, stop)
    events.register("before-send.s3", _empty_s3_response)
    try:
        with _unchecked_role():
            _train(spec, account)
    except _DryRunRequest as dry_run:
        return dry_run.request
    finally:
        events.unregister(CREATE_EVENT, stop)
        events.unregister("before-send.s3", _empty_s3_response)
    raise CannotRun("the SDK made no request; it must be sagemaker 3: pip install -U 'azrecipe[sagemaker]'")


def send_job(spec: JobSpec, account: Account) -> dict[str, Any]:
    """Create the job.

    Returns:
        The request that was sent; its TrainingJobName is the job's name.

    Raises:
        CannotRun, CommandError: AWS or the SDK refuses the job.
    """
    request: dict[str, Any] = {}

    def record(params: dict[str, Any], **_: Any) -> None:
        request.update(params)

    account.session.events.register(CREATE_EVENT, record)
    try:
        with _unchecked_role(), translate_aws_errors("sagemaker:CreateTrainingJob"):
            _train(spec, account)
    finally:
        account.session.events.unregister(CREATE_EVENT, record)
    return request


def _empty_s3_response(request: Any, **_: Any) -> Any:
    """Answer an upload of the SDK in a dry run."""
    from botocore.awsrequest import AWSResponse

    class Empty:
        def stream(self, *_: Any, **__: Any) -> Iterator[bytes]:
            return iter(())

    return AWSResponse(request.url, 200, {"ETag": '"0"'}, Empty())


@contextlib.contextmanager
def _unchecked_role() -> Iterator[None]:
    """Turn off the SDK's check of the role (iam_role_resolver.py).

    It requires rights to EC2 and all buckets, which these jobs do not need.
    """
    before = os.environ.get("SAGEMAKER_VALIDATE_ROLE")
    os.environ["SAGEMAKER_VALIDATE_ROLE"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["SAGEMAKER_VALIDATE_ROLE"]
        else:
            os.environ["SAGEMAKER_VALIDATE_ROLE"] = before


def _train(spec: JobSpec, account: Account) -> None:
    """Let the SDK upload its drivers and create the job."""
    logging.getLogger("sagemaker").setLevel(logging.WARNING)
    from sagemaker.train import ModelTrainer
    from sagemaker.train.configs import Tag

    settings = spec.settings
    try:
        trainer = ModelTrainer(
            sagemaker_session=_open_session(settings, account),
            role=settings.role,
            training_image=_find_image(settings, account.region),
            base_job_name=spec.base_job_name,
            environment=_build_environment(spec, account.region),
            tags=[
                Tag(key=key, value=value)
                for key, value in {**settings.tags, "azrecipe:run": re.sub(r"[^\w .:/=+@-]", "_", spec.bundle.run_path)}.items()
            ],
            **_build_configs(spec),
        )
        _configure_trainer(trainer, spec)
        trainer.train(input_data_config=_build_inputs(spec), wait=False, logs=False)
    except ValueError as error:  # the SDK's own checks, pydantic's among them
        raise CommandError(f"SageMaker's SDK refuses the settings: {' '.join(str(error).split())}") from None


def _open_session(settings: SageMakerSettings, account: Account) -> Any:
    """Open the SDK's session, without telemetry.

    Its bucket is checked already. The SDK itself would list all buckets and create a missing one.
    """
    from sagemaker.core.helper.session_helper import Session

    class FixedBucketSession(Session):  # type: ignore[misc]
        def default_bucket(self) -> str:
            return settings.bucket

    config = {"SchemaVersion": "1.0", "SageMaker": {"PythonSDK": {"Modules": {"TelemetryOptOut": True}}}}
    return FixedBucketSession(
        account.session, sagemaker_config=config, default_bucket=settings.bucket, default_bucket_prefix=f"{settings.prefix}/jobs"
    )


def _find_image(settings: SageMakerSettings, region: str) -> str:
    """Return the container's URI.

    For torch 2.9 it is AWS' Hugging Face image; that is for GPUs only, and the PyTorch image of the same version is for CPUs.
    """
    if settings.training_image is not None:
        return settings.training_image
    from sagemaker.core import image_uris

    arguments: dict[str, Any] = {"region": region, "instance_type": settings.instance_type, "image_scope": "training"}
    if settings.pytorch_version == "2.9":
        huggingface = {"framework": "huggingface", "version": "5.3.0", "base_framework_version": "pytorch2.9.0"}
        arguments |= {"py_version": "py312"} | (huggingface if _has_gpu(settings) else {"framework": "pytorch", "version": "2.9"})
    else:
        arguments |= {"framework": "pytorch-amzn2023", "version": settings.pytorch_version}
    try:
        uri: str = image_uris.retrieve(**arguments)
    except ValueError as error:
        raise CommandError(
            f"pytorch_version {settings.pytorch_version}: {' '.join(str(error).split())}. Or name a training_image"
        ) from None
    return uri


def _has_gpu(settings: SageMakerSettings) -> bool:
    """Return whether a machine has a GPU, by its family: g or p."""
    return settings.instance_type.removeprefix("ml.").startswith(("g", "p"))


def _build_configs(spec: JobSpec) -> dict[str, Any]:
    from sagemaker.train import configs

    settings = spec.settings
    spot = settings.enable_managed_spot_training
    arguments: dict[str, Any] = {
        "source_code": configs.SourceCode(
            # exec: the entry point becomes process 1, the only one that SageMaker sends SIGTERM to
            source_dir=spec.code_uri, command=f"exec python {ENTRY_POINT}", requirements="requirements.txt",
        ),
        "compute": configs.Compute(
            instance_type=settings.instance_type,
            instance_count=settings.instance_count,
            volume_size_in_gb=_volume_size(settings),
            enable_managed_spot_training=spot,
            keep_alive_period_in_seconds=settings.keep_alive_period_in_seconds or None,
        ),
        "stopping_condition": configs.StoppingCondition(
            max_runtime_in_seconds=settings.max_runtime_in_seconds, max_wait_time_in_seconds=settings.max_wait_in_seconds if spot else None
        ),
        "output_data_config": configs.OutputDataConfig(
            s3_output_path=f"{spec.root_uri}/output", compression_type="NONE", kms_key_id=settings.kms_key_id
        ),
        "checkpoint_config": configs.CheckpointConfig(s3_uri=spec.run_uri, local_path="/opt/ml/checkpoints"),
    }  # fmt: skip
    if settings.subnets or settings.enable_inter_container_traffic_encryption:
        arguments["networking"] = configs.Networking(
            subnets=settings.subnets or None,
            security_group_ids=settings.security_group_ids or None,
            enable_inter_container_traffic_encryption=settings.enable_inter_container_traffic_encryption,
        )
    return arguments


def _volume_size(settings: SageMakerSettings) -> int:
    """Return the volume's size in GB, within the local disks."""
    machine = hardware.find_instance_type(settings.instance_type)
    local_disk_gb = machine.local_disk_gb if machine is not None else None
    return min(settings.volume_size_in_gb, int(local_disk_gb)) if local_disk_gb else settings.volume_size_in_gb


def _configure_trainer(trainer: Any, spec: JobSpec) -> None:
    from sagemaker.core.shapes import MetricDefinition, RetryStrategy, TensorBoardOutputConfig

    trainer.with_tensorboard_output_config(
        TensorBoardOutputConfig(
            s3_output_path=f"{spec.root_uri}/tensorboard/{spec.bundle.run_path}", local_path="/opt/ml/output/tensorboard"
        )
    )
    definitions = cloudwatch_metrics.build_metric_definitions(spec.bundle.recipe)
    if definitions:
        trainer.with_metric_definitions([MetricDefinition(name=each["Name"], regex=each["Regex"]) for each in definitions])
    if spec.settings.maximum_retry_attempts:
        trainer.with_retry_strategy(RetryStrategy(maximum_retry_attempts=spec.settings.maximum_retry_attempts))


def _build_environment(spec: JobSpec, region: str) -> dict[str, str]:
    """Build the job's environment variables.

    PIP_CONSTRAINT keeps the image's torch: pip fails before it would replace it.
    """
    return {"PIP_CONSTRAINT": f"{INPUT_DATA_DIR}/code/constraints.txt", "AWS_DEFAULT_REGION": region, **spec.settings.environment}


def _build_inputs(spec: JobSpec) -> list[Any]:
    """Build the input channels: data by prefix, runs by manifest.

    A manifest leaves out the checkpoints of a run.
    """
    from sagemaker.train.configs import Channel, DataSource, S3DataSource

    def build_channel(name: str, uri: str, data_type: str) -> Any:
        source = S3DataSource(s3_data_type=data_type, s3_uri=uri, s3_data_distribution_type="FullyReplicated")
        return Channel(channel_name=name, data_source=DataSource(s3_data_source=source), input_mode="File")

    data = [
        build_channel(name, source if source.startswith("s3://") else f"{spec.root_uri}/{source}", "S3Prefix")
        for name, source in spec.bundle.channels.items()
    ]
    return data + [build_channel(name, uri, "ManifestFile") for name, uri in spec.manifest_uris.items()]
