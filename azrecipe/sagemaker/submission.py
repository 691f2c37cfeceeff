"""Knows the order of a submission: validate, check, plan, show, ask, upload, submit; and for a pipeline one job after another."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from azrecipe import hardware
from azrecipe.errors import CannotRun, CommandError, Interrupted, hint
from azrecipe.recipe.load import Recipe
from azrecipe.recipe.overrides import parse_overrides
from azrecipe.recipe.pipeline_steps import open_recipe, taken
from azrecipe.runs.run_dir import RunDir, check_same_recipe, run_of
from azrecipe.sagemaker import account as accounts
from azrecipe.sagemaker import bundle, jobs, training_job
from azrecipe.sagemaker.account import Account
from azrecipe.sagemaker.jobs import Job
from azrecipe.sagemaker.s3 import Bucket
from azrecipe.sagemaker.settings import Settings, load
from azrecipe.utils import shipped_files

PLANNED = ("pretrain", "sft")
GPU_FAMILIES = ("p", "g")  # ml.p4d, ml.g5: what follows ml. begins so where there are NVIDIA GPUs
OTHER_CHIPS = ("trn", "inf")


@dataclass(frozen=True)
class Options:
    """How a submission goes about it.

    set, step, cell: as `azrecipe run` takes them. check: `azrecipe check` looks at data, tokenizer and model from here first. plan: what does not
    fit is refused. wait: until the job has ended. ask: asked with what is about to be spent; False ends it.
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


@dataclass(frozen=True)
class Submission:
    """One recipe on its way: the job to ask for, what it would cost, and why there is nothing to do, if there is not."""

    recipe: Recipe
    asked: training_job.Asked
    plan: dict[str, Any] | None
    done: bool = False
    running: Job | None = field(default=None)


def submit(recipe: str, config: str, **more: Any) -> Job | None:
    """Run a recipe as a SageMaker training job; returns the job to watch, None where its run is complete already.

    recipe: a path, of a pipeline too: then its steps run one after the other, each as a job that takes what the ones before it left in S3, and
    the last one is returned. config: a settings file (sagemaker/cpt.yaml). more: fields of Options, and keys of the settings file that are to be
    other than there (instance_type, instance_count, enable_managed_spot_training, …). Without `yes` or an `ask` that agrees nothing is spent.
    Submitting the same recipe again goes on from its checkpoint. Raises RecipeError, CommandError, CannotRun.
    """
    options, changes = _sorted(more)
    accounts.needed()
    settings = load(config, **changes)
    where = accounts.account(settings.region)
    settings = accounts.resolved(settings, where)
    found = [_submission(step, settings, where, (recipe, options)) for step in _steps(recipe, options)]
    todo = [each for each in found if not each.done]
    _check_order(todo, where)
    if todo and any(each.running is None for each in todo):
        _check(recipe, options, [each.recipe for each in todo])
    for each in found:
        _say(f"{each.asked.run_uri}: already complete" if each.done else _told(each, where))
    if not todo:
        return None
    new = [each for each in todo if each.running is None]
    if new and not options.yes and not (options.ask or _ask)(_spent(new)):
        raise Interrupted("nothing was submitted", 130)
    job = None
    for nth, each in enumerate(todo, 1):
        job = each.running or _started(each, where)
        if options.wait or nth < len(todo):
            job.wait(_say)
    return job


def requests(recipe: str, config: str, **more: Any) -> list[dict[str, Any]]:
    """What `submit` would send: for each job its request, what it would upload, hours and price. Nothing is sent; without credentials the account is made up."""
    options, changes = _sorted(more)
    accounts.needed()
    settings = load(config, **changes)
    where = accounts.account(settings.region, dry_run=True)
    settings = accounts.resolved(settings, where)
    found = []
    for step in _steps(recipe, options):
        each = _submission(step, settings, where, (recipe, options))
        sent = training_job.seen(each.asked, where)
        found.append({"run": each.asked.parcel.run, "request": sent, "uploads": uploads(each, where), "plan": each.plan,
                      "cost": cost(each.plan, each.asked.settings), "account": where.known})  # fmt: skip
    return found


