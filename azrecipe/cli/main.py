"""The command line: its options, and one function for each verb.

It imports nothing heavy at the top, so that `validate` starts at once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from azrecipe import __version__
from azrecipe.cli import inference_options, option_types, plan_options, sagemaker
from azrecipe.errors import (
    EXIT_FAILED,
    EXIT_SIGINT,
    EXIT_SUCCESS,
    EXIT_WRONG_INPUT,
    AzrecipeError,
    CannotRun,
    CommandError,
    suggest_choices,
)
from azrecipe.utils.console import print_line, print_progress
from azrecipe.utils.environment_variables import ALLOW_CODE

VERBS: dict[str, Callable[[argparse.Namespace], int]] = {}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    A user's mistake ends with a message, without a traceback.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    sys.excepthook = _print_traceback
    try:
        if arguments and arguments[0].endswith((".yaml", ".yml")):
            return _run_worker(arguments)  # the form that accelerate launch and torchrun use
        parsed = _build_parser().parse_args(_check_verb(arguments))
        _allow_code(parsed)
        return VERBS[parsed.verb](parsed)
    except AzrecipeError as error:
        print_progress(f"azrecipe: {error}" if error.exit_code != EXIT_WRONG_INPUT else str(error))
        return error.exit_code
    except KeyboardInterrupt:
        print_progress("azrecipe: interrupted")
        return EXIT_SIGINT
    except BrokenPipeError:
        return EXIT_FAILED


def _print_traceback(error_class: type[BaseException], error: BaseException, frames: TracebackType | None) -> None:
    """Print a defect's traceback, whose text may hold control characters."""
    print_progress("".join(traceback.format_exception(error_class, error, frames)).rstrip("\n"))


def _run_worker(arguments: list[str]) -> int:
    from azrecipe.cli import run

    parser = option_types.TerminalParser(prog="python -m azrecipe", description="One process of a run.")
    parser.add_argument("recipe", help="a recipe (YAML)")
    _add_recipe_options(parser)
    parsed = parser.parse_args(arguments)
    _allow_code(parsed)
    return run.run_worker_process(parsed)


def _allow_code(parsed: argparse.Namespace) -> None:
    """Tell this process, and those that it starts, about --allow-code."""
    if getattr(parsed, "allow_code", False):
        os.environ[ALLOW_CODE.name] = "1"


def _check_verb(arguments: list[str]) -> list[str]:
    """Return the arguments; exit if they name an unknown verb."""
    if arguments and not arguments[0].startswith("-") and arguments[0] not in VERBS:
        print_progress(f"azrecipe: there is no command '{arguments[0]}'{suggest_choices(arguments[0], VERBS, 'Commands')}")
        raise SystemExit(EXIT_WRONG_INPUT)
    return arguments


def _build_parser() -> argparse.ArgumentParser:
    parser = option_types.TerminalParser(prog="azrecipe", description="Teach a language model a new language by editing YAML.")
    parser.add_argument("--version", action="version", version=f"azrecipe {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="COMMAND")

    run = verbs.add_parser("run", help="run a recipe or a pipeline", description="Run a recipe or a pipeline. Running it again resumes it.")
    run.add_argument("recipe", help="a recipe (YAML)")
    _add_recipe_options(run)
    run.add_argument("--accelerate-config", metavar="NAME", help="a file in accelerate_configs/ by name (ddp, fsdp, …) or a path")
    run.add_argument("--num-processes", type=option_types.parse_positive_int, metavar="N", help="processes to start on this machine")
    run.add_argument("--quiet", action="store_true", help="no table at the end")

    prepare = verbs.add_parser(
        "prepare",
        help="tokenise a pretrain recipe's text into the cache, ahead of its run",
        description="Needs no GPU and no model weights.",
    )
    prepare.add_argument("recipe", help="a pretrain recipe, or a pipeline (YAML)")
    _add_recipe_options(prepare)

    check = verbs.add_parser(
        "check",
        help="find what a run would refuse before it starts, in data, tokenizer, template, model and patterns; preview the data",
        description="Opens what the recipe names and reads its conversations. Needs no GPU and no model weights.",
    )
    check.add_argument("recipe", help="a recipe, or a pipeline (YAML)")
    _add_recipe_options(check)

    validate = verbs.add_parser("validate", help="find every problem of every recipe, without torch and network")
    validate.add_argument("paths", nargs="+", type=Path, metavar="RECIPE", help="recipes, or folders of recipes")
    validate.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key before checking")

    show = verbs.add_parser("show", help="print the resolved recipe, with inheritance, variables and defaults")
    show.add_argument("recipe", help="a recipe (YAML)")
    show.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key")
    show.add_argument("--step", metavar="STEP", help="one step of a pipeline, as the pipeline changes it")
    show.add_argument("--cell", metavar="CELL", help="that step as a cell of the matrix changes it")
    show.add_argument("--json", action="store_true", help="as JSON")

    report = verbs.add_parser(
        "report",
        help="a page of HTML for a run or a pipeline; several are compared",
        description="Writes RUN/report.html for each run, finished or not, and for several also one page that compares them.",
    )
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories: runs/<project>/<recipe or pipeline>")
    report.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="where the page of one run, or that which compares several, goes (default: report.html in the run directory, "
        "comparison.html in the folder that holds all of them)",
    )
    report.add_argument("--force", action="store_true", help="replace a file that is no page of azrecipe")

    copy = verbs.add_parser("copy", help="write the shipped recipes, schemas, accelerate configs and hardware into a folder, to edit")
    copy.add_argument("folder", type=Path, help="where to; existing files are never overwritten")
    inference_options.add_inference_verbs(verbs)
    sagemaker.add_sagemaker_verbs(verbs)
    _add_recipe_options(plan_options.add_plan_verb(verbs))
    return parser


