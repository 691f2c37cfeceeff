"""`azrecipe push`: a model on the Hugging Face hub. Knows which files go there, and what can go wrong on the way."""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from azrecipe.errors import DONE, CannotRun, CommandError
from azrecipe.publishing import licenses, model_card
from azrecipe.runs import finished_model
from azrecipe.runs.lineage import Lineage
from azrecipe.utils.atomic_files import read_json, write_text
from azrecipe.utils.console import say

# What a model's folder may hold for others to use; anything else in it stays here.
MODEL_FILES = (
    "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*.json", "tokenizer.model", "*.jinja",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "new_tokens.json", "LICENSE*", "USE_POLICY*", "NOTICE*", "Notice*",
)  # fmt: skip
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")

Files = Mapping[str, Path | bytes]  # by their name in the repository: a file here, or its content


def run(arguments: argparse.Namespace) -> int:
    """Write the card, list the files, and upload them in one commit, unless it is a dry run; returns the exit code."""
    _check_id(arguments.repo_id)
    model = finished_model.find(arguments.model)
    if not model.local:
        raise CommandError(f"there is no folder {model.path}: push takes a run, or a folder with a model")
    try:
        line, evaluations = model_card.of(model.run) if model.run else (Lineage([]), [])
        terms = licenses.of_base(line.base)
        allowed = licenses.chosen(arguments.license, terms, line.base)
        about = model_card.About(
            arguments.repo_id,
            allowed,
            arguments.data_license,
            arguments.language or model_card.languages(line),
            finished_model.has_template(model),
        )
        text = model_card.text(line, evaluations, about, terms)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CommandError(f"{model.path}: what its run has left is damaged, or of another version of azrecipe: {error!r}") from None
    written = _card(model, text)
    files = _files(model, terms, written)
    if arguments.adapter:
        files = {**files, **_adapter(model, line)}
    for warning in _warnings(model, about, terms, files):
        say(f"warning: {warning}")
    print(f"card: {written}")
    sizes = {name: len(content) if isinstance(content, bytes) else content.stat().st_size for name, content in files.items()}
    for name, size in {**sizes, "bytes in all": sum(sizes.values())}.items():
        print(f"{size:>15,}  {name}")
    sys.stdout.flush()
    if arguments.dry_run:
        say("dry run: nothing was uploaded. Read the card, change it where you like, and give the same command without --dry-run")
        return DONE
    print(_upload(arguments.repo_id, files, arguments.private))
    return DONE


def _check_id(repo_id: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise CommandError(f"REPO_ID: {str(error).splitlines()[0]}") from None
    if repo_id.count("/") != 1:
        raise CommandError(f"REPO_ID: {repo_id} names no owner: your-name/{repo_id}")


def _card(model: finished_model.Finished, text: str) -> Path:
    """Write the card beside final/, or into the folder of a model that no run here has made. One that was edited is kept as it is."""
    path = (model.run.path if model.run else Path(model.path)) / "README.md"
    if path.exists():
        if path.read_text(encoding="utf-8") != text:
            say(f"{path} differs from what the run would give now, and is taken as it stands. Remove it to have it made anew")
        return path
    try:
        write_text(path, text)
    except OSError as error:
        raise CannotRun(f"{path} cannot be written: {error.strerror}") from None
    return path


def _files(model: finished_model.Finished, terms: licenses.Terms | None, readme: Path) -> dict[str, Path | bytes]:
    """The repository's content. Raises CommandError for a folder that is no whole model."""
    folder = Path(model.path)
    there = sorted(path for path in folder.iterdir() if path.is_file() and path.name != "README.md")
    chosen: dict[str, Path | bytes] = {p.name: p for p in there if any(fnmatch.fnmatchcase(p.name, pattern) for pattern in MODEL_FILES)}
    if not any(name.endswith(".safetensors") for name in chosen):
        raise CommandError(f"{folder} holds no weights as safetensors")
    left = [path.name for path in there if path.name not in chosen]
    if left:
        say(f"not uploaded: {', '.join(left)}")
    if terms is not None and not any(name.lower().startswith("notice") for name in chosen):
        chosen["NOTICE"] = (terms.notice + "\n").encode()
    return {"README.md": readme, **chosen}


def _adapter(model: finished_model.Finished, line: Lineage) -> dict[str, Path | bytes]:
    """The adapter's files. The base that it names is a folder on this machine: named only where it is a model on the hub."""
    folder = model.adapter
    if folder is None:
        raise CommandError(f"--adapter: {model.path} has no adapter/ beside it")
    found: dict[str, Path | bytes] = {f"adapter/{name}": folder / name for name in ADAPTER_FILES}
    config = read_json(folder / "adapter_config.json")
    config["base_model_name_or_path"] = line.hub_base if len(line.steps) == 1 else None
    if config["base_model_name_or_path"] is None:
        say("the adapter belongs on the model before instruction tuning, which is not on the hub: its adapter_config.json names no base")
    found["adapter/adapter_config.json"] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    return found


def _warnings(model: finished_model.Finished, about: model_card.About, terms: licenses.Terms | None, files: Files) -> Iterator[str]:
    if about.license is None:
        yield "no licence is stated: --license ID, by the hub's name for it"
    if not about.languages:
        yield "no language is stated: --language CODE (ISO 639), for example --language az"
    if misnamed := licenses.misnamed(about.repo_id, terms):
        yield misnamed
    if terms is not None and terms.prefix and not any(name.upper().startswith("LICENSE") for name in files):
        yield f"{terms.license} asks for a copy of the agreement with the model (section 1.b.i): put it into {model.path} as LICENSE.txt ({terms.url})"


def _upload(repo_id: str, files: Files, private: bool) -> str:
    """Make the repository where it does not exist, and commit all files at once: it never holds half a model. Returns its address."""
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
    with _reaching(api.endpoint, repo_id, files["README.md"]):
        made = api.create_repo(repo_id, private=private or None, exist_ok=True)
        operations = [CommitOperationAdd(name, content if isinstance(content, bytes) else str(content)) for name, content in files.items()]
        api.create_commit(made.repo_id, operations, commit_message="Upload with azrecipe")
    return str(made)


@contextmanager
def _reaching(endpoint: str, repo_id: str, readme: object) -> Iterator[None]:
    """Turn what the hub's client raises into a message. No text of theirs that could hold a token is passed on."""
    from huggingface_hub import errors

    try:
        yield
    except errors.HfHubHTTPError as error:
        code = error.response.status_code if error.response is not None else 0
        reasons = {
            401: "the token is not valid: `hf auth login` again",
            403: f"the token may not write to {repo_id}: give it the right to, or choose a REPO_ID of your own",
            404: f"there is no {repo_id.split('/')[0]} to make {repo_id} under, or you may not see it",
            413: "the hub takes no file of this size",
            429: "too many requests: try again later",
        }
        told = f": {error.server_message}" if error.server_message else ""
        raise CannotRun(
            f"{endpoint} refused {repo_id} ({code}): {reasons.get(code, 'it gave no reason that azrecipe knows')}{told}"
        ) from None
    except ValueError as error:  # what the hub has against the card
        raise CommandError(f"the card ({readme!s}): {error}") from None
    except (OSError, RuntimeError, errors.HTTPError) as error:  # type: ignore[attr-defined] # of whichever client the hub's library has
        raise CannotRun(
            f"{endpoint} cannot be reached, or the connection broke ({type(error).__name__}). Give the same command again: files that have "
            "arrived are not sent twice"
        ) from None
