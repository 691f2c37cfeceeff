"""`azrecipe sagemaker`: its options, and the output of its verbs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from azrecipe.errors import EXIT_SUCCESS, CommandError
from azrecipe.utils.console import print_line

SETTING_OPTIONS = (  # options that override a key of the settings
    "instance_type", "instance_count", "region", "accelerate_config", "enable_managed_spot_training", "upload_data",
)  # fmt: skip


def add_sagemaker_verbs(verbs: Any) -> None:
    """Add submit, pack, status, logs, stop and fetch to argparse's subparsers."""
    parser = verbs.add_parser("sagemaker", help="a recipe as a SageMaker training job: submit, status, logs, stop, fetch, pack; deploy")
    inner = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    submit = inner.add_parser("submit", help="validate, check, plan, ask, upload what is lacking, and start the job")
    _add_recipe_arguments(submit)
    submit.add_argument(
        "--dry-run", action="store_true", help="print the whole request, what would be uploaded, hours and price; send nothing"
    )
    submit.add_argument("--json", action="store_true", help="with --dry-run: as JSON")
    submit.add_argument("--yes", action="store_true", help="do not ask before money is spent")
    submit.add_argument("--wait", action="store_true", help="show progress until the job has ended; Ctrl-C leaves the job running")
    submit.add_argument("--no-check", dest="check", action="store_false", help="without azrecipe check from this machine")
    submit.add_argument("--no-plan", dest="plan", action="store_false", help="without azrecipe plan: what does not fit is not refused")
    pack = inner.add_parser("pack", help="write the source folder of a job, for an estimator of your own (SDK 2's too)")
    _add_recipe_arguments(pack)
    pack.add_argument("folder", type=Path, help="where to; it must not be there yet")
    status = inner.add_parser("status", help="what a job, or each of the newest, is doing")
    status.add_argument("job", nargs="?", help="its name; without one, azrecipe's newest jobs")
    status.add_argument("--json", action="store_true", help="as JSON")
    logs = inner.add_parser("logs", help="what a job's machines have written")
    logs.add_argument("job", help="its name")
    logs.add_argument("--follow", action="store_true", help="print new lines until the job has ended")
    stop = inner.add_parser("stop", help="stop a job; it saves a checkpoint first, and the same submit resumes from it")
    stop.add_argument("job", help="its name")
    fetch = inner.add_parser("fetch", help="bring a job's run directory here, finished or not, for azrecipe report")
    fetch.add_argument("job", help="its name")
    fetch.add_argument("--runs-dir", type=Path, default=Path("runs"), metavar="DIR", help="where run directories go (default: runs)")
    fetch.add_argument("--checkpoints", action="store_true", help="with its checkpoints")
    deploy = inner.add_parser("deploy", help="serve a finished model from an endpoint (experimental: tested without AWS)")
    deploy.add_argument("run", help="a finished run, or a folder with a model")
    deploy.add_argument(
        "--config", default="sagemaker/sft.yaml", metavar="FILE", help="settings, for role, bucket and region (default: sagemaker/sft.yaml)"
    )
    deploy.add_argument("--instance-type", default="ml.g5.2xlarge", metavar="TYPE", help="the machine (default: ml.g5.2xlarge)")
    deploy.add_argument("--instance-count", type=int, default=1, metavar="N", help="how many of them (default: 1)")
    deploy.add_argument("--name", help="the endpoint's name (default: from the run's and the time)")
    deploy.add_argument("--image", metavar="URI", help="another container than AWS' LMI (DJL Serving with vLLM)")
    deploy.add_argument("--dry-run", action="store_true", help="print the requests, the files and the price; send nothing")
    deploy.add_argument("--json", action="store_true", help="with --dry-run: as JSON")
    deploy.add_argument("--yes", action="store_true", help="do not ask before money is spent")
    delete = inner.add_parser("delete-endpoint", help="delete an endpoint, which stops its cost; the model's files stay in S3")
    delete.add_argument("endpoint", help="its name")
    for verb in (status, logs, stop, fetch, deploy, delete):
        verb.add_argument("--region", help="the AWS region, where it is not your profile's")


