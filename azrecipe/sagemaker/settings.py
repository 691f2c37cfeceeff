"""Knows what a SageMaker settings file says: the account's side of a job, checked like a recipe."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from azrecipe.errors import CommandError, Problem, RecipeError
from azrecipe.recipe import schema
from azrecipe.recipe.compose import read, shown
from azrecipe.recipe.dataclass_builder import build
from azrecipe.recipe.overrides import dotted
from azrecipe.recipe.to_yaml import to_yaml
from azrecipe.recipe.yaml_tree import Key, Node, parse
from azrecipe.utils import shipped_files

LONGEST = 2_419_200  # seconds that a training job may take, 28 days (SageMaker's quota)
SECRET_NAMES = re.compile(r"TOKEN(?!IZ)|SECRET|PASSWORD|PASSWD|CREDENTIAL|PRIVATE|API_?KEY|ACCESS_?KEY", re.IGNORECASE)
SECRETS = re.compile(r"\b(hf_[A-Za-z0-9]{20,}|(?:AKIA|ASIA)[A-Z0-9]{16}|sk-[A-Za-z0-9_-]{20,}|ghp_[A-Za-z0-9]{30,})\b")


@dataclass(frozen=True)
class Settings:
    """sagemaker/*.yaml; what each key means stands in schema/sagemaker.json."""

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
    price_per_hour: float | None
    steps: Mapping[str, Mapping[str, Any]]
    changes: Mapping[str, Any] = field(default_factory=dict)  # from the command line, which wins over `steps` too

    @property
    def max_wait(self) -> int:
        """Seconds that a spot job may run and wait together; never less than it may run."""
        return max(self.max_wait_time_in_seconds or min(2 * self.max_runtime_in_seconds, LONGEST), self.max_runtime_in_seconds)

    def of_step(self, file: str) -> Settings:
        """The settings of one step of a pipeline, by its file's name."""
        return replace(self, **{**self.steps.get(file, {}), **self.changes})


def load(path: str | Path, **changes: Any) -> Settings:
    """Read and check a settings file; `changes` come from the command line and win. Raises RecipeError with every problem, CommandError."""
    file = shipped_files.find(str(path))
    if not file.is_file():
        raise CommandError(f"no such settings file: {path}. What ships: sagemaker/cpt.yaml, sagemaker/sft.yaml")
    root = read(file)
    problems = schema.check(root, "sagemaker") or list(_rules(root))
    if problems:
        raise RecipeError(sorted(problems, key=lambda p: (p.place.line, p.place.column)))
    settings = build(Settings, schema.finish(root, "sagemaker"))
    given = {key: value for key, value in changes.items() if value is not None}
    _check_changes(given)
    changed = replace(settings, **given, changes=given)
    if changed.enable_managed_spot_training and changed.keep_alive_period_in_seconds:
        raise CommandError(f"--spot: {shown(file)} has keep_alive_period_in_seconds, which is not for spot machines")
    return changed


def _rules(root: Node) -> Iterator[Problem]:
    """What the schema cannot say: times that contradict each other, networks in half, secrets."""
    runtime, wait = _value(root, "max_runtime_in_seconds"), root.get("max_wait_time_in_seconds")
    spot = _value(root, "enable_managed_spot_training")
    if wait is not None and wait.value is not None and runtime is not None and int(str(wait.value)) < runtime:
        yield Problem(
            wait.place, f"max_wait_time_in_seconds = {wait.value} is less than max_runtime_in_seconds = {runtime}: it counts both"
        )
    warm = root.get("keep_alive_period_in_seconds")
    if warm is not None and warm.value and spot:
        yield Problem(warm.place, "keep_alive_period_in_seconds is not for spot machines: SageMaker refuses both together")
    for one, other in (("subnets", "security_group_ids"), ("security_group_ids", "subnets")):
        node = root.get(one)
        if node is not None and node.value and not _value(root, other):
            yield Problem(node.at, f"{one} without {other}: a VPC needs both")
    for at in secrets_in(root.plain()):
        if at[0] != "environment":
            yield Problem(root.nearest(at).place, f"{dotted(at)} looks like a secret, and would stand in the request: take it out")
    environment = root.get("environment")
    for name, node in environment.value.items() if environment is not None and isinstance(environment.value, dict) else ():
        if SECRET_NAMES.search(name) or SECRETS.search(str(node.value)):
            message = f"environment.{name} looks like a secret, and everyone who may describe the job would read it: hub_token_secret names one in Secrets Manager"
            yield Problem(node.at, message)


def _value(root: Node, key: str) -> Any:
    node = root.get(key)
    return node.plain() if node is not None else schema.document("sagemaker")["properties"][key].get("default")


def _check_changes(changes: Mapping[str, Any]) -> None:
    """What the command line changes is as right as the file. Raises CommandError with every problem."""
    found = schema.check(parse(to_yaml(dict(changes)), "the command line"), "sagemaker") if changes else []
    wrong = [problem.message for problem in found if not problem.message.startswith("the recipe: missing key")]
    if wrong:
        raise CommandError("\n".join(f"the command line: {message}" for message in wrong))


def secrets_in(data: object, at: tuple[Key, ...] = ()) -> Iterator[tuple[Key, ...]]:
    """The keys of plain data whose text looks like a token or a key."""
    if isinstance(data, Mapping):
        for key, inner in data.items():
            yield from secrets_in(inner, (*at, key))
    elif isinstance(data, list):
        for i, inner in enumerate(data):
            yield from secrets_in(inner, (*at, i))
    elif isinstance(data, str) and SECRETS.search(data):
        yield at
