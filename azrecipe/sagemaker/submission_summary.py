"""A recipe to submit, and its summary for the user."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from azrecipe.planning.estimate_types import RecipeEstimate
from azrecipe.recipe.load import Recipe
from azrecipe.sagemaker import training_job
from azrecipe.sagemaker.account import Account
from azrecipe.sagemaker.jobs import TrainingJob
from azrecipe.sagemaker.s3 import Bucket, MissingFiles
from azrecipe.sagemaker.settings import SageMakerSettings


@dataclass(frozen=True)
class Submission:
    """A recipe to submit.

    Attributes:
        recipe: The recipe.
        spec: What its job is created from.
        plan: The estimate of the job; None where there is none.
        complete: Whether its run is complete in the bucket.
        running_job: The job that is training this run now.
    """

    recipe: Recipe
    spec: training_job.JobSpec
    plan: RecipeEstimate | None
    complete: bool = False
    running_job: TrainingJob | None = field(default=None)


def open_bucket(spec: training_job.JobSpec, account: Account) -> Bucket:
    """Open the bucket of a job."""
    return Bucket(account, spec.settings.bucket, spec.settings.prefix, spec.settings.kms_key_id)


def describe_uploads(submission: Submission, account: Account) -> dict[str, Any]:
    """Describe the files of a job, one by one.

    It counts the missing ones too. Sizes are in bytes.
    """
    bundle = submission.spec.bundle
    files = {name: {"bytes": len(content), "from": bundle.local_sources.get(name)} for name, content in sorted(bundle.source_files.items())}
    missing = (
        open_bucket(submission.spec, account).list_missing(bundle) if account.authenticated else MissingFiles(True, bundle.data_uploads)
    )
    return {
        "code": {"uri": submission.spec.code_uri, "files": files},
        "data": {upload.key: [str(upload.file), upload.size] for upload in bundle.data_uploads},
        "unsearched": bundle.unsearched,
        "archive": len(bundle.archive),
        "to_upload": {"code": missing.code, "data": len(missing.data)},
    }


def describe_submission(submission: Submission, account: Account) -> str:
    """Describe a submission in a few lines."""
    spec, settings = submission.spec, submission.spec.settings
    lines = [
        f"{spec.bundle.run_path}: {settings.instance_count} × {settings.instance_type}{' spot' if settings.enable_managed_spot_training else ''}"
    ]
    if submission.running_job is not None:
        return f"{lines[0]}: {submission.running_job.name} is running already, and is watched"
    lines.append(f"  run directory: {spec.run_uri}")
    lines.append(f"  {format_cost(submission.plan, settings)}")
    files_to_upload = describe_uploads(submission, account)
    note = "" if files_to_upload["to_upload"]["code"] else ", uploaded already"
    lines.append(f"  code: {len(spec.bundle.source_files)} files in {files_to_upload['archive'] / 1e6:.1f} MB{note}: {spec.code_uri}")
    folders: dict[str, list[tuple[str, int]]] = {}
    for key, (file, size) in files_to_upload["data"].items():
        folders.setdefault("/".join(key.split("/")[:2]), []).append((file, size))
    for key, files in folders.items():
        names = _abbreviate([file for file, _ in files])
        lines.append(f"  data: {names} ({sum(size for _, size in files) / 1e6:,.1f} MB) → {spec.root_uri}/{key}/")
    if spec.bundle.unsearched:
        lines.append(f"  not searched for secrets: {_abbreviate(spec.bundle.unsearched)}")
    return "\n".join(lines)


def _abbreviate(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def format_cost(plan: RecipeEstimate | None, settings: SageMakerSettings) -> str:
    """Format hours and price in a line."""
    limit = f"at most {settings.max_runtime_in_seconds / 3600:,.0f} h (max_runtime_in_seconds)"
    if plan is None or plan["hours"] is None:
        return f"hours and price are not known for this recipe on this machine; {limit}"
    hours, price = plan["hours"], plan["price"]["on_demand"]
    text = f"{hours['middle']:,.1f} ({hours['low']:,.1f}–{hours['high']:,.1f}) hours without start and checkpoints, {limit}"
    if price is None:
        return f"{text}; no price is known: set price_per_hour in the settings"
    rate = price["usd_per_hour"]
    source = f"{price['region']}, {price['as_of']}" if price.get("region") else "your price"
    low, middle, high = (hours[key] * rate for key in ("low", "middle", "high"))
    spot = "; spot costs less: AWS says how much when the job has ended" if settings.enable_managed_spot_training else ""
    return f"{text}: {middle:,.0f} ({low:,.0f}–{high:,.0f}) USD on demand at {rate:,.2f} an hour ({source}){spot}"


def format_question(todo: Sequence[Submission]) -> str:
    """Format the question before money is spent."""
    prices = [price for each in todo if each.plan and (price := _compute_price(each.plan)) is not None]
    total = sum(prices)
    jobs_text = f"{len(todo)} job{'s' if len(todo) > 1 else ''}"
    if not prices:
        return f"Submit {jobs_text}, price not known?"
    unknown = len(todo) - len(prices)
    unknown_text = f" and {unknown} whose price is not known" if unknown else ""
    return f"Submit {jobs_text}, about {total:,.0f} USD{unknown_text}?"


def _compute_price(plan: RecipeEstimate) -> float | None:
    """Compute a job's price in USD; None where it is not known."""
    hours, price = plan["hours"], plan["price"]["on_demand"]
    return hours["middle"] * price["usd_per_hour"] if hours and price else None
