"""Exceptions of libraries that are a user's business (a full disk, too little memory), told apart from defects."""

from __future__ import annotations

import errno

from azrecipe.errors import AzrecipeError, CannotRun, RunFailed

_PEER = ("Connection closed by peer", "Connection reset by peer", "remote process exited or there was a network error")
_DISK = ("No space left on device", "PytorchStreamWriter failed", "unexpected pos", "enforce fail at inline_container")


def explain(error: BaseException) -> AzrecipeError | None:
    """The same failure as something a user can be told, or None for a defect, whose traceback is wanted."""
    if isinstance(error, AzrecipeError):
        return error
    text = str(error)
    if (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)) or any(part in text for part in _DISK):
        where = f" ({error.filename})" if isinstance(error, OSError) and error.filename else ""
        return CannotRun(
            f"the disk is full{where}. What was being written is discarded and the last complete checkpoint is kept: free space, then run the same command again"
        )
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator: can't allocate memory" in text:
        return CannotRun(
            f"out of memory: {text.splitlines()[0] if text else 'no more to be had'}\n"
            "  Lower training.per_device_train_batch_size (the global batch and the result stay the same) or data.max_length, "
            "or set training.activation_checkpointing=true"
        )
    if isinstance(error, (PermissionError, NotADirectoryError)) or (isinstance(error, OSError) and error.errno == errno.EROFS):
        return CannotRun(f"{error.filename}: cannot be opened or written: {error.strerror}")
    if any(part in text for part in _PEER):
        return RunFailed("another process of this run ended; its own message says why")
    return None