def write_source(recipe: str, config: str, folder: Path, **more: Any) -> Path:
    """The source folder of a job, for an estimator of your own: entry_point='sagemaker_entry.py', source_dir=folder. Raises CommandError."""
    options, changes = _sorted(more)
    if folder.exists() and any(folder.iterdir()):
        raise CommandError(f"{folder} is there already and not empty")
    steps = _steps(recipe, options)
    if len(steps) > 1:
        raise CommandError(
            f"{recipe} is a pipeline, and a source folder holds one recipe: --step, one of {', '.join(s.path.name for s in steps)}"
        )
    bundle.pack(steps[0], load(config, **changes).of_step(steps[0].path.name)).write(folder)
    return folder


def _sorted(more: dict[str, Any]) -> tuple[Options, dict[str, Any]]:
    """The fields of Options, and the rest, which must be keys of the settings."""
    own = {f.name for f in fields(Options)}
    known = {f.name for f in fields(Settings)}
    for name in more:
        if name not in own | known:
            raise CommandError(f"there is no option or setting '{name}'{hint(name, sorted(own | known), 'Known')}")
    return Options(**{k: v for k, v in more.items() if k in own}), {k: v for k, v in more.items() if k in known}


def _steps(recipe: str, options: Options) -> list[Recipe]:
    one, steps = open_recipe(shipped_files.find(recipe), parse_overrides(options.set), options.step, options.cell)
    return [step.recipe for step in steps] if one.stage == "pipeline" else [one]


def _arguments(recipe: str, options: Options) -> list[str]:
    line = [str(shipped_files.find(recipe)), "--runs-dir", str(options.runs_dir)]
    for text in options.set:
        line += ["--set", text]
    return line


def _check_order(todo: Sequence[Submission], where: Account) -> None:
    """Refuse a run that takes from another which is not complete in the bucket and is no earlier step. Raises CommandError."""
    problems, earlier = [], set()
    for each in todo:
        for _, there in each.asked.parcel.runs.values():
            bucket = _bucket(each.asked, where)
            if there not in earlier and not bucket.complete(there):
                state = bucket.status(there).get("state", "has not been run")
                problems.append(
                    f"{each.recipe.path} takes from {each.asked.root}/runs/{there}, whose run is not complete ({state}): submit it first"
                )
        earlier.add(each.asked.parcel.run)
    if problems:
        raise CommandError("\n".join(problems))


def _check(recipe: str, options: Options, todo: Sequence[Recipe]) -> None:
    """`azrecipe check`, from here: what the job would refuse minutes after it is paid for."""
    if not options.check:
        return
    if len(todo) == 1 and (names := [name for name in _upstream(todo[0]) if not run_of(todo[0], options.runs_dir, name).complete]):
        _say(f"{todo[0].path}: not checked beyond its file: it takes from {', '.join(names)}, whose run is not on this machine")
        return
    line = [sys.executable, "-m", "azrecipe", "check", *_arguments(recipe, options)]
    line += ["--step", options.step] if options.step else []
    line += ["--cell", options.cell] if options.cell else []
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        told = done.stderr.strip() or done.stdout.strip()
        raise CannotRun(
            f"azrecipe check finds:\n{told}\n  Where only this machine cannot look (no network, data out of its reach): --no-check"
        )


def _upstream(recipe: Recipe) -> list[str]:
    """The names of the recipes whose runs one takes from."""
    return list(dict.fromkeys(Path(output_of).stem for _, output_of in taken(recipe.data)))


def _submission(recipe: Recipe, settings: Settings, where: Account, given: tuple[str, Options]) -> Submission:
    path, options = given
    settings = settings.of_step(recipe.path.name)
    _check_machine(recipe, settings)
    packed = bundle.pack(recipe, settings)
    manifests = {channel: f"s3://{settings.bucket}/{settings.prefix}/manifests/{packed.run}/{channel}.json" for channel in packed.runs}
    asked = training_job.Asked(settings, packed, manifests)
    done, running = False, None
    if where.known:
        bucket = _bucket(asked, where)
        _check_run(asked, bucket)
        done = bucket.complete(packed.run)
        running = None if done else _running(asked, where)
    plan = _plan(recipe, settings, path, options) if options.plan and not done and running is None else None
    return Submission(recipe, asked, plan, done, running)


