"""`azrecipe push`: upload a model and its card to the hub."""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from azrecipe.errors import EXIT_SUCCESS, CannotRun, CommandError
from azrecipe.publishing import licenses, model_card
from azrecipe.runs import finished_model
from azrecipe.runs.lineage import Lineage, find_evaluations, trace_lineage
from azrecipe.utils.atomic_files import read_json, write_text
from azrecipe.utils.console import print_line, print_progress
from azrecipe.utils.secret_scan import WAY_OUT, find_secrets

if TYPE_CHECKING:
    from huggingface_hub import HfApi

# The files of a model's folder that are uploaded.
MODEL_FILES = (
    "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*.json", "tokenizer.model", "*.jinja",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "new_tokens.json", "LICENSE*", "USE_POLICY*", "NOTICE*", "Notice*",
)  # fmt: skip
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")

RepoFiles = Mapping[str, Path | bytes]  # by name in the repository: a local file, or the content


def push_model(arguments: argparse.Namespace) -> int:
    """Write the card, list the files, and upload them in one commit.

    A dry run uploads nothing. Returns the exit code.
    """
    _check_id(arguments.repo_id)
    model = finished_model.resolve_model(arguments.model)
    if not model.is_local:
        raise CommandError(f"there is no folder {model.path}: push takes a run, or a folder with a model")
    try:
        lineage = trace_lineage(model.run) if model.run else Lineage([])
        evaluations = find_evaluations(model.run) if model.run else []
        terms = licenses.find_base_terms(lineage.base)
        settings = model_card.CardSettings(
            arguments.repo_id,
            licenses.choose_license(arguments.license, terms, lineage.base),
            arguments.data_license,
            arguments.language or model_card.list_languages(lineage),
            finished_model.has_chat_template(model),
        )
        text = model_card.render_card(lineage, evaluations, settings, terms)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CommandError(f"{model.path}: the files of its run are damaged, or of another version of azrecipe: {error!r}") from None
    card = _write_card(model, text)
    files = _collect_files(model, terms, card)
    if arguments.adapter:
        files = {**files, **_collect_adapter_files(model, lineage)}
    for warning in _iter_warnings(model, settings, terms, files):
        print_progress(f"warning: {warning}")
    print_line(f"card: {card}")
    sizes = {name: len(content) if isinstance(content, bytes) else content.stat().st_size for name, content in files.items()}
    _check_secrets(card, files)
    for name, size in {**sizes, "bytes in all": sum(sizes.values())}.items():
        print_line(f"{size:>15,}  {name}")
    sys.stdout.flush()
    if arguments.dry_run:
        print_progress(
            "dry run: nothing was uploaded. Read the card, change it where you like, and give the same command without --dry-run"
        )
        return EXIT_SUCCESS
    print_line(_upload(arguments.repo_id, files, arguments.public))
    return EXIT_SUCCESS


def _check_secrets(card: Path, files: RepoFiles) -> None:
    """Check the card and the configurations. Raises CommandError with all places."""
    texts = {name: content for name, content in files.items() if name.endswith((".md", "config.json", ".jinja"))}
    problems = []
    for name, content in texts.items():
        text = content.decode("utf-8", "replace") if isinstance(content, bytes) else content.read_text(encoding="utf-8", errors="replace")
        problems += [
            f"{card if name == 'README.md' else name}:{secret.line}:{secret.column}: looks like a secret ({secret.kind}): remove it; {WAY_OUT}"
            for secret in find_secrets(text)
        ]
    if problems:
        raise CommandError("\n".join(problems))


