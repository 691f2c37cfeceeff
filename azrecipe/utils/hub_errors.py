"""Messages for errors of opening a model or a tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from azrecipe.errors import CannotRun, CommandError, did_you_mean, get_first_line
from azrecipe.utils.paths import is_local_model


@contextmanager
def translate_hub_errors(kind: str, path: str) -> Iterator[None]:
    """Turn exceptions of from_pretrained into errors for users.

    `kind` is "model" or "tokenizer". Raises CommandError for a wrong folder, CannotRun for a missing package, a licence
    that was not accepted, or a missing network.
    """
    if is_local_model(path) and not Path(path).is_dir():
        parent = Path(path).parent
        near = did_you_mean(Path(path).name, (p.name for p in parent.iterdir())) if parent.is_dir() else ""
        raise CommandError(f"there is no folder {path} to take the {kind} from{near}")
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        yield
    except ImportError as error:  # flash attention, a quantised model
        raise CannotRun(f"the {kind} of {path} needs a package that is not installed: {get_first_line(error)}") from None
    except (OSError, ValueError, KeyError, HfHubHTTPError) as error:
        causes: list[BaseException] = []
        cause: BaseException | None = error
        while cause is not None and cause not in causes:
            causes.append(cause)
            cause = cause.__cause__ or cause.__context__
        if Path(path, "adapter_config.json").is_file():
            raise CommandError(
                f"{path} is an adapter, and no {kind} by itself: the run that made it has the whole model in final/"
            ) from None
        if is_local_model(path) or Path(path).is_dir():  # the final/ of a run has no leading ./
            raise CommandError(f"the folder {path} holds no {kind} that transformers can open: {get_first_line(error)}") from None
        if any(isinstance(e, GatedRepoError) for e in causes):
            raise CannotRun(
                f"{path} is gated: accept its licence at https://huggingface.co/{path}, then run `hf auth login` "
                "(or set HF_TOKEN) and start again"
            ) from None
        if any(isinstance(e, RepositoryNotFoundError) for e in causes):
            raise CannotRun(
                f"the hub has no {path}, or hides it from you: check the name, or run `hf auth login`. A folder is written with a leading ./"
            ) from None
        offline = any(isinstance(e, (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError)) for e in causes)
        reason = "the hub cannot be reached and the local cache does not hold it" if offline else get_first_line(error)
        raise CannotRun(
            f"the {kind} of {path} cannot be opened: {reason}\n"
            f"  With a network: `hf download {path}` first. Without one: a folder, name_or_path: ./my_model"
        ) from None
