"""Submission of recipes: validate, check, plan, show, confirm, upload, submit.

The steps of a pipeline are submitted one after the other.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from azrecipe import hardware
from azrecipe.errors import AzrecipeError, CannotRun, CommandError, Interrupted, suggest_choices
from azrecipe.operations.check import check_recipes
from azrecipe.operations.isolation import run_isolated_silently
from azrecipe.operations.plan import plan_recipes
from azrecipe.pipeline.preflight import TRAINING_STAGES
from azrecipe.planning.estimate_types import RecipeEstimate
from azrecipe.recipe.load import Recipe
from azrecipe.recipe.overrides import parse_overrides
from azrecipe.recipe.pipeline_steps import find_upstream_references, open_recipe
from azrecipe.runs.run_dir import RunDir, check_recipe_matches, locate_named_run
from azrecipe.sagemaker import account as accounts
from azrecipe.sagemaker import jobs, training_job
from azrecipe.sagemaker.account import Account
from azrecipe.sagemaker.bundle import build_bundle
from azrecipe.sagemaker.jobs import TrainingJob
from azrecipe.sagemaker.s3 import Bucket
from azrecipe.sagemaker.settings import SageMakerSettings, load_settings
from azrecipe.sagemaker.submission_summary import (
    Submission,
    describe_submission,
    describe_uploads,
    format_cost,
    format_question,
    open_bucket,
)
from azrecipe.utils import shipped_files
from azrecipe.utils.console import print_progress

GPU_FAMILIES = ("p", "g")  # first letters of the instance families with NVIDIA GPUs: ml.p4d, ml.g5
UNSUPPORTED_FAMILIES = ("trn", "inf")  # AWS' own chips


@dataclass(frozen=True)
class SubmitOptions:
    """Options of a submission.

    Attributes:
        set: Overrides of the recipe, as `azrecipe run --set` takes them.
        step: The only step of a pipeline to submit.
        cell: The only cell of a matrix to submit.
        check: Whether `azrecipe check` runs on this machine first.
        plan: Whether a job that does not fit its machines is refused.
        wait: Whether to wait for the end of the job.
        yes: Whether to submit without confirmation.
        ask: Confirms the price; False ends the submission. None asks on the terminal.
        runs_dir: The local runs directory.
    """

    set: Sequence[str] = ()
    step: str | None = None
    cell: str | None = None
    check: bool = True
    plan: bool = True
    wait: bool = False
    yes: bool = False
    ask: Callable[[str], bool] | None = None
    runs_dir: Path = Path("runs")


def submit(recipe: str, config: str, **arguments: Any) -> TrainingJob | None:
    """Run a recipe as a SageMaker training job.

    The steps of a pipeline run one after the other: each job reads the runs of earlier ones in S3. Nothing is spent without `yes` or an
    `ask` that agrees. Submitting the same recipe again continues from its checkpoint.

    Args:
        recipe: The path of a recipe or pipeline.
        config: The path of a settings file, such as sagemaker/cpt.yaml.
        **arguments: Fields of SubmitOptions, and keys of the settings file whose values win over the file (instance_type, instance_count,
            enable_managed_spot_training, …).

    Returns:
        The job, of a pipeline the last one; None where all runs are complete already.

    Raises:
        RecipeError, CommandError: The recipe, the settings or the arguments are wrong.
        CannotRun: AWS refuses the job, or a check fails.
    """
    options, changes = _split_arguments(arguments)
    accounts.check_packages_installed()
    settings = load_settings(config, **changes)
    account = accounts.open_account(settings.region)
    settings = accounts.resolve_settings(settings, account)
    submissions = [_prepare_submission(step, settings, account, path=recipe, options=options) for step in _list_recipes(recipe, options)]
    todo = [submission for submission in submissions if not submission.complete]
    _check_order(todo, account)
    if any(submission.running_job is None for submission in todo):
        _check_recipes(recipe, options, [submission.recipe for submission in todo])
    for submission in submissions:
        print_progress(f"{submission.spec.run_uri}: already complete" if submission.complete else describe_submission(submission, account))
    if not todo:
        return None
    new = [submission for submission in todo if submission.running_job is None]
    if new and not options.yes and not (options.ask or ask_on_terminal)(format_question(new)):
        raise Interrupted("nothing was submitted", 130)
    job = None
    for number, submission in enumerate(todo, 1):
        job = submission.running_job or _start_job(submission, account)
        if options.wait or number < len(todo):
            job.wait(print_progress)
    return job


def build_requests(recipe: str, config: str, **arguments: Any) -> list[dict[str, Any]]:
    """Build what `submit` would send, and send nothing.

    Without credentials the account is a placeholder. Arguments and exceptions are those of `submit`.

    Returns:
        For each job its request, uploads, plan and cost.
    """
    options, changes = _split_arguments(arguments)
    accounts.check_packages_installed()
    settings = load_settings(config, **changes)
    account = accounts.open_account(settings.region, dry_run=True)
    settings = accounts.resolve_settings(settings, account)
    answers = []
    for step in _list_recipes(recipe, options):
        submission = _prepare_submission(step, settings, account, path=recipe, options=options)
        answers.append(
            {
                "run": submission.spec.bundle.run_path,
                "request": training_job.dry_run_request(submission.spec, account),
                "uploads": describe_uploads(submission, account),
                "plan": submission.plan,
                "cost": format_cost(submission.plan, submission.spec.settings),
                "account": account.authenticated,
            }
        )
    return answers


def write_source(recipe: str, config: str, folder: Path, **arguments: Any) -> Path:
    """Write a job's source folder, for another estimator.

    The estimator needs entry_point='sagemaker_entry.py' and source_dir=folder.

    Args:
        recipe: The path of a recipe.
        config: The path of a settings file.
        folder: The folder to write; it must not exist, or be empty.
        **arguments: As for `submit`.

    Returns:
        The folder.

    Raises:
        CommandError: The folder is not empty, or the recipe is a pipeline.
    """
    options, changes = _split_arguments(arguments)
    if folder.exists() and any(folder.iterdir()):
        raise CommandError(f"{folder} exists already and is not empty")
    steps = _list_recipes(recipe, options)
    if len(steps) > 1:
        raise CommandError(
            f"{recipe} is a pipeline, and a source folder holds one recipe: use --step with one of {', '.join(s.path.name for s in steps)}"
        )
    build_bundle(steps[0], load_settings(config, **changes).for_step(steps[0].path.name)).write_source_files(folder)
    return folder


def _split_arguments(arguments: dict[str, Any]) -> tuple[SubmitOptions, dict[str, Any]]:
    """Split arguments into the fields of SubmitOptions and keys of the settings."""
    options = {f.name for f in fields(SubmitOptions)}
    settings = {f.name for f in fields(SageMakerSettings)}
    for name in arguments:
        if name not in options | settings:
            raise CommandError(f"there is no option or setting '{name}'{suggest_choices(name, sorted(options | settings), 'Known')}")
    return SubmitOptions(**{k: v for k, v in arguments.items() if k in options}), {k: v for k, v in arguments.items() if k in settings}


def _list_recipes(recipe: str, options: SubmitOptions) -> list[Recipe]:
    first, steps = open_recipe(shipped_files.resolve_shipped_path(recipe), parse_overrides(options.set), options.step, options.cell)
    return [step.recipe for step in steps] if first.stage == "pipeline" else [first]


def _check_order(todo: Sequence[Submission], account: Account) -> None:
    """Check that all input runs are complete or earlier steps. Raises CommandError."""
    problems, earlier = [], set()
    for submission in todo:
        for run in submission.spec.bundle.input_runs.values():
            bucket = open_bucket(submission.spec, account)
            if run.run_path not in earlier and not bucket.is_complete(run.run_path):
                state = bucket.read_status(run.run_path).get("state", "has not been run")
                problems.append(
                    f"{submission.recipe.path} takes from {submission.spec.root_uri}/runs/{run.run_path}, whose run is not complete ({state}): submit it first"
                )
        earlier.add(submission.spec.bundle.run_path)
    if problems:
        raise CommandError("\n".join(problems))


def _check_recipes(recipe: str, options: SubmitOptions, todo: Sequence[Recipe]) -> None:
    """Check the recipes on this machine. Raises CannotRun with the problem."""
    if not options.check:
        return
    if len(todo) == 1 and (
        names := [name for name in _list_upstream(todo[0]) if not locate_named_run(todo[0], options.runs_dir, name).is_complete]
    ):
        print_progress(f"{todo[0].path}: only its file is checked: it takes from {', '.join(names)}, whose run is not on this machine")
        return
    try:
        run_isolated_silently(
            check_recipes,
            recipe=recipe,
            overrides=tuple(options.set),
            runs_dir=Path(options.runs_dir),
            step=options.step,
            cell=options.cell,
        )
    except AzrecipeError as error:
        raise CannotRun(
            f"azrecipe check reports:\n{error}\n  If only this machine has the problem (no network, no access to the data): --no-check"
        ) from None


def _list_upstream(recipe: Recipe) -> list[str]:
    """List the names of the recipes whose runs a recipe reads."""
    return list(dict.fromkeys(Path(output_of).stem for _, output_of in find_upstream_references(recipe.data)))


def _prepare_submission(recipe: Recipe, settings: SageMakerSettings, account: Account, *, path: str, options: SubmitOptions) -> Submission:
    """Check, bundle and plan one recipe.

    Args:
        recipe: The recipe, or a step of the pipeline.
        settings: The settings of all steps.
        account: The account and region.
        path: The file that was submitted.
        options: The options of the submission.
    """
    settings = settings.for_step(recipe.path.name)
    _check_machine(recipe, settings)
    bundle = build_bundle(recipe, settings)
    manifests = {
        channel: f"s3://{settings.bucket}/{settings.prefix}/manifests/{bundle.run_path}/{channel}.json" for channel in bundle.input_runs
    }
    spec = training_job.JobSpec(settings, bundle, manifests)
    complete, running = False, None
    if account.authenticated:
        bucket = open_bucket(spec, account)
        _check_run(spec, bucket)
        complete = bucket.is_complete(bundle.run_path)
        running = None if complete else _find_running_job(spec, account)
    plan = _plan_job(recipe, settings, path, options) if options.plan and not complete and running is None else None
    return Submission(recipe, spec, plan, complete, running)


def _check_machine(recipe: Recipe, settings: SageMakerSettings) -> None:
    """Check that the machines can run the recipe. Raises RecipeError, CommandError."""
    family = settings.instance_type.split(".")[1]
    if family.startswith(UNSUPPORTED_FAMILIES):
        raise CommandError(
            f"instance_type {settings.instance_type}: AWS' own chips are not supported; machines with NVIDIA GPUs are (ml.p4d, ml.p5, ml.g5, ml.g6)"
        )
    if (
        hardware.find_instance_type(settings.instance_type) is not None
        or family.startswith(GPU_FAMILIES)
        or recipe.stage not in TRAINING_STAGES
    ):
        return
    training = recipe.config.training
    if training.precision != "float32":
        message = f"precision: {training.precision} is for GPUs, and {settings.instance_type} has none: use an instance with GPUs, or training.precision: float32"
        raise recipe.error(message, "training", "precision")
    if training.use_liger_kernel:
        raise recipe.error(f"use_liger_kernel: true is for GPUs, and {settings.instance_type} has none", "training", "use_liger_kernel")


def _check_run(spec: training_job.JobSpec, bucket: Bucket) -> None:
    """Check that the run directory in S3 is this recipe's. Raises CommandError."""
    text = bucket.read_object(f"runs/{spec.bundle.run_path}/recipe.yaml")
    if text is None:
        return
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "recipe.yaml").write_bytes(text)
        try:
            check_recipe_matches(spec.bundle.recipe, RunDir(Path(folder), False, Path(folder)))
        except CommandError as error:
            raise CommandError(str(error).replace(folder, spec.run_uri)) from None