def _add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="a recipe, or a pipeline (YAML)")
    parser.add_argument("--config", required=True, metavar="FILE", help="the settings: sagemaker/cpt.yaml, sagemaker/sft.yaml, or your own")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe; STEP.yaml:KEY=VALUE in a pipeline"
    )
    parser.add_argument("--step", metavar="STEP", help="only this step of a pipeline")
    parser.add_argument("--cell", metavar="CELL", help="only this cell of a pipeline's matrix, or with --step its step")
    parser.add_argument("--instance-type", metavar="TYPE", help="other machines than the settings name: ml.p4d.24xlarge")
    parser.add_argument("--instance-count", type=int, metavar="N", help="how many of them")
    parser.add_argument("--spot", action="store_true", default=None, dest="enable_managed_spot_training", help="spot machines")
    parser.add_argument("--upload-data", action="store_true", default=None, help="upload the recipe's local data and models to the bucket")
    parser.add_argument("--accelerate-config", metavar="NAME", help="how the processes share the work: ddp, fsdp, hsdp, zero2, zero3")
    parser.add_argument("--region", help="the AWS region, where it is not your profile's")


def run_sagemaker_verb(arguments: argparse.Namespace) -> int:
    """Run one of the verbs; return the exit code."""
    actions: dict[str, Callable[[argparse.Namespace], int]] = {
        "submit": _submit, "pack": _pack, "status": _status, "logs": _logs,
        "stop": _stop, "fetch": _fetch, "deploy": _deploy,
        "delete-endpoint": _delete_endpoint,
    }  # fmt: skip
    return actions[arguments.action](arguments)


def _collect_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    changes = {key: value for key in SETTING_OPTIONS if (value := getattr(arguments, key)) is not None}
    return {"set": arguments.set, "step": arguments.step, "cell": arguments.cell, **changes}


def _submit(arguments: argparse.Namespace) -> int:
    from azrecipe.sagemaker import submission

    settings = {**_collect_settings(arguments), "check": arguments.check, "plan": arguments.plan}
    if arguments.dry_run:
        requests = submission.build_requests(arguments.recipe, arguments.config, **settings)
        print_line(json.dumps(requests, indent=2) if arguments.json else "\n".join(map(_format_dry_run, requests)))
        return EXIT_SUCCESS
    job = submission.submit(arguments.recipe, arguments.config, yes=arguments.yes, wait=arguments.wait, **settings)
    if job is not None:
        print_line(job.name)
    return EXIT_SUCCESS


def _format_dry_run(request: dict[str, Any]) -> str:
    """Format the answer of a dry run."""
    lines = [f"{request['run']}: the request (CreateTrainingJob)", json.dumps(request["request"], indent=2), "what would be uploaded"]
    code = request["uploads"]["code"]
    for name, file in sorted(code["files"].items(), key=lambda item: not item[0].startswith("azrecipe/")):  # the user's own files last
        source = f" (from {file['from']})" if file["from"] else ""
        lines.append(f"  {file['bytes'] / 1e3:9,.1f} kB  {name}{source}")
    lines += [f"  {size / 1e3:9,.1f} kB  {key} (from {file})" for key, (file, size) in request["uploads"]["data"].items()]
    lines.append(f"  code as one file to {code['uri']}, data one by one; nothing else leaves this machine")
    lines.append(request["cost"])
    if not request["account"]:
        lines.append("no AWS credentials: 000000000000 replaces the account, and role, bucket and quota were not checked")
    lines.append("Nothing was sent.")
    return "\n".join(lines)


def _pack(arguments: argparse.Namespace) -> int:
    from azrecipe.sagemaker import submission

    print_line(submission.write_source(arguments.recipe, arguments.config, arguments.folder, **_collect_settings(arguments)))
    return EXIT_SUCCESS


