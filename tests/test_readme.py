"""The commands that the README shows can be given: their recipes, configs, steps and keys exist."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from azrecipe.cli.main import _build_parser
from azrecipe.hardware import find_machine
from azrecipe.pipeline.launch_command import resolve_accelerate_config
from azrecipe.recipe.overrides import parse_overrides
from azrecipe.recipe.pipeline_steps import open_recipe
from azrecipe.sagemaker import settings
from tests.conftest import ROOT

TEXT = "".join(
    (ROOT / name).read_text(encoding="utf-8")
    for name in ("README.md", "docs/design.md", "docs/recipes.md", "docs/report.md", "docs/plan.md", "docs/sagemaker.md")
)
BLOCKS = "\n".join(re.findall(r"```(?:ba)?sh\n(.*?)```", TEXT, re.DOTALL)).replace("\\\n", " ")
COMMANDS = [line.split("  #")[0].strip() for line in BLOCKS.splitlines() if line.startswith(("azrecipe", "accelerate", "torchrun"))]
FROM_RECIPES = re.findall(
    r"^# ((?:azrecipe run|accelerate launch) \S.*?)(?:: .*)?$",
    "\n".join(f.read_text("utf-8") for f in (ROOT / "recipes").rglob("*.yaml")),
    re.MULTILINE,
)


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 12
    assert len(FROM_RECIPES) >= 10


@pytest.mark.parametrize("command", [*COMMANDS, *FROM_RECIPES])
def test_a_command_names_what_exists(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    if "--config_file" in words:
        assert Path(words[words.index("--config_file") + 1]).is_file()
    if words[0] != "azrecipe":
        words = ["azrecipe", "run", *words[words.index("azrecipe") + 1 :]]
    words = [word for word in words if word != "\\"]
    arguments = _build_parser().parse_args(words[1:])
    if arguments.verb == "run":
        if arguments.accelerate_config:
            assert resolve_accelerate_config(arguments.accelerate_config).is_file()
        recipe, steps = open_recipe(arguments.recipe, parse_overrides(arguments.set), arguments.step)
        assert steps or recipe.stage != "pipeline"
    elif arguments.verb == "plan" and arguments.calibrate is None:
        open_recipe(arguments.recipe, parse_overrides(arguments.set), arguments.step)
        names = arguments.compare.split(",") if arguments.compare else [arguments.hardware]
        for name in names if not arguments.cheapest else []:
            find_machine(name)
    elif arguments.verb == "sagemaker" and arguments.action in ("submit", "pack"):
        open_recipe(arguments.recipe, parse_overrides(arguments.set), arguments.step)
        settings.load_settings(arguments.config)
    elif arguments.verb == "validate":
        assert all(path.exists() for path in arguments.paths)


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((?!http)([^)#]+)[)#]", (ROOT / "README.md").read_text("utf-8")))))
def test_a_link_leads_somewhere(link: str) -> None:
    assert (ROOT / link).exists()


@pytest.mark.parametrize("text", re.findall(r"policy\.json <<END\n(.*?)\nEND", (ROOT / "docs/sagemaker.md").read_text("utf-8"), re.DOTALL))
def test_a_policy_allows_what_it_names_and_no_more(text: str) -> None:
    """Every statement is of one resource's, but for the three actions that AWS knows no resource for."""
    anywhere = {"ecr:GetAuthorizationToken", "cloudwatch:PutMetricData", "sagemaker:ListTrainingJobs"}
    for statement in json.loads(text)["Statement"]:
        actions = {statement["Action"]} if isinstance(statement["Action"], str) else set(statement["Action"])
        assert not any("*" in action for action in actions)
        assert statement["Resource"] != "*" or actions <= anywhere
