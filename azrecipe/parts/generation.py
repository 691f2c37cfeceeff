"""What a model writes after a prompt, greedy or sampled with a seed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from azrecipe.recipe.types import Conversation, Generation

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def title(prompt: str | Conversation) -> str:
    """How a report names a prompt."""
    return prompt if isinstance(prompt, str) else prompt.messages[-1].content


def generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str | Conversation, settings: Generation, seed: int
) -> dict[str, Any]:
    """One continuation: {"prompt", "form", "output", "tokens", "ended"}.

    A conversation is rendered with the tokenizer's chat template; a model that has none gets the last message as plain
    text, and `form` says so. `ended` tells whether the model stopped by itself.
    """
    if isinstance(prompt, Conversation) and tokenizer.chat_template is not None:
        messages = [{"role": m.role, "content": m.content} for m in prompt.messages]
        encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        form = "chat"
    else:
        encoded = tokenizer(title(prompt), return_tensors="pt")
        form = "text"
    ids = encoded["input_ids"].to(model.device)
    torch.manual_seed(seed)
    sampled = settings.temperature > 0
    ways: dict[str, Any] = (
        {"do_sample": True, "temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0} if sampled else {"do_sample": False}
    )
    with torch.no_grad():
        whole = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=settings.max_new_tokens,
            repetition_penalty=settings.repetition_penalty,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            **ways,
        )
    new = whole[0, ids.shape[1] :]
    ends = model.generation_config.eos_token_id
    ended = len(new) > 0 and int(new[-1]) in (ends if isinstance(ends, list) else [ends])
    return {
        "prompt": title(prompt),
        "form": form,
        "output": tokenizer.decode(new, skip_special_tokens=True),
        "tokens": len(new),
        "ended": ended,
    }