def _find_running_job(spec: training_job.JobSpec, account: Account) -> TrainingJob | None:
    """Find the job that is training this run.

    Raises CommandError for a job that is stopping: it still writes its checkpoint.
    """
    for job in jobs.list_jobs(account, spec.base_job_name, "Stopping"):
        if job.run_path == spec.bundle.run_path:
            raise CommandError(
                f"{job.name} trains this run and is stopping: it still writes its checkpoint. Submit again when it has ended"
            )
    running = [job for job in jobs.list_jobs(account, spec.base_job_name, "InProgress") if job.run_path == spec.bundle.run_path]
    return running[0] if running else None


def _plan_job(recipe: Recipe, settings: SageMakerSettings, path: str, options: SubmitOptions) -> RecipeEstimate | None:
    """Estimate a job on its machines.

    Args:
        recipe: The recipe, or a step of the pipeline.
        settings: The settings of that step.
        path: The file that was submitted.
        options: The options of the submission.

    Returns:
        The estimate; None for a stage or a machine that cannot be planned.

    Raises:
        CannotRun: The job does not fit the machines.
    """
    if recipe.stage not in TRAINING_STAGES or hardware.find_instance_type(settings.instance_type) is None:
        return None
    is_step = bool(options.step) or recipe.path.name != Path(path).name
    try:
        report = run_isolated_silently(
            plan_recipes,
            recipe=path,
            hardware=(settings.instance_type,),
            nodes=settings.instance_count,
            overrides=tuple(options.set),
            runs_dir=Path(options.runs_dir),
            step=recipe.path.name if is_step else None,
            cell=recipe.cell.name if recipe.cell is not None else None,
            accelerate_config=settings.accelerate_config or None,
            price_per_hour=settings.price_per_hour or None,
            with_alternatives=False,
        )
        problems = "\n".join(report.problems)
    except AzrecipeError as error:
        problems = str(error)
    if problems:
        raise CannotRun(
            f"azrecipe plan, for {settings.instance_count} × {settings.instance_type}: {problems}\n  To submit it anyway: --no-plan"
        )
    return report.estimates[0][0]


def _start_job(submission: Submission, account: Account) -> TrainingJob:
    """Upload missing files, and create the job."""
    spec, bucket = submission.spec, open_bucket(submission.spec, account)
    for channel, run in spec.bundle.input_runs.items():
        bucket.write_manifest(run.run_path, spec.bundle.run_path, channel)
    count = bucket.upload_missing(spec.bundle)
    print_progress(f"{count} file{'' if count == 1 else 's'} uploaded to {spec.root_uri}")
    request = training_job.send_job(spec, account)
    name = str(request["TrainingJobName"])
    print_progress(f"{name} is submitted: azrecipe sagemaker logs {name} --follow")
    return TrainingJob(name, account, request)


def ask_on_terminal(question: str) -> bool:
    """Ask a question that y answers; raise CommandError without a terminal."""
    if not sys.stdin.isatty():
        raise CommandError(f"{question} There is no terminal to answer on: --yes")
    return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
