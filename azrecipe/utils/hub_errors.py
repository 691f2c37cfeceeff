"""Messages for errors of opening a model or a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from azrecipe.errors import AzrecipeError, CannotRun, CommandError, did_you_mean, explain_error, get_first_line
from azrecipe.utils.paths import is_local_model

CONFIG_FILES = ("config.json", "tokenizer_config.json")


@contextmanager
def translate_hub_errors(kind: str, path: str) -> Iterator[None]:
    """Turn exceptions of from_pretrained into errors for users.

    `kind` is "model", "tokenizer" or "adapter". Raises CommandError for a wrong folder, CannotRun for a missing package, a licence
    that was not accepted, or a missing network.
    """
    if is_local_model(path) and not Path(path).is_dir():
        parent = Path(path).parent
        near = did_you_mean(Path(path).name, (p.name for p in parent.iterdir())) if parent.is_dir() else ""
        raise CommandError(f"there is no folder {path} to take the {kind} from{near}")
    try:
        yield
    except AzrecipeError:
        raise
    except ImportError as error:  # flash attention, a quantised model
        raise CannotRun(f"the {kind} of {path} needs a package that is not installed: {get_first_line(error)}") from None
    except Exception as error:  # a folder may hold anything, and the libraries raise as many kinds of errors
        if explain_error(error) is not None and not isinstance(error, (PermissionError, NotADirectoryError)):  # no memory, no disk
            raise
        if "trust_remote_code" in str(error) or "custom code" in str(error):
            raise CommandError(
                f"the {kind} of {path} comes with code of its own{_name_code_files(path)}, and azrecipe runs no such code. "
                f"Take a {kind} whose class transformers has"
            ) from None
        if is_local_model(path) or Path(path).is_dir():  # the final/ of a run has no leading ./
            raise CommandError(_explain_folder_error(error, kind, path)) from None
        raise CannotRun(_explain_hub_error(error, kind, path)) from None


def _explain_folder_error(error: Exception, kind: str, path: str) -> str:
    if Path(path, "adapter_config.json").is_file() and kind != "adapter":
        return f"{path} is an adapter, and no {kind} by itself: the run that made it has the whole model in final/"
    return f"the folder {path} holds no {kind} that transformers can open: {_describe(error)}"


def _explain_hub_error(error: Exception, kind: str, path: str) -> str:
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, OfflineModeIsEnabled, RepositoryNotFoundError

    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    if any(isinstance(e, GatedRepoError) for e in causes):
        return (
            f"{path} is gated: accept its licence at https://huggingface.co/{path}, then run `hf auth login` "
            "(or set HF_TOKEN) and start again"
        )
    if any(isinstance(e, RepositoryNotFoundError) for e in causes):
        return f"the hub has no {path}, or hides it from you: check the name, or run `hf auth login`. A folder is written with a leading ./"
    if any(type(e).__name__ == "SafetensorError" for e in causes):
        reason = f"a file in the local cache is cut short or damaged ({get_first_line(error)})"
        return f"the {kind} of {path}: {reason}: hf download {path} --force-download"
    offline = any(isinstance(e, (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError)) for e in causes)
    reason = "the hub cannot be reached and the local cache does not hold it" if offline else _describe(error)
    return (
        f"the {kind} of {path} cannot be opened: {reason}\n"
        f"  With a network: `hf download {path}` first. Without one: a folder, name_or_path: ./my_model"
    )


def _describe(error: BaseException) -> str:
    """Return an error's first line, with its class where that says more."""
    line = get_first_line(error)
    return line if isinstance(error, (OSError, ValueError)) or line == type(error).__name__ else f"{type(error).__name__}: {line}"


def _name_code_files(path: str) -> str:
    """Name the files with code that a folder's configuration refers to, or ""."""
    files: dict[str, None] = {}
    for name in CONFIG_FILES:
        try:
            auto_map = json.loads(Path(path, name).read_text(encoding="utf-8"))["auto_map"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        for value in auto_map.values() if isinstance(auto_map, dict) else ():
            classes = value if isinstance(value, list) else [value]
            files.update({f"{each.rpartition('.')[0]}.py, by {name}": None for each in classes if isinstance(each, str)})
    return f" ({'; '.join(files)})" if files else ""