def _bucket(asked: training_job.Asked, where: Account) -> Bucket:
    return Bucket(where, asked.settings.bucket, asked.settings.prefix, asked.settings.kms_key_id)


def _check_machine(recipe: Recipe, settings: Settings) -> None:
    """Refuse machines that cannot run the recipe. Raises RecipeError."""
    family = settings.instance_type.split(".")[1]
    if family.startswith(OTHER_CHIPS):
        raise CommandError(
            f"instance_type {settings.instance_type}: AWS' own chips are not supported; machines with NVIDIA GPUs are (ml.p4d, ml.p5, ml.g5, ml.g6)"
        )
    if hardware.of_instance(settings.instance_type) is not None or family.startswith(GPU_FAMILIES) or recipe.stage not in PLANNED:
        return
    training = recipe.config.training
    if training.precision != "float32":
        what = f"precision: {training.precision} is for GPUs, and {settings.instance_type} has none: an instance with GPUs, or training.precision: float32"
        raise recipe.problem(what, "training", "precision")
    if training.use_liger_kernel:
        raise recipe.problem(f"use_liger_kernel: true is for GPUs, and {settings.instance_type} has none", "training", "use_liger_kernel")


def _check_run(asked: training_job.Asked, bucket: Bucket) -> None:
    """Refuse a recipe whose run directory in S3 holds another recipe's run."""
    there = bucket.read(f"runs/{asked.parcel.run}/recipe.yaml")
    if there is None:
        return
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "recipe.yaml").write_bytes(there)
        try:
            check_same_recipe(asked.parcel.recipe, RunDir(Path(folder), False, Path(folder)))
        except CommandError as error:
            raise CommandError(str(error).replace(folder, asked.run_uri)) from None


def _running(asked: training_job.Asked, where: Account) -> Job | None:
    """The job that this run is in now. Raises CommandError while one is being stopped: it still writes its checkpoint."""
    for job in jobs.listed(where, asked.base_name, "Stopping"):
        if job.run == asked.parcel.run:
            raise CommandError(
                f"{job.name} is at this run and is being stopped: its checkpoint is on its way. Submit again when it has ended"
            )
    same = [job for job in jobs.listed(where, asked.base_name, "InProgress") if job.run == asked.parcel.run]
    return same[0] if same else None


def _plan(recipe: Recipe, settings: Settings, path: str, options: Options) -> dict[str, Any] | None:
    """What `azrecipe plan` says; None where it has nothing to say of such a recipe or machine. Raises CannotRun for what does not fit."""
    if recipe.stage not in PLANNED or hardware.of_instance(settings.instance_type) is None:
        return None
    line = [
        sys.executable,
        "-m",
        "azrecipe",
        "plan",
        *_arguments(path, options),
        "--hardware",
        settings.instance_type,
        "--json",
        "--no-levers",
    ]
    line += ["--nodes", str(settings.instance_count)]
    line += ["--price-per-hour", str(settings.price_per_hour)] if settings.price_per_hour else []
    line += ["--accelerate-config", settings.accelerate_config] if settings.accelerate_config else []
    if options.step or recipe.path.name != Path(path).name:
        line += ["--step", recipe.path.name]
    line += ["--cell", recipe.cell.name] if recipe.cell is not None else []
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CannotRun(
            f"azrecipe plan, for {settings.instance_count} × {settings.instance_type}: {done.stderr.strip()}\n  To submit it all the same: --no-plan"
        )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _started(each: Submission, where: Account) -> Job:
    """Upload what is lacking, and ask for the job."""
    asked, bucket = each.asked, _bucket(each.asked, where)
    for channel, (_, there) in asked.parcel.runs.items():
        bucket.manifest(there, asked.parcel.run, channel)
    count = bucket.bring(asked.parcel)
    _say(f"{count} file{'' if count == 1 else 's'} uploaded to {asked.root}")
    name, sent = training_job.send(asked, where)
    _say(f"{name} is submitted: azrecipe sagemaker logs {name} --follow")
    return Job(name, where, sent)