def _status(arguments: argparse.Namespace) -> int:
    from azrecipe.sagemaker import jobs

    descriptions = jobs.describe_jobs(arguments.job, arguments.region)
    if arguments.json:
        print_line(json.dumps(descriptions, indent=2, default=str))
        return EXIT_SUCCESS
    for job in descriptions:
        trained = "" if job["seconds"] is None else f", {job['seconds'] / 3600:.2f} h trained"
        billed = "" if job["billable_seconds"] is None else f", {job['billable_seconds'] / 3600:.2f} h billed"
        print_line(f"{job['name']}  {job['state']} ({job['doing']})  {job['machines']}{' spot' if job['spot'] else ''}{trained}{billed}")
        for text in (job["message"], job["failure"]):
            if text:
                print_line(f"  {text}")
        if arguments.job:
            print_line(f"  run: {job['run']}")
            print_line("".join(f"  {name}: {value:g}\n" for name, value in job["metrics"].items()), end="")
    if not descriptions:
        print_line("no job of azrecipe's")
    return EXIT_SUCCESS


def _logs(arguments: argparse.Namespace) -> int:
    from azrecipe.sagemaker import jobs

    for line in jobs.read_logs(arguments.job, arguments.follow, arguments.region):
        print_line(line)
    return EXIT_SUCCESS


def _stop(arguments: argparse.Namespace) -> int:
    from azrecipe.sagemaker import jobs

    print_line(f"{arguments.job}: {jobs.stop_job(arguments.job, arguments.region)}")
    return EXIT_SUCCESS


def _fetch(arguments: argparse.Namespace) -> int:
    from azrecipe.sagemaker import jobs

    folder = jobs.fetch_run(arguments.job, arguments.runs_dir, arguments.checkpoints, arguments.region)
    print_line(f"{folder}\nazrecipe report {folder}")
    return EXIT_SUCCESS


def _deploy(arguments: argparse.Namespace) -> int:
    from azrecipe.sagemaker import deployment, submission

    names = ("instance_type", "instance_count", "name", "image", "region")
    options = deployment.DeployOptions(**{name: getattr(arguments, name) for name in names})
    if not arguments.dry_run:
        ask = (lambda _: True) if arguments.yes else submission.ask_on_terminal
        print_line(deployment.deploy(arguments.run, arguments.config, options, ask).name)
        return EXIT_SUCCESS
    plan = deployment.build_deployment(arguments.run, arguments.config, options)
    files: dict[str, dict[str, Any]] = {key: {"from": str(file), "bytes": file.stat().st_size} for key, file in plan.uploads.items()}
    if arguments.json:
        print_line(json.dumps({"endpoint": plan.name, "requests": plan.requests, "uploads": files, "cost": plan.cost}, indent=2))
        return EXIT_SUCCESS
    for action, request in plan.requests.items():
        print_line(f"{action}\n{json.dumps(request, indent=2)}")
    print_line("what would be uploaded")
    for key, file in files.items():
        print_line(f"  {file['bytes'] / 1e3:9,.1f} kB  {key} (from {file['from']})")
    print_line(f"{plan.cost}\nto delete it again: {plan.delete_command}")
    if not plan.authenticated:
        print_line("no AWS credentials: 000000000000 replaces the account, and role and bucket were not checked")
    print_line("Nothing was sent.")
    return EXIT_SUCCESS


def _delete_endpoint(arguments: argparse.Namespace) -> int:
    from azrecipe.sagemaker import deployment

    deleted = deployment.delete_endpoint(arguments.endpoint, arguments.region)
    if not deleted:
        raise CommandError(f"there is no endpoint {arguments.endpoint}, and no configuration and no model of that name")
    print_line(f"{arguments.endpoint}: deleted: {', '.join(deleted)}")
    return EXIT_SUCCESS