def _check_id(repo_id: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise CommandError(f"REPO_ID: {str(error).splitlines()[0]}") from None
    if repo_id.count("/") != 1:
        raise CommandError(f"REPO_ID: {repo_id} names no owner: your-name/{repo_id}")


def _write_card(model: finished_model.FinishedModel, text: str) -> Path:
    """Write the card into the run directory, or a model's folder.

    A card that exists is kept.
    """
    path = (model.run.path if model.run else Path(model.path)) / "README.md"
    if path.exists():
        if path.read_text(encoding="utf-8") != text:
            print_progress(f"{path} differs from the card that azrecipe would write now, and is used as it is. Remove it to get a new one")
        return path
    try:
        write_text(path, text)
    except OSError as error:
        raise CannotRun(f"{path} cannot be written: {error.strerror}") from None
    return path


def _collect_files(model: finished_model.FinishedModel, terms: licenses.LicenseTerms | None, card: Path) -> dict[str, Path | bytes]:
    """Collect the files of the repository.

    Raises CommandError for a folder without weights.
    """
    folder = Path(model.path)
    paths = sorted(path for path in folder.iterdir() if path.is_file() and path.name != "README.md")
    files: dict[str, Path | bytes] = {p.name: p for p in paths if any(fnmatch.fnmatchcase(p.name, pattern) for pattern in MODEL_FILES)}
    if not any(name.endswith(".safetensors") for name in files):
        raise CommandError(f"{folder} holds no weights as safetensors")
    excluded = [path.name for path in paths if path.name not in files]
    if excluded:
        print_progress(f"not uploaded: {', '.join(excluded)}")
    if terms is not None and not any(name.lower().startswith("notice") for name in files):
        files["NOTICE"] = (terms.notice + "\n").encode()
    return {"README.md": card, **files}


def _collect_adapter_files(model: finished_model.FinishedModel, lineage: Lineage) -> dict[str, Path | bytes]:
    """Collect the adapter's files.

    Its configuration names a base model on the hub, and no local folder.
    """
    folder = model.adapter
    if folder is None:
        raise CommandError(f"--adapter: {model.path} has no adapter/ next to it")
    files: dict[str, Path | bytes] = {f"adapter/{name}": folder / name for name in ADAPTER_FILES}
    config = read_json(folder / "adapter_config.json")
    config["base_model_name_or_path"] = lineage.hub_base if len(lineage.runs) == 1 else None
    if config["base_model_name_or_path"] is None:
        print_progress(
            "the adapter's base is the model before instruction tuning. It is not on the hub, so adapter_config.json names no base"
        )
    files["adapter/adapter_config.json"] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    return files


def _iter_warnings(
    model: finished_model.FinishedModel, settings: model_card.CardSettings, terms: licenses.LicenseTerms | None, files: RepoFiles
) -> Iterator[str]:
    if settings.license is None:
        yield "no licence is stated: --license ID, by the hub's name for it"
    if not settings.languages:
        yield "no language is stated: --language CODE (ISO 639), for example --language az"
    if name_warning := licenses.check_repo_name(settings.repo_id, terms):
        yield name_warning
    if terms is not None and terms.prefix and not any(name.upper().startswith("LICENSE") for name in files):
        yield f"{terms.license} asks for a copy of the agreement with the model (section 1.b.i): put it into {model.path} as LICENSE.txt ({terms.url})"


def _upload(repo_id: str, files: RepoFiles, public: bool) -> str:
    """Upload all files in one commit; return the repository's address.

    One commit leaves no incomplete model. The repository is created if it does not exist, as private unless `public`. Raises CommandError for
    one that is public already where that is not wanted.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token
    from huggingface_hub.constants import is_offline_mode
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if is_offline_mode():
        raise CannotRun("HF_HUB_OFFLINE is set, so nothing can be uploaded: unset it")
    if get_token() is None:
        raise CannotRun("no token for the hub: run `hf auth login`, or set HF_TOKEN, to one that may write")
    if not sys.stderr.isatty():
        disable_progress_bars()
    api = HfApi(library_name="azrecipe")
    with _translate_hub_errors(api.endpoint, repo_id, files["README.md"]):
        if not public and _is_public(api, repo_id):
            raise CommandError(
                f"{repo_id} is on the hub already, and everyone can see it: add --public to upload there, or choose another REPO_ID"
            )
        repo = api.create_repo(repo_id, private=not public, exist_ok=True)
        operations = [CommitOperationAdd(name, content if isinstance(content, bytes) else str(content)) for name, content in files.items()]
        api.create_commit(repo.repo_id, operations, commit_message="Upload with azrecipe")
    return str(repo)


def _is_public(api: HfApi, repo_id: str) -> bool:
    """Whether a repository is there and everyone can see it."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return api.model_info(repo_id).private is False
    except RepositoryNotFoundError:
        return False


@contextmanager
def _translate_hub_errors(endpoint: str, repo_id: str, card: object) -> Iterator[None]:
    """Translate the errors of the hub's client.

    Texts of the client that could contain a token are left out.
    """
    from huggingface_hub import errors

    try:
        yield
    except errors.HfHubHTTPError as error:
        code = error.response.status_code if error.response is not None else 0
        reasons = {
            401: "the token is not valid: `hf auth login` again",
            403: f"the token may not write to {repo_id}: give it the right to, or choose a REPO_ID of your own",
            404: f"there is no {repo_id.split('/')[0]} to create {repo_id} under, or you may not see it",
            413: "the hub accepts no file of this size",
            429: "too many requests: try again later",
        }
        detail = f": {error.server_message}" if error.server_message else ""
        raise CannotRun(f"{endpoint} refused {repo_id} ({code}): {reasons.get(code, 'for an unknown reason')}{detail}") from None
    except ValueError as error:  # the hub refuses the card's metadata
        raise CommandError(f"the card ({card!s}): {error}") from None
    except (OSError, RuntimeError, errors.HTTPError) as error:  # type: ignore[attr-defined] # depends on the HTTP client
        raise CannotRun(
            f"{endpoint} cannot be reached, or the connection broke ({type(error).__name__}). Give the same command again: files that have "
            "arrived are not sent twice"
        ) from None
