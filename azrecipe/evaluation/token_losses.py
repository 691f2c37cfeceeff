"""The loss of each token, without the logits of a whole batch.

The head computes the logits of some rows at a time and returns the losses of its labels. So it runs inside the forward of whatever wraps the
model (Accelerate's autocast, FSDP, ZeRO), which has gathered its weights by then.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from azrecipe.errors import CannotRun, is_out_of_memory
from azrecipe.tokenization.encoding import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS_PER_CHUNK = 512  # rows of logits in memory at once
_WHOLE_LOGITS = "_azrecipe_whole_logits"  # set on a model that changes its logits after the head


def compute_token_losses(model: PreTrainedModel, ids: torch.Tensor, labels: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """Compute -ln p of each label, given the tokens before it.

    A model that changes its logits after the head (Gemma 2 caps them, Granite scales them) holds those of the whole batch.

    Args:
        model: The model, wrapped or not. Gradients must be off.
        ids: Token ids, int64 [sequences, length].
        labels: The ids where a token is scored, else IGNORE_INDEX; [sequences, length].
        **inputs: More arguments of the model's forward.

    Returns:
        float64 [sequences, length - 1], on the model's device; 0 where a token is not scored.
    """
    ids, targets = ids.to(model.device), labels[:, 1:].to(model.device)
    inner = _unwrap_model(model)
    head = inner.get_output_embeddings()
    if head is not None and not getattr(inner, _WHOLE_LOGITS, False):
        with _return_losses(head, targets) as losses:
            out: torch.Tensor = model(input_ids=ids, use_cache=False, **inputs).logits
        if losses and out is losses[-1]:
            return losses[-1][:, :-1]
        setattr(inner, _WHOLE_LOGITS, True)
    logits = model(input_ids=ids, use_cache=False, **inputs).logits
    return torch.stack([_score_rows(logits[row, :-1], targets[row], lambda part: part) for row in range(len(targets))])


def _unwrap_model(model: Any) -> Any:
    """Get the model below DeepSpeed's engine and torch.compile's wrapper."""
    inner = getattr(model, "module", model)
    return getattr(inner, "_orig_mod", inner)


@contextlib.contextmanager
def _return_losses(head: Any, targets: torch.Tensor) -> Iterator[list[torch.Tensor]]:
    """Let a head return losses [sequences, length] instead of logits.

    Args:
        head: The module that computes logits.
        targets: The label that follows each token but the last, [sequences, length - 1].

    Yields:
        What the head has returned.
    """
    returned: list[torch.Tensor] = []
    own_forward, forward = vars(head).get("forward"), head.forward
    labels = F.pad(targets, (0, 1), value=IGNORE_INDEX)

    def compute_losses(hidden: torch.Tensor) -> torch.Tensor:
        losses = _score_rows(hidden.flatten(0, -2), labels.flatten(), forward).view(labels.shape)
        returned.append(losses)
        return losses

    head.forward = compute_losses
    try:
        yield returned
    finally:
        if own_forward is None:
            del head.forward
        else:
            head.forward = own_forward


def _score_rows(rows: torch.Tensor, labels: torch.Tensor, compute_logits: Any) -> torch.Tensor:
    """Compute float64 losses [rows], some rows of logits at a time."""
    losses = torch.zeros(len(labels), dtype=torch.float64, device=rows.device)
    scored = (labels != IGNORE_INDEX).nonzero().view(-1)
    for part in scored.split(ROWS_PER_CHUNK):
        losses[part] = F.cross_entropy(compute_logits(rows[part]).float(), labels[part], reduction="none").double()
    return losses


@contextlib.contextmanager
def explain_evaluation_memory(key: str, batch_size: int) -> Iterator[None]:
    """Name the batch size that helps where memory is out while measuring.

    Args:
        key: The recipe's key of the batch size.
        batch_size: Its value.

    Raises:
        CannotRun: Memory is out.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        first_line = (str(error).strip().splitlines() or ["no memory is left"])[0]
        smaller = f"--set {key}={batch_size // 2}" if batch_size > 1 else "data.max_length"
        raise CannotRun(
            f"out of memory while measuring on held-out text: {first_line}\n"
            f"  Lower {key}, which is {batch_size} (results stay the same): {smaller}. "
            "training.per_device_train_batch_size does not help here"
        ) from error
