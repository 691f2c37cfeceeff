"""Knows how a job is asked for through SageMaker's SDK (ModelTrainer), and how to see the request without sending it."""

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
from azrecipe.sagemaker.account import Account, explained
from azrecipe.sagemaker.bundle import ENTRY, INPUTS, Parcel
from azrecipe.sagemaker.settings import Settings

CREATE = "provide-client-params.sagemaker.CreateTrainingJob"


@dataclass(frozen=True)
class Asked:
    """A job to ask for: its settings with role and bucket resolved, what travels, and the manifests of runs that come in, by channel."""

    settings: Settings
    parcel: Parcel
    manifests: Mapping[str, str]

    @property
    def root(self) -> str:
        """Everything of this project's in S3."""
        return f"s3://{self.settings.bucket}/{self.settings.prefix}"

    @property
    def run_uri(self) -> str:
        """The run directory in S3: jobs of one run share it, whatever they are called."""
        return f"{self.root}/runs/{self.parcel.run}/"  # without the slash it would be the prefix of other runs too

    @property
    def code_uri(self) -> str:
        return f"{self.root}/{self.parcel.archive_key}"

    @property
    def base_name(self) -> str:
        """Jobs' names begin with it; SageMaker allows letters, digits and hyphens, 63 in all, and the SDK adds a time."""
        plain = re.sub(r"[^A-Za-z0-9]+", "-", f"azrecipe-{self.parcel.run}").strip("-")
        return plain[:46].rstrip("-")


class _Seen(Exception):
    """Carries a request out of the SDK before it is sent."""

    def __init__(self, request: dict[str, Any]) -> None:
        super().__init__("seen")
        self.request = request


def seen(asked: Asked, where: Account) -> dict[str, Any]:
    """The request as the SDK makes it. Nothing is sent: not the job, and nothing to S3."""

    def stop(params: dict[str, Any], **_: Any) -> None:
        raise _Seen(dict(params))

    events = where.session.events
    events.register(CREATE, stop)
    events.register("before-send.s3", _answered)
    try:
        with _unchecked_role():
            _train(asked, where)
    except _Seen as found:
        return found.request
    finally:
        events.unregister(CREATE, stop)
        events.unregister("before-send.s3", _answered)
    raise CannotRun("the SDK made no request: is this sagemaker 3? pip install -U 'azrecipe[sagemaker]'")


def send(asked: Asked, where: Account) -> tuple[str, dict[str, Any]]:
    """Ask for the job. Returns its name and the request that was sent. Raises CannotRun or CommandError with what AWS refuses."""
    request: dict[str, Any] = {}

    def note(params: dict[str, Any], **_: Any) -> None:
        request.update(params)

    where.session.events.register(CREATE, note)
    try:
        with _unchecked_role(), explained("sagemaker:CreateTrainingJob"):
            _train(asked, where)
    finally:
        where.session.events.unregister(CREATE, note)
    return str(request["TrainingJobName"]), request


def _answered(request: Any, **_: Any) -> Any:
    """S3's answer to whatever the SDK would upload in a dry run."""
    from botocore.awsrequest import AWSResponse

    class Empty:
        def stream(self, *_: Any, **__: Any) -> Iterator[bytes]:
            return iter(())

    return AWSResponse(request.url, 200, {"ETag": '"0"'}, Empty())


