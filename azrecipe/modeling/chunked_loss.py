"""PyTorch's chunked loss in a model: its head and cross entropy in one, so that the logits of a whole batch are never in memory.

A model's class becomes one derived from it, and its head's likewise, as fully_shard does it too. So the loss is computed
inside the forward of the wrapped model and of its head, where DDP, FSDP and ZeRO expect it and have gathered the weights.
Both classes keep their names: a saved model's configuration is the plain one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import LinearCrossEntropyOptions
from torch.nn.functional import cross_entropy, linear_cross_entropy, pad
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast

from azrecipe.errors import CommandError
from azrecipe.modeling.flops import EXPERTS
from azrecipe.tokenization.encoding import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedModel


ROWS = 512  # of logits at once where no gradient is asked for


class _Head(nn.Linear):
    """A head that gives the sum of a batch's -ln p where it is given labels, and logits where it is not."""

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """[..., width] → logits [..., vocabulary]; with labels [...] already shifted → a float32 scalar, without gradients a float64 one."""
        if labels is None:
            return super().forward(hidden)
        if not torch.is_grad_enabled():  # measured, not trained: the plain loss, to the last bit that float32 logits give
            total = torch.zeros((), dtype=torch.float64, device=hidden.device)
            for part, its in zip(hidden.flatten(0, -2).split(ROWS), labels.flatten().split(ROWS), strict=True):
                total += cross_entropy(super().forward(part).float(), its, ignore_index=IGNORED, reduction="sum")
            return total
        weight: torch.Tensor = self.weight
        bias: torch.Tensor | None = self.bias
        device = hidden.device.type
        if torch.is_autocast_enabled(device):  # the operator is none that autocast knows, and the plain head's is
            dtype = torch.get_autocast_dtype(device)
            hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        # A sum in bfloat16 would be kept in bfloat16, chunk after chunk: there each token's loss is asked for, and added up here
        exact = hidden.dtype == torch.float32
        loss = linear_cross_entropy(
            hidden.flatten(0, -2), weight, labels.flatten(), linear_bias=bias, ignore_index=IGNORED,
            reduction="sum" if exact else "none", options=LinearCrossEntropyOptions(),
        )  # fmt: skip
        return loss if exact else loss.float().sum()


class _Chunked:
    """What a model's class is derived from, beside its own: with labels, the loss alone is computed."""

    def forward(self: Any, *given: Any, labels: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """As the model's own; with labels [batch, length], `loss` as transformers' ForCausalLMLoss gives it, and no logits."""
        if labels is None:
            return super().forward(*given, **kwargs)  # type: ignore[misc]
        count, following = kwargs.pop("num_items_in_batch", None), kwargs.pop("shift_labels", None)
        hidden = self.base_model(*given, **kwargs).last_hidden_state
        if following is None:  # given where a sequence is split over processes: a token's next may be another's
            following = pad(labels, (0, 1), value=IGNORED)[..., 1:].contiguous()
        total = self.get_output_embeddings()(hidden, following)
        count = (following != IGNORED).sum() if count is None else count
        return CausalLMOutputWithPast(loss=total / (count.to(total.device) if torch.is_tensor(count) else count))


def chunk(model: PreTrainedModel) -> None:
    """Compute a model's loss a chunk of the logits at a time from now on. `check` says whether a model can have it.

    To be said again after a change of the vocabulary, which gives the model another head.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, _Head):
        head.__class__ = _derived(_Head, type(head))
    if not isinstance(model, _Chunked):
        model.__class__ = _derived(_Chunked, type(model))


def chunked(model: Any) -> bool:
    """Whether a model's loss is computed so; looks below the wrapping of DeepSpeed and of torch.compile."""
    inner = getattr(model, "module", model)
    return isinstance(getattr(inner, "_orig_mod", inner), _Chunked)


def _derived(first: type, own: type) -> type:
    return type(own.__name__, (first, own), {"__module__": own.__module__, "__qualname__": own.__qualname__})


def check(skeleton: PreTrainedModel) -> None:
    """Raise CommandError for a model that does more with its logits, or before its head, than a matrix product.

    Such a model (Gemma 2 caps its logits, Granite and Cohere scale them) would train on another loss. What it does is seen
    in a run on PyTorch's meta device, which costs nothing: `skeleton` stands there.
    """
    kind = skeleton.config.model_type
    head = skeleton.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise CommandError(f"a {kind}'s head is no plain matrix")
    if skeleton.loss_function is not ForCausalLMLoss:
        raise CommandError(f"a {kind} has a loss of its own")
    if any(getattr(skeleton.config, name, None) for name in EXPERTS):
        raise CommandError(f"a {kind} has experts, whose balancing loss the chunked loss would leave out")
    seen: dict[str, Any] = {}

    def loss(logits: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        seen["logits"] = logits
        return logits.sum()

    hooks = [
        head.register_forward_hook(lambda _module, given, out: seen.update(given=given[0], out=out)),
        skeleton.base_model.register_forward_hook(lambda _module, _given, out: seen.update(hidden=out.last_hidden_state)),
    ]
    before, skeleton.loss_function = skeleton.loss_function, loss
    attention = skeleton.config._attn_implementation
    skeleton.set_attn_implementation("eager")  # runs on any device, with any mask
    tokens = torch.zeros(1, 8, dtype=torch.long, device="meta")
    mask = torch.zeros(1, 1, 8, 8, device="meta")  # given whole, as making one looks at values
    try:
        skeleton.train()(input_ids=tokens, labels=tokens, attention_mask=mask, use_cache=False)
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError) as error:
        raise CommandError(f"what a {kind} does with its logits cannot be seen ({str(error).partition(chr(10))[0]})") from None
    finally:
        skeleton.loss_function = before
        skeleton.set_attn_implementation(attention)
        for hook in hooks:
            hook.remove()
    if "logits" not in seen or seen["logits"] is not seen.get("out"):
        raise CommandError(f"a {kind} scales or caps its logits between head and loss, which the chunked loss would leave out")
    if not _is_view(seen["given"], seen.get("hidden")):
        raise CommandError(f"a {kind} changes the hidden states before its head, which the chunked loss would leave out")


def _is_view(tensor: torch.Tensor, whole: torch.Tensor | None) -> bool:
    """Whether a tensor is another one, or the whole of it by slices that cut nothing off."""
    if whole is None or tensor.shape != whole.shape:
        return False
    node = tensor.grad_fn
    while node is not None and node is not whole.grad_fn and node.name() in ("SliceBackward0", "AliasBackward0", "ViewBackward0"):
        node = node.next_functions[0][0]
    return node is whole.grad_fn