def _add_recipe_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that workers and verbs on recipes share."""
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key; STEP.yaml:KEY=VALUE in a pipeline")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"), metavar="DIR", help="where run directories go (default: runs)")
    parser.add_argument("--step", metavar="STEP", help="only this step of a pipeline")
    parser.add_argument("--cell", metavar="CELL", help="only this cell of a pipeline's matrix, or with --step its step")
    parser.add_argument(
        "--allow-code", action="store_true", help="run functions that the recipe's own task files name: only for those of people you trust"
    )


def _make_verb(function: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    VERBS[function.__name__.lstrip("_")] = function
    return function


@_make_verb
def _run(arguments: argparse.Namespace) -> int:
    from azrecipe.cli import run

    return run.run_recipe(arguments)


@_make_verb
def _prepare(arguments: argparse.Namespace) -> int:
    from azrecipe.cli import check

    return check.prepare_recipes(arguments)


@_make_verb
def _check(arguments: argparse.Namespace) -> int:
    from azrecipe.cli import check

    return check.check_recipes(arguments)


@_make_verb
def _plan(arguments: argparse.Namespace) -> int:
    from azrecipe.cli import plan

    return plan.plan_recipe_or_pipeline(arguments)


@_make_verb
def _validate(arguments: argparse.Namespace) -> int:
    from azrecipe.recipe.overrides import parse_overrides
    from azrecipe.recipe.validate import validate_recipes
    from azrecipe.utils import shipped_files

    report = validate_recipes([shipped_files.resolve_shipped_path(str(path)) for path in arguments.paths], parse_overrides(arguments.set))
    for problem in report.problems:
        print_line(problem)
    if report.problems:
        count = len(report.problems)
        print_progress(f"{count} problem{'s' if count > 1 else ''}, {len(report.valid)} valid")
        return EXIT_WRONG_INPUT
    fragments = f", {len(report.fragments)} fragments through them" if report.fragments else ""
    print_line(f"{len(report.valid)} recipe{'s' if len(report.valid) != 1 else ''} valid{fragments}")
    return EXIT_SUCCESS


@_make_verb
def _show(arguments: argparse.Namespace) -> int:
    from azrecipe.recipe.overrides import parse_overrides
    from azrecipe.recipe.pipeline_steps import open_recipe
    from azrecipe.recipe.to_yaml import to_yaml
    from azrecipe.utils import shipped_files

    if arguments.cell and not arguments.step:
        raise CommandError("--cell shows a step as that cell changes it: add --step STEP")
    recipe = open_recipe(
        shipped_files.resolve_shipped_path(arguments.recipe), parse_overrides(arguments.set), arguments.step, arguments.cell
    )[0]
    print_line(
        json.dumps(recipe.data, indent=2, ensure_ascii=False) if arguments.json else to_yaml(recipe.data),
        end="\n" if arguments.json else "",
    )
    return EXIT_SUCCESS


@_make_verb
def _report(arguments: argparse.Namespace) -> int:
    from azrecipe.report import page

    runs = list({run.resolve(): run for run in arguments.runs}.values())
    for run in runs:
        print_line(page.write_page(run, arguments.output if len(runs) == 1 else None, force=arguments.force))
    if len(runs) > 1:
        print_line(page.write_comparison(runs, arguments.output, force=arguments.force))
    return EXIT_SUCCESS


@_make_verb
def _copy(arguments: argparse.Namespace) -> int:
    from azrecipe.utils import shipped_files

    try:
        num_written, num_kept = shipped_files.copy_shipped_files(arguments.folder)
    except OSError as error:
        raise CannotRun(f"cannot write {error.filename or arguments.folder}: {error.strerror}") from None
    print_line(f"{num_written} files written to {arguments.folder}" + (f", {num_kept} existing kept" if num_kept else ""))
    return EXIT_SUCCESS


@_make_verb
def _generate(arguments: argparse.Namespace) -> int:
    from azrecipe.inference import generate

    return generate.run_generate(arguments)


@_make_verb
def _chat(arguments: argparse.Namespace) -> int:
    from azrecipe.inference import chat

    return chat.run_chat(arguments)


@_make_verb
def _serve(arguments: argparse.Namespace) -> int:
    from azrecipe.inference import serve

    return serve.run_server(arguments)


@_make_verb
def _export(arguments: argparse.Namespace) -> int:
    from azrecipe.publishing import gguf_export

    return gguf_export.export_gguf(arguments)


@_make_verb
def _sagemaker(arguments: argparse.Namespace) -> int:
    return sagemaker.run_sagemaker_verb(arguments)


@_make_verb
def _push(arguments: argparse.Namespace) -> int:
    from azrecipe.publishing import push

    return push.push_model(arguments)
