"""SageMaker settings files: role, bucket, machines and limits of a job."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from azrecipe.errors import CommandError, Problem, RecipeError
from azrecipe.recipe import schema
from azrecipe.recipe.compose import display_path, read_tree
from azrecipe.recipe.dataclass_builder import build_dataclass
from azrecipe.recipe.overrides import format_key_path
from azrecipe.recipe.secrets import find_secret_values
from azrecipe.recipe.to_yaml import to_yaml
from azrecipe.recipe.yaml_tree import YamlNode, parse_yaml
from azrecipe.utils import shipped_files
from azrecipe.utils.secret_scan import WAY_OUT, find_secrets

MAX_RUNTIME_SECONDS = 2_419_200  # 28 days, SageMaker's quota for a training job
SECRET_NAME_PATTERN = re.compile(r"TOKEN(?!IZ)|SECRET|PASSWORD|PASSWD|CREDENTIAL|PRIVATE|API_?KEY|ACCESS_?KEY", re.IGNORECASE)


# torch of AWS' images, exactly, by pytorch_version; in an image that is not listed any patch release of that version is taken.
IMAGE_TORCH: Mapping[str, str] = {"2.9": "2.9.0", "2.13": "2.13.0"}


@dataclass(frozen=True)
class SageMakerSettings:
    """A settings file. schema/sagemaker.json describes each key."""

    role: str
    bucket: str
    instance_type: str
    region: str | None
    prefix: str
    training_image: str | None
    pytorch_version: str
    instance_count: int
    volume_size_in_gb: int
    accelerate_config: str | None
    enable_managed_spot_training: bool
    max_runtime_in_seconds: int
    max_wait_time_in_seconds: int | None
    maximum_retry_attempts: int
    keep_alive_period_in_seconds: int
    subnets: list[str]
    security_group_ids: list[str]
    enable_inter_container_traffic_encryption: bool
    kms_key_id: str | None
    tags: Mapping[str, str]
    environment: Mapping[str, str]
    hub_token_secret: str | None
    upload_data: bool
    allow_code: bool
    price_per_hour: float | None
    steps: Mapping[str, Mapping[str, Any]]
    changes: Mapping[str, Any] = field(default_factory=dict)  # from the command line, which wins over `steps` too

    @property
    def torch_pin(self) -> str:
        """The torch that the image has, for pip's constraints."""
        exact = IMAGE_TORCH.get(self.pytorch_version) if self.training_image is None else None
        return f"torch=={exact or f'{self.pytorch_version}.*'}"

    @property
    def max_wait_in_seconds(self) -> int:
        """Seconds that a spot job may run and wait in all."""
        return max(self.max_wait_time_in_seconds or min(2 * self.max_runtime_in_seconds, MAX_RUNTIME_SECONDS), self.max_runtime_in_seconds)

    def for_step(self, file: str) -> SageMakerSettings:
        """Return the settings of a step, by its file name."""
        return replace(self, **{**self.steps.get(file, {}), **self.changes})


def load_settings(path: str | Path, **changes: Any) -> SageMakerSettings:
    """Read and check a settings file.

    Args:
        path: A file, or one that ships, such as sagemaker/cpt.yaml.
        **changes: Keys whose values win over the file; None is ignored.

    Raises:
        RecipeError: The file has errors; it lists all of them.
        CommandError: There is no such file, or a change is wrong.
    """
    file = shipped_files.resolve_shipped_path(str(path))
    if not file.is_file():
        raise CommandError(f"no such settings file: {path}. These ship with azrecipe: sagemaker/cpt.yaml, sagemaker/sft.yaml")
    root = read_tree(file)
    problems = schema.check_schema(root, "sagemaker") or list(_check_rules(root))
    if problems:
        raise RecipeError(sorted(problems, key=lambda p: (p.location.line, p.location.column)))
    settings = build_dataclass(SageMakerSettings, schema.fill_defaults(root, "sagemaker"))
    changes = {key: value for key, value in changes.items() if value is not None}
    _check_changes(changes)
    changed = replace(settings, **changes, changes=changes)
    if changed.enable_managed_spot_training and changed.keep_alive_period_in_seconds:
        raise CommandError(f"--spot: {display_path(file)} has keep_alive_period_in_seconds, which spot machines do not support")
    return changed


def _check_rules(root: YamlNode) -> Iterator[Problem]:
    """Check rules that the schema cannot express.

    They concern times that contradict each other, incomplete networks, and secrets.
    """
    runtime, wait = _value(root, "max_runtime_in_seconds"), root.get("max_wait_time_in_seconds")
    spot = _value(root, "enable_managed_spot_training")
    if wait is not None and wait.value is not None and runtime is not None and int(str(wait.value)) < runtime:
        yield Problem(
            wait.location, f"max_wait_time_in_seconds = {wait.value} is less than max_runtime_in_seconds = {runtime}: it counts both"
        )
    keep_alive = root.get("keep_alive_period_in_seconds")
    if keep_alive is not None and keep_alive.value and spot:
        yield Problem(keep_alive.location, "keep_alive_period_in_seconds: spot machines do not support it")
    for one, other in (("subnets", "security_group_ids"), ("security_group_ids", "subnets")):
        node = root.get(one)
        if node is not None and node.value and not _value(root, other):
            yield Problem(node.entry_location, f"{one} without {other}: a VPC needs both")
    for keys, node, kind in find_secret_values(root):
        if keys[:1] != ("environment",):
            message = f"{format_key_path(keys)} looks like a secret ({kind}), which everyone who may describe the job would see: remove it"
            yield Problem(node.location, f"{message}; {WAY_OUT}")
    environment = root.get("environment")
    for name, node in environment.value.items() if environment is not None and isinstance(environment.value, dict) else ():
        if SECRET_NAME_PATTERN.search(name) or find_secrets(f"{name}: {node.value}"):
            message = f"environment.{name} looks like a secret, which everyone who may describe the job would see: store it in Secrets Manager, and name it in hub_token_secret"
            yield Problem(node.entry_location, message)


def _value(root: YamlNode, key: str) -> Any:
    node = root.get(key)
    return node.to_plain() if node is not None else schema.load_schema("sagemaker")["properties"][key].get("default")


def _check_changes(changes: Mapping[str, Any]) -> None:
    """Check changes from the command line. Raises CommandError with all problems."""
    problems = schema.check_schema(parse_yaml(to_yaml(dict(changes)), "the command line"), "sagemaker") if changes else []
    messages = [problem.message for problem in problems if not problem.message.startswith("the recipe: missing key")]
    if messages:
        raise CommandError("\n".join(f"the command line: {message}" for message in messages))
