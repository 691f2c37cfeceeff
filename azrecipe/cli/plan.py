"""`azrecipe plan`: estimate a recipe on machines that are only named."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import asdict
from typing import Any

from azrecipe.cli import plan_tables
from azrecipe.errors import EXIT_SUCCESS, CannotRun, CommandError
from azrecipe.operations.machine_ranking import rank_machines
from azrecipe.operations.plan import PlanReport, plan_recipes
from azrecipe.planning import calibrate
from azrecipe.utils.console import print_line, print_progress


def plan_recipe_or_pipeline(arguments: Namespace) -> int:
    """`azrecipe plan`: estimate a recipe, or each training step of a pipeline."""
    if arguments.calibrate is not None:
        print_line(calibrate.calibrate_from_run(arguments.calibrate))
        return EXIT_SUCCESS
    if arguments.compare and arguments.hardware:
        raise CommandError("--compare names the machines: leave --hardware out, or add it to the list")
    if arguments.recipe is None:
        raise CommandError("which recipe? azrecipe plan RECIPE --hardware NAME")
    if (arguments.within is not None or arguments.provider is not None) and not arguments.cheapest:
        raise CommandError("--within and --provider are for --cheapest")
    if arguments.cheapest:
        return _rank_machines(arguments)
    report = plan_recipes(
        arguments.recipe,
        hardware=arguments.compare.split(",") if arguments.compare else [arguments.hardware] if arguments.hardware else [],
        **_collect_options(arguments),
        price_per_hour=arguments.price_per_hour,
        with_alternatives=not (arguments.compare or arguments.largest_batch or arguments.no_levers),
    )
    _print_report(arguments, report)
    if report.problems:
        raise CannotRun("\n".join(report.problems))
    return EXIT_SUCCESS


def _collect_options(arguments: Namespace) -> dict[str, Any]:
    """Collect the options that say what is planned."""
    names = ("nodes", "runs_dir", "step", "cell", "accelerate_config", "config_json", "vocab_size", "hardware_file")
    return {"overrides": arguments.set, **{name: getattr(arguments, name) for name in names}}


def _rank_machines(arguments: Namespace) -> int:
    """`azrecipe plan --cheapest`: rank machines by price."""
    refused = [name for name in ("hardware", "compare", "price_per_hour", "largest_batch") if getattr(arguments, name)]
    if refused:
        raise CommandError(f"--cheapest ranks all machines with a known price: leave --{refused[0].replace('_', '-')} out")
    print_progress("estimating all machines with a known price")
    ranking = rank_machines(
        arguments.recipe,
        **_collect_options(arguments),
        within_hours=arguments.within,
        providers=[name.strip() for name in arguments.provider.split(",")] if arguments.provider else [],
    )
    if arguments.json:
        print_line(json.dumps({"machines": [asdict(one) for one in ranking.machines], "left_out": ranking.left_out}, indent=2))
    else:
        plan_tables.show_machine_ranking(ranking)
    if not ranking.machines:
        raise CannotRun(
            f"{ranking.recipe}: no machine is left: {', '.join(f'{count} {reason}' for reason, count in ranking.left_out.items())}"
        )
    return EXIT_SUCCESS


def _print_report(arguments: Namespace, report: PlanReport) -> None:
    """Print the estimates: for each recipe, one for each machine."""
    if arguments.json:
        flat = [answer for answers in report.estimates for answer in answers]
        print_line(json.dumps(flat[0] if len(flat) == 1 else flat, indent=2))
        return
    for answers in report.estimates:
        if arguments.largest_batch:
            for answer in answers:
                plan_tables.show_largest_batches(answer)
        elif arguments.compare:
            plan_tables.show_machine_comparison(answers)
        else:
            plan_tables.show_plan(answers[0])
    if len(report.estimates) > 1 and arguments.compare:
        plan_tables.show_pipeline_comparison(report.estimates)
    if len(report.estimates) > 1 and not (arguments.compare or arguments.largest_batch):
        plan_tables.show_pipeline_total(report.estimates[0][0], report.hours)
        print_line(f"What single changes would do: --step {report.recipes[-1].path.name}")