@contextlib.contextmanager
def _unchecked_role() -> Iterator[None]:
    """Without the SDK's look at the role's rights (iam_role_resolver.py): it wants rights to EC2 and all buckets, which these jobs do not need."""
    before = os.environ.get("SAGEMAKER_VALIDATE_ROLE")
    os.environ["SAGEMAKER_VALIDATE_ROLE"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["SAGEMAKER_VALIDATE_ROLE"]
        else:
            os.environ["SAGEMAKER_VALIDATE_ROLE"] = before


def _train(asked: Asked, where: Account) -> None:
    """Hand the job to the SDK, which uploads its drivers and creates the job."""
    logging.getLogger("sagemaker").setLevel(logging.WARNING)
    from sagemaker.train import ModelTrainer
    from sagemaker.train.configs import Tag

    settings = asked.settings
    try:
        trainer = ModelTrainer(
            sagemaker_session=_session(settings, where),
            role=settings.role,
            training_image=_image(settings, where.region),
            base_job_name=asked.base_name,
            environment=_environment(asked, where.region),
            tags=[
                Tag(key=key, value=value)
                for key, value in {**settings.tags, "azrecipe:run": re.sub(r"[^\w .:/=+@-]", "_", asked.parcel.run)}.items()
            ],
            **_configs(asked),
        )
        _more(trainer, asked)
        trainer.train(input_data_config=_inputs(asked), wait=False, logs=False)
    except ValueError as error:  # the SDK's own checks, pydantic's among them
        raise CommandError(f"SageMaker's SDK refuses the settings: {' '.join(str(error).split())}") from None


def _session(settings: Settings, where: Account) -> Any:
    """The SDK's session, in a bucket that has been looked at: the SDK would list all buckets, and make one that it does not find. Its telemetry is off."""
    from sagemaker.core.helper.session_helper import Session

    class InBucket(Session):  # type: ignore[misc]
        def default_bucket(self) -> str:
            return settings.bucket

    quiet = {"SchemaVersion": "1.0", "SageMaker": {"PythonSDK": {"Modules": {"TelemetryOptOut": True}}}}
    return InBucket(where.session, sagemaker_config=quiet, default_bucket=settings.bucket, default_bucket_prefix=f"{settings.prefix}/jobs")


def _image(settings: Settings, region: str) -> str:
    if settings.training_image is not None:
        return settings.training_image
    from sagemaker.core import image_uris

    try:
        found: str = image_uris.retrieve(
            "pytorch-amzn2023",
            region=region,
            version=settings.pytorch_version,
            instance_type=settings.instance_type,
            image_scope="training",
        )
    except ValueError as error:
        raise CommandError(
            f"pytorch_version {settings.pytorch_version}: {' '.join(str(error).split())}. Or name a training_image"
        ) from None
    return found


def _configs(asked: Asked) -> dict[str, Any]:
    from sagemaker.train import configs

    settings = asked.settings
    spot = settings.enable_managed_spot_training
    found: dict[str, Any] = {
        "source_code": configs.SourceCode(
            # exec: the entry point becomes process 1, the only one that SageMaker sends SIGTERM to
            source_dir=asked.code_uri, command=f"exec python {ENTRY}", requirements="requirements.txt",
        ),
        "compute": configs.Compute(
            instance_type=settings.instance_type,
            instance_count=settings.instance_count,
            volume_size_in_gb=_volume(settings),
            enable_managed_spot_training=spot,
            keep_alive_period_in_seconds=settings.keep_alive_period_in_seconds or None,
        ),
        "stopping_condition": configs.StoppingCondition(
            max_runtime_in_seconds=settings.max_runtime_in_seconds, max_wait_time_in_seconds=settings.max_wait if spot else None
        ),
        "output_data_config": configs.OutputDataConfig(
            s3_output_path=f"{asked.root}/output", compression_type="NONE", kms_key_id=settings.kms_key_id
        ),
        "checkpoint_config": configs.CheckpointConfig(s3_uri=asked.run_uri, local_path="/opt/ml/checkpoints"),
    }  # fmt: skip
    if settings.subnets or settings.enable_inter_container_traffic_encryption:
        found["networking"] = configs.Networking(
            subnets=settings.subnets or None,
            security_group_ids=settings.security_group_ids or None,
            enable_inter_container_traffic_encryption=settings.enable_inter_container_traffic_encryption,
        )
    return found


def _volume(settings: Settings) -> int:
    """GB; a machine with disks of its own gives no more than those."""
    machine = hardware.of_instance(settings.instance_type)
    own = machine.local_disk_gb if machine is not None else None
    return min(settings.volume_size_in_gb, int(own)) if own else settings.volume_size_in_gb


def _more(trainer: Any, asked: Asked) -> None:
    from sagemaker.core.shapes import MetricDefinition, RetryStrategy, TensorBoardOutputConfig

    trainer.with_tensorboard_output_config(
        TensorBoardOutputConfig(s3_output_path=f"{asked.root}/tensorboard/{asked.parcel.run}", local_path="/opt/ml/output/tensorboard")
    )
    told = cloudwatch_metrics.definitions(asked.parcel.recipe)
    if told:
        trainer.with_metric_definitions([MetricDefinition(name=each["Name"], regex=each["Regex"]) for each in told])
    if asked.settings.maximum_retry_attempts:
        trainer.with_retry_strategy(RetryStrategy(maximum_retry_attempts=asked.settings.maximum_retry_attempts))


def _environment(asked: Asked, region: str) -> dict[str, str]:
    """pip may add packages and must not touch the image's torch: a constraint that names its version makes it fail first."""
    return {"PIP_CONSTRAINT": f"{INPUTS}/code/constraints.txt", "AWS_DEFAULT_REGION": region, **asked.settings.environment}


def _inputs(asked: Asked) -> list[Any]:
    """Data as SageMaker copies it to each machine; runs of other recipes by a manifest, which leaves their checkpoints out."""
    from sagemaker.train.configs import Channel, DataSource, S3DataSource

    def channel(name: str, uri: str, kind: str) -> Any:
        source = S3DataSource(s3_data_type=kind, s3_uri=uri, s3_data_distribution_type="FullyReplicated")
        return Channel(channel_name=name, data_source=DataSource(s3_data_source=source), input_mode="File")

    data = [
        channel(name, source if source.startswith("s3://") else f"{asked.root}/{source}", "S3Prefix")
        for name, source in asked.parcel.channels.items()
    ]
    return data + [channel(name, uri, "ManifestFile") for name, uri in asked.manifests.items()]