def uploads(each: Submission, where: Account) -> dict[str, Any]:
    """What goes to S3 with a job: the code by folder, each file of the recipe's own and of data; and how much is there already."""
    packed = each.asked.parcel
    folders: dict[str, list[int]] = {}
    for name, content in packed.code.items():
        folders.setdefault(name.rpartition("/")[0] if not name.startswith("job/") and "/" in name else name, []).append(len(content))
    lacking = _bucket(each.asked, where).lacking(packed) if where.known else (True, packed.data)
    return {
        "code": {"uri": each.asked.code_uri, "files": {name: [len(sizes), sum(sizes)] for name, sizes in sorted(folders.items())}},
        "data": {upload.key: [str(upload.file), upload.size] for upload in packed.data},
        "archive": len(packed.archive),
        "to_upload": {"code": lacking[0], "data": len(lacking[1])},
    }


def _told(each: Submission, where: Account) -> str:
    """A submission in a few lines."""
    settings = each.asked.settings
    lines = [
        f"{each.asked.parcel.run}: {settings.instance_count} × {settings.instance_type}{' spot' if settings.enable_managed_spot_training else ''}"
    ]
    if each.running is not None:
        return f"{lines[0]}: {each.running.name} is running already, and is watched"
    lines.append(f"  run directory: {each.asked.run_uri}")
    lines.append(f"  {cost(each.plan, settings)}")
    found = uploads(each, where)
    there = "" if found["to_upload"]["code"] else ", there already"
    lines.append(f"  code: {len(each.asked.parcel.code)} files in {found['archive'] / 1e6:.1f} MB{there}: {each.asked.code_uri}")
    folders: dict[str, list[tuple[str, int]]] = {}
    for key, (file, size) in found["data"].items():
        folders.setdefault("/".join(key.split("/")[:2]), []).append((file, size))
    for key, files in folders.items():
        names = ", ".join(file for file, _ in files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")
        lines.append(f"  data: {names} ({sum(size for _, size in files) / 1e6:,.1f} MB) → {each.asked.root}/{key}/")
    return "\n".join(lines)


def cost(plan: dict[str, Any] | None, settings: Settings) -> str:
    """Hours and price in a line."""
    most = f"at most {settings.max_runtime_in_seconds / 3600:,.0f} h (max_runtime_in_seconds)"
    if plan is None or plan["hours"] is None:
        return f"hours and price are not known for this recipe on this machine; {most}"
    hours, price = plan["hours"], plan["price"]["on_demand"]
    said = f"{hours['middle']:,.1f} ({hours['low']:,.1f}–{hours['high']:,.1f}) hours without start and checkpoints, {most}"
    if price is None:
        return f"{said}; no price is known: price_per_hour in the settings"
    each = price["usd_per_hour"]
    where = f"{price['region']}, {price['as_of']}" if price.get("region") else "your price"
    low, middle, high = (hours[key] * each for key in ("low", "middle", "high"))
    spot = "; spot costs less, by how much AWS says when the job has ended" if settings.enable_managed_spot_training else ""
    return f"{said}: {middle:,.0f} ({low:,.0f}–{high:,.0f}) USD on demand at {each:,.2f} an hour ({where}){spot}"


def _spent(todo: Sequence[Submission]) -> str:
    known = [each.plan for each in todo if each.plan and each.plan["hours"] and each.plan["price"]["on_demand"]]
    total = sum(plan["hours"]["middle"] * plan["price"]["on_demand"]["usd_per_hour"] for plan in known)
    unknown = len(todo) - len(known)
    more = f" and {unknown} whose price is not known" if unknown and known else ""
    return (
        f"Submit {len(todo)} job{'s' if len(todo) > 1 else ''}, about {total:,.0f} USD{more}?"
        if known
        else f"Submit {len(todo)} job{'s' if len(todo) > 1 else ''}, price not known?"
    )


def _ask(question: str) -> bool:
    if not sys.stdin.isatty():
        raise CommandError(f"{question} Nobody is here to answer: --yes")
    return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
