"""PyTorch's chunked loss, which never holds a whole batch's logits.

It computes a model's head and cross entropy together. The model's class becomes a subclass of it, and the head's likewise, as
fully_shard does too. So the loss is computed inside the forward of the wrapped model and of its head, where DDP, FSDP and ZeRO
expect it and have gathered the weights. Both classes keep their names: the configuration of a saved model is the plain one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy, pad
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast

from azrecipe.errors import CommandError
from azrecipe.modeling.flops import EXPERT_COUNT_KEYS
from azrecipe.tokenization.encoding import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedModel


ROWS_PER_CHUNK = 512  # rows of logits in memory where no gradient is needed


class _ChunkedLossHead(nn.Linear):
    """A head that returns the summed loss if it gets labels.

    Without labels it returns logits.
    """

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Compute logits, or the sum of -ln p of the labels.

        Args:
            hidden: [..., width].
            labels: [...], already shifted; None for logits.

        Returns:
            Logits [..., vocabulary]. With labels a float32 scalar, or a float64 one where gradients are off.
        """
        if labels is None:
            return super().forward(hidden)
        if not torch.is_grad_enabled():  # evaluation: the plain loss, as exact as float32 logits give it
            total = torch.zeros((), dtype=torch.float64, device=hidden.device)
            for part, part_labels in zip(hidden.flatten(0, -2).split(ROWS_PER_CHUNK), labels.flatten().split(ROWS_PER_CHUNK), strict=True):
                total += cross_entropy(super().forward(part).float(), part_labels, ignore_index=IGNORE_INDEX, reduction="sum")
            return total
        from torch.nn import LinearCrossEntropyOptions  # newer than the oldest torch that runs: see is_available
        from torch.nn.functional import linear_cross_entropy

        weight: torch.Tensor = self.weight
        bias: torch.Tensor | None = self.bias
        device = hidden.device.type
        if torch.is_autocast_enabled(device):  # autocast does not know this operator, but knows the plain head's
            dtype = torch.get_autocast_dtype(device)
            hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        # The operator would sum bfloat16 losses in bfloat16. So it returns each token's loss, and the sum is taken here
        is_float32 = hidden.dtype == torch.float32
        loss = linear_cross_entropy(
            hidden.flatten(0, -2), weight, labels.flatten(), linear_bias=bias, ignore_index=IGNORE_INDEX,
            reduction="sum" if is_float32 else "none", options=LinearCrossEntropyOptions(),
        )  # fmt: skip
        return loss if is_float32 else loss.float().sum()


class _ChunkedLossModel:
    """A base for model classes that computes only the loss from labels."""

    def forward(self: Any, *args: Any, labels: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """Compute the loss of transformers' ForCausalLMLoss without logits.

        With labels [batch, length] the output has `loss` and no logits. Without labels this is the model's own forward.
        """
        if labels is None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        count, shift_labels = kwargs.pop("num_items_in_batch", None), kwargs.pop("shift_labels", None)
        hidden = self.base_model(*args, **kwargs).last_hidden_state
        if shift_labels is None:  # it is passed where a sequence is split over processes: the next token may be on another
            shift_labels = pad(labels, (0, 1), value=IGNORE_INDEX)[..., 1:].contiguous()
        total = self.get_output_embeddings()(hidden, shift_labels)
        count = (shift_labels != IGNORE_INDEX).sum() if count is None else count
        return CausalLMOutputWithPast(loss=total / (count.to(total.device) if torch.is_tensor(count) else count))


def enable_chunked_loss(model: PreTrainedModel) -> None:
    """Switch a model to the chunked loss.

    `check_chunked_loss` tells whether it can. Call this again after a change of the vocabulary, which gives the model another head.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, _ChunkedLossHead):
        head.__class__ = _derive_class(_ChunkedLossHead, type(head))
    if not isinstance(model, _ChunkedLossModel):
        model.__class__ = _derive_class(_ChunkedLossModel, type(model))


def _derive_class(base: type, original: type) -> type:
    """Derive a class that keeps the original's name."""
    return type(original.__name__, (base, original), {"__module__": original.__module__, "__qualname__": original.__qualname__})


def is_available() -> bool:
    """Check whether this torch has the chunked loss."""
    return hasattr(torch.nn.functional, "linear_cross_entropy") and hasattr(nn, "LinearCrossEntropyOptions")


def check_chunked_loss(meta_model: PreTrainedModel) -> None:
    """Check that the chunked loss equals a model's own.

    The head must be a plain matrix and the loss cross entropy. Other models (Gemma 2 caps its logits, Granite and Cohere scale them)
    would train on another loss. A forward pass on PyTorch's meta device, which costs nothing, shows what the model does.

    Args:
        meta_model: The model on the meta device.

    Raises:
        CommandError: The chunked loss would differ from the model's own.
    """
    if not is_available():
        raise CommandError(f"torch {torch.__version__} does not have it: use torch 2.13 or newer, or fused_linear_cross_entropy: liger")
    model_type = meta_model.config.model_type
    head = meta_model.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise CommandError(f"a {model_type}'s head is no plain matrix")
    if meta_model.loss_function is not ForCausalLMLoss:
        raise CommandError(f"a {model_type} has its own loss function")
    if any(getattr(meta_model.config, name, None) for name in EXPERT_COUNT_KEYS):
        raise CommandError(f"a {model_type} has experts, whose balancing loss the chunked loss would leave out")
    tensors: dict[str, Any] = {}

    def loss(logits: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        tensors["logits"] = logits
        return logits.sum()

    hooks = [
        head.register_forward_hook(lambda _module, inputs, output: tensors.update(head_input=inputs[0], head_output=output)),
        meta_model.base_model.register_forward_hook(lambda _module, _inputs, output: tensors.update(hidden=output.last_hidden_state)),
    ]
    original_loss, meta_model.loss_function = meta_model.loss_function, loss
    attention = meta_model.config._attn_implementation
    meta_model.set_attn_implementation("eager")  # runs on any device, with any mask
    tokens = torch.zeros(1, 8, dtype=torch.long, device="meta")
    mask = torch.zeros(1, 1, 8, 8, device="meta")  # passed complete, as building one reads values
    try:
        meta_model.train()(input_ids=tokens, labels=tokens, attention_mask=mask, use_cache=False)
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError) as error:
        raise CommandError(f"the loss of a {model_type} cannot be traced ({str(error).partition(chr(10))[0]})") from None
    finally:
        meta_model.loss_function = original_loss
        meta_model.set_attn_implementation(attention)
        for hook in hooks:
            hook.remove()
    if "logits" not in tensors or tensors["logits"] is not tensors.get("head_output"):
        raise CommandError(f"a {model_type} scales or caps its logits between head and loss, which the chunked loss would leave out")
    if not _is_view(tensors["head_input"], tensors.get("hidden")):
        raise CommandError(f"a {model_type} changes the hidden states before its head, which the chunked loss would leave out")


def _is_view(tensor: torch.Tensor, whole: torch.Tensor | None) -> bool:
    """Tell whether a tensor is `whole`, possibly through slices that cut nothing."""
    if whole is None or tensor.shape != whole.shape:
        return False
    node = tensor.grad_fn
    while node is not None and node is not whole.grad_fn and node.name() in ("SliceBackward0", "AliasBackward0", "ViewBackward0"):
        node = node.next_functions[0][0]
    return node is whole.grad_fn
