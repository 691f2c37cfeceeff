"""`azrecipe plan`: from a recipe and the names of machines to what is printed."""

from __future__ import annotations

import contextlib
import json
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from azrecipe import hardware
from azrecipe.cli import plan_tables
from azrecipe.distributed.backend import Mesh
from azrecipe.errors import AzrecipeError, CannotRun, CommandError
from azrecipe.hardware import Machine, Price
from azrecipe.pipeline import launch_command, preflight
from azrecipe.planning import calibrate, estimate
from azrecipe.planning.estimate import Question
from azrecipe.planning.model_config import Around
from azrecipe.planning.placement import NOWHERE, Where, kind_of, where
from azrecipe.planning.simulation.cost_cache import Estimates
from azrecipe.recipe.load import Recipe
from azrecipe.recipe.overrides import parse_overrides
from azrecipe.recipe.pipeline_steps import load_pipeline, open_recipe
from azrecipe.utils import shipped_files

TRAINING = ("pretrain", "sft")


def plan(arguments: Namespace) -> int:
    """`azrecipe plan`: what a recipe, or each training step of a pipeline, would need on machines that are only named."""
    if arguments.calibrate is not None:
        return learn(arguments.calibrate)
    if arguments.recipe is None:
        raise CommandError("which recipe? azrecipe plan RECIPE --hardware NAME")
    path, overrides = shipped_files.find(arguments.recipe), parse_overrides(arguments.set)
    recipe, steps = open_recipe(path, overrides, arguments.step, arguments.cell)
    chosen = [step.recipe for step in steps] if recipe.stage == "pipeline" else [recipe]
    beside = [step.recipe for step in load_pipeline(path, overrides)[1]] if arguments.step else chosen
    return plan_recipes(arguments, chosen, beside, _launch(arguments.accelerate_config))


def _launch(name: str | None) -> Where | None:
    """What an accelerate config says of any number of processes."""
    if name is None:
        return None
    asked = preflight.read(launch_command.config_file(name), None)
    mesh = asked.mesh or Mesh()
    kind = kind_of(asked.kind, mesh.replicate, asked.zero_stage)
    return Where(NOWHERE, 1, kind, mesh.replicate, mesh.context, asked.reshard)


def plan_recipes(arguments: Namespace, recipes: Sequence[Recipe], beside: Sequence[Recipe], launch: Where | None) -> int:
    """Print the answer for each recipe that trains. `beside`: those of the same pipeline; `launch`: what an accelerate config asks for."""
    chosen = [one for one in recipes if one.stage in TRAINING]
    if not chosen:
        raise CommandError(
            f"{recipes[0].path}: a {recipes[0].stage} recipe; what can be planned is pretrain and sft recipes, and pipelines with some"
        )
    names = arguments.compare.split(",") if arguments.compare else [arguments.hardware]
    if names == [None]:
        raise CommandError(
            "which machine? --hardware p5.48xlarge, or cards: --hardware 'h100-80g x8'; several: --compare p4d.24xlarge,p5.48xlarge"
        )

    def around(recipe: Recipe) -> Around:
        own = {one.name: one for one in beside if one.cell in (None, recipe.cell)}
        return Around(arguments.runs_dir, own, arguments.config_json, arguments.vocab_size)

    places = [where(_machine(name.strip(), arguments), arguments.nodes, launch) for name in names]
    look = not (arguments.compare or arguments.largest_batch or arguments.no_levers) and len(chosen) == 1
    refused: list[str] = []

    def refuse(one: Recipe, error: AzrecipeError) -> None:
        if len(chosen) == 1:
            raise error
        refused.append(str(error) if str(one.path) in str(error) else f"{one.path}: {error}")

    questions: list[list[Question]] = []
    for one in chosen:
        try:
            questions.append([estimate.question(one, around(one), place, look) for place in places])
        except AzrecipeError as error:
            refuse(one, error)
    known = Estimates()
    _look(known, [each for several in questions for each in several])
    asked, answers = [], []
    for several in questions:
        try:
            answers.append([estimate.answer(each, known) for each in several])
            asked.append(several[0])
        except AzrecipeError as error:
            refuse(several[0].recipe, error)
    _print(arguments, answers)
    if len(answers) > 1 and not (arguments.json or arguments.compare or arguments.largest_batch):
        plan_tables.whole(answers[0][0], estimate.hours([each[0] for each in answers]))
        print(f"What single changes would do: --step {chosen[-1].path.name}")
    if not look:
        _with_changes(asked, answers, known)
    _nowhere(answers, refused)
    return 0


