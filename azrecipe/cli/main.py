"""The command line: each verb is one call. Imports nothing heavy, so that `validate` answers at once."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from azrecipe import __version__
from azrecipe.cli import inference_options, plan_options, sagemaker
from azrecipe.errors import DONE, FAILED, SIGINT, WRONG, AzrecipeError, CannotRun, CommandError, hint

VERBS: dict[str, Callable[[argparse.Namespace], int]] = {}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. A user's mistake ends in a message, never in a traceback."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments and arguments[0].endswith((".yaml", ".yml")):
            return _worker(arguments)  # the form that accelerate launch and torchrun use
        parsed = _parser().parse_args(_spelled(arguments))
        return VERBS[parsed.verb](parsed)
    except AzrecipeError as error:
        print(f"azrecipe: {error}" if error.exit_code != WRONG else str(error), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("azrecipe: interrupted", file=sys.stderr)
        return SIGINT
    except BrokenPipeError:
        return FAILED


def _worker(arguments: list[str]) -> int:
    from azrecipe.cli import run

    parser = argparse.ArgumentParser(prog="python -m azrecipe", description="One process of a run.")
    parser.add_argument("recipe", help="a recipe (YAML)")
    _add_recipe_options(parser)
    return run.work(parser.parse_args(arguments))


def _spelled(arguments: list[str]) -> list[str]:
    """The same arguments; an unknown verb ends the command with the nearest one."""
    if arguments and not arguments[0].startswith("-") and arguments[0] not in VERBS:
        print(f"azrecipe: there is no command '{arguments[0]}'{hint(arguments[0], VERBS, 'Commands')}", file=sys.stderr)
        raise SystemExit(WRONG)
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="azrecipe", description="Teach a language model a new language by editing YAML.")
    parser.add_argument("--version", action="version", version=f"azrecipe {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="COMMAND")

    run = verbs.add_parser("run", help="run a recipe or a pipeline", description="Run a recipe or a pipeline. Running it again resumes it.")
    run.add_argument("recipe", help="a recipe (YAML)")
    _add_recipe_options(run)
    run.add_argument("--accelerate-config", metavar="NAME", help="a file in accelerate_configs/ by name (ddp, fsdp, …) or a path")
    run.add_argument("--num-processes", type=plan_options.positive, metavar="N", help="processes to start on this machine")
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
        help="all that a run refuses before it starts: data, tokenizer, template, model, patterns; shows what the model is shown",
        description="Opens what the recipe names and reads its conversations. Needs no GPU and no model weights.",
    )
    check.add_argument("recipe", help="a recipe, or a pipeline (YAML)")
    _add_recipe_options(check)

    validate = verbs.add_parser("validate", help="every problem of every recipe, no torch, no network")
    validate.add_argument("paths", nargs="+", type=Path, metavar="RECIPE", help="recipes, or folders of recipes")
    validate.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key before checking")

    show = verbs.add_parser("show", help="the resolved recipe: inheritance, variables and defaults put in")
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

    copy = verbs.add_parser("copy", help="write the shipped recipes, schemas, accelerate configs and hardware into a folder, to edit")
    copy.add_argument("folder", type=Path, help="where to; existing files are never overwritten")
    inference_options.add(verbs)
    sagemaker.add(verbs)
    _add_recipe_options(plan_options.add(verbs))
    return parser


def _add_recipe_options(parser: argparse.ArgumentParser) -> None:
    """Options of a worker and of the verbs that take a recipe as it would be run."""
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key; STEP.yaml:KEY=VALUE in a pipeline")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"), metavar="DIR", help="where run directories go (default: runs)")
    parser.add_argument("--step", metavar="STEP", help="only this step of a pipeline")
    parser.add_argument("--cell", metavar="CELL", help="only this cell of a pipeline's matrix, or with --step its step")


def _verb(function: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    VERBS[function.__name__.lstrip("_")] = function
    return function


@_verb
def _run(arguments: argparse.Namespace) -> int:
    from azrecipe.cli import run

    return run.run(arguments)


@_verb
def _prepare(arguments: argparse.Namespace) -> int:
    from azrecipe.cli import check

    return check.prepare(arguments)


@_verb
def _check(arguments: argparse.Namespace) -> int:
    from azrecipe.cli import check

    return check.check(arguments)


@_verb
def _plan(arguments: argparse.Namespace) -> int:
    from azrecipe.cli import plan

    return plan.plan(arguments)


@_verb
def _validate(arguments: argparse.Namespace) -> int:
    from azrecipe.recipe.overrides import parse_overrides
    from azrecipe.recipe.validate import validate
    from azrecipe.utils import shipped_files

    report = validate([shipped_files.find(str(path)) for path in arguments.paths], parse_overrides(arguments.set))
    for problem in report.problems:
        print(problem)
    if report.problems:
        count = len(report.problems)
        print(f"{count} problem{'s' if count > 1 else ''}, {len(report.valid)} valid", file=sys.stderr)
        return WRONG
    through = f", {len(report.fragments)} fragments through them" if report.fragments else ""
    print(f"{len(report.valid)} recipe{'s' if len(report.valid) != 1 else ''} valid{through}")
    return DONE


@_verb
def _show(arguments: argparse.Namespace) -> int:
    from azrecipe.recipe.overrides import parse_overrides
    from azrecipe.recipe.pipeline_steps import open_recipe
    from azrecipe.recipe.to_yaml import to_yaml
    from azrecipe.utils import shipped_files

    if arguments.cell and not arguments.step:
        raise CommandError("--cell shows a step as that cell changes it: say which, --step STEP")
    recipe = open_recipe(shipped_files.find(arguments.recipe), parse_overrides(arguments.set), arguments.step, arguments.cell)[0]
    print(
        json.dumps(recipe.data, indent=2, ensure_ascii=False) if arguments.json else to_yaml(recipe.data),
        end="\n" if arguments.json else "",
    )
    return DONE


@_verb
def _report(arguments: argparse.Namespace) -> int:
    from azrecipe.report import page

    runs = list({run.resolve(): run for run in arguments.runs}.values())
    for run in runs:
        print(page.write(run, arguments.output if len(runs) == 1 else None))
    if len(runs) > 1:
        print(page.compare(runs, arguments.output))
    return DONE


@_verb
def _copy(arguments: argparse.Namespace) -> int:
    from azrecipe.utils import shipped_files

    try:
        written, kept = shipped_files.copy(arguments.folder)
    except OSError as error:
        raise CannotRun(f"cannot write {error.filename or arguments.folder}: {error.strerror}") from None
    print(f"{written} files written to {arguments.folder}" + (f", {kept} that were there left as they are" if kept else ""))
    return DONE


@_verb
def _generate(arguments: argparse.Namespace) -> int:
    from azrecipe.inference import generate

    return generate.run(arguments)


@_verb
def _chat(arguments: argparse.Namespace) -> int:
    from azrecipe.inference import chat

    return chat.run(arguments)


@_verb
def _serve(arguments: argparse.Namespace) -> int:
    from azrecipe.inference import serve

    return serve.run(arguments)


@_verb
def _export(arguments: argparse.Namespace) -> int:
    from azrecipe.publishing import gguf_export

    return gguf_export.run(arguments)


@_verb
def _sagemaker(arguments: argparse.Namespace) -> int:
    return sagemaker.run(arguments)


@_verb
def _push(arguments: argparse.Namespace) -> int:
    from azrecipe.publishing import push

    return push.run(arguments)
