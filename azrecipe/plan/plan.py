"""`azrecipe plan`: from a recipe and the names of machines to what is printed."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from azrecipe.errors import CannotRun, CommandError
from azrecipe.parts import hardware
from azrecipe.parts.hardware import Machine, Price
from azrecipe.parts.model_shape import Around
from azrecipe.plan import answer, calibrate, show
from azrecipe.plan.where import Where, where
from azrecipe.recipe.load import Recipe

TRAINING = ("pretrain", "sft")


def run(arguments: Namespace, recipe: Recipe, steps: Sequence[Recipe], launch: Where | None) -> int:
    """Print the answer for a recipe, or for each of a pipeline's `steps` that trains. `launch`: what an accelerate config asks for."""
    chosen = [one for one in (steps or [recipe]) if one.stage in TRAINING]
    if not chosen:
        raise CommandError(
            f"{recipe.path}: a {recipe.stage} recipe; what can be planned is pretrain and sft recipes, and pipelines with some"
        )
    names = arguments.compare.split(",") if arguments.compare else [arguments.hardware]
    if names == [None]:
        raise CommandError(
            "which machine? --hardware p5.48xlarge, or cards: --hardware 'h100-80g x8'; several: --compare p4d.24xlarge,p5.48xlarge"
        )
    around = Around(arguments.runs_dir, {one.name: one for one in steps}, arguments.config_json, arguments.vocab_size)
    places = [where(_machine(name.strip(), arguments), arguments.nodes, launch) for name in names]
    look = not (arguments.compare or arguments.largest_batch or arguments.no_levers) and len(chosen) == 1
    answers = [[answer.of_recipe(one, around, place, look) for place in places] for one in chosen]
    if arguments.json:
        flat = [found for each in answers for found in each]
        print(json.dumps(flat if len(flat) > 1 else flat[0], indent=2))
    elif arguments.largest_batch:
        for each in answers:
            for found in each:
                show.largest(found)
    elif arguments.compare:
        for each in answers:
            show.compare(each)
    else:
        for each in answers:
            show.show(each[0])
        if len(answers) > 1:
            show.whole([each[0] for each in answers])
            print(f"What single changes would do: --step {chosen[-1].path.name}")
    _nowhere(answers)
    return 0


def learn(path: Path) -> int:
    """`azrecipe plan --calibrate RUN`."""
    print(calibrate.learn(path))
    return 0


def _machine(name: str, arguments: Namespace) -> Machine:
    machine = hardware.find(name, arguments.hardware_file)
    if arguments.price_per_hour is not None:
        machine = replace(machine, price=Price(arguments.price_per_hour), spot=None)
    return machine


def _nowhere(answers: Sequence[Sequence[dict[str, Any]]]) -> None:
    """Raise CannotRun for a loop that fits on none of the machines as it stands, with the smallest change that would fit, if there is one."""
    said = []
    for each in answers:
        for nth, loop in enumerate(each[0]["loops"]):
            if any(found["loops"][nth]["verdict"] != "does not fit" for found in each):
                continue
            best = max(found["loops"][nth]["largest_batch"]["surely"] for found in each)
            if best:
                said.append(
                    f"{each[0]['recipe']}: {loop['name']} does not fit: --set training.per_device_train_batch_size={best} does, and accumulates"
                )
                continue
            fitting = [line for found in each for line in found["levers"]["changes"] if line["largest_batch"]["surely"] >= 1]
            if fitting:
                change = min(fitting, key=lambda line: abs(line["difference"]))
                said.append(
                    f"{each[0]['recipe']}: {loop['name']} does not fit at any batch as it stands; with {change['change']} it does: {change['how']}"
                )
            else:
                said.append(
                    f"{each[0]['recipe']}: {loop['name']} fits at no batch, and no single change makes it: more cards (--nodes), or larger ones"
                )
    if said:
        raise CannotRun("\n".join(said))