def _look(known: Estimates, questions: Sequence[Question]) -> None:
    """Let the costs of all recipes and machines be worked out beside each other. What cannot be looked at is refused with its own recipe."""
    with contextlib.suppress(CommandError):
        known.costs([step for each in questions for step in each.steps])


def _with_changes(asked: Sequence[Question], answers: Sequence[list[dict[str, Any]]], known: Estimates) -> None:
    """Answer again, changes and all, for recipes of which a loop fits nowhere with any batch: which change would help is wanted now."""
    wanted = {
        nth: replace(asked[nth], look_at_levers=True)
        for nth, each in enumerate(answers)
        if any(_fits_nowhere(each, loop) and not _batches(each, loop) for loop in range(len(each[0]["loops"])))
    }
    _look(known, list(wanted.values()))
    for nth, question in wanted.items():
        answers[nth][0] = estimate.answer(question, known)


def _print(arguments: Namespace, answers: Sequence[Sequence[dict[str, Any]]]) -> None:
    if arguments.json:
        flat = [found for each in answers for found in each]
        print(json.dumps(flat[0] if len(flat) == 1 else flat, indent=2))
        return
    for each in answers:
        if arguments.largest_batch:
            for found in each:
                plan_tables.largest(found)
        elif arguments.compare:
            plan_tables.compare(each)
        else:
            plan_tables.show(each[0])


def learn(path: Path) -> int:
    """`azrecipe plan --calibrate RUN`."""
    print(calibrate.learn(path))
    return 0


def _machine(name: str, arguments: Namespace) -> Machine:
    machine = hardware.find(name, arguments.hardware_file)
    if arguments.price_per_hour is not None:
        machine = replace(machine, price=Price(arguments.price_per_hour), spot=None)
    return machine


def _fits_nowhere(each: Sequence[dict[str, Any]], nth: int) -> bool:
    """Whether a loop fits on none of the machines as it stands."""
    return all(found["loops"][nth]["verdict"] == "does not fit" for found in each)


def _batches(each: Sequence[dict[str, Any]], nth: int) -> int:
    """The largest batch with which a loop surely fits on one of the machines; 0: with none."""
    return max(int(found["loops"][nth]["fitting_batch"]) for found in each)


def _nowhere(answers: Sequence[Sequence[dict[str, Any]]], refused: Sequence[str]) -> None:
    """Raise CannotRun for what was `refused`, and for a loop that fits on none of the machines as it stands, with the smallest change that fits."""
    said = list(refused)
    for each in answers:
        for nth, loop in enumerate(each[0]["loops"]):
            if not _fits_nowhere(each, nth):
                continue
            name = f"{each[0]['recipe']}: {loop['name']}"
            if best := _batches(each, nth):
                said.append(f"{name} does not fit: --set training.per_device_train_batch_size={best} does, and accumulates")
                continue
            fitting = [line for line in each[0]["levers"]["changes"] if line["best_batch"] >= 1]
            if fitting:
                change = min(fitting, key=lambda line: ("vocab" in line["how"] or "max_length" in line["how"], abs(line["difference"])))
                more = f" --set training.per_device_train_batch_size={change['best_batch']}"
                said.append(f"{name} does not fit at any batch as it stands; with {change['change']} it does: {change['how']}{more}")
            else:
                said.append(f"{name} fits at no batch, and no single change makes it: more cards (--nodes), larger ones, or an adapter")
    if said:
        raise CannotRun("\n".join(said))
