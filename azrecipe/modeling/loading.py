"""Models: opened or built, and written so that plain transformers opens them again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from azrecipe.errors import CommandError, RunFailed, allowed, did_you_mean, explain
from azrecipe.modeling import new_tokens
from azrecipe.modeling.dtypes import STORED
from azrecipe.modeling.vocabulary_swap import adopt_special_tokens
from azrecipe.tokenization.tokenizer import rows_needed, save_tokenizer
from azrecipe.utils.atomic_files import whole_folder
from azrecipe.utils.hub_errors import opening

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WEIGHTS = {**STORED, "bfloat16": torch.bfloat16}


def load_model(path: str, precision: str, attn_implementation: str = "sdpa", revision: str | None = None) -> PreTrainedModel:
    """A causal language model from a folder or the hub, its weights in what `precision` keeps them in."""
    from transformers import AutoModelForCausalLM

    with opening("model", path):
        return AutoModelForCausalLM.from_pretrained(
            path, dtype=WEIGHTS[precision], attn_implementation=attn_implementation, revision=revision or "main"
        )


def skeleton(path: str, attn_implementation: str = "sdpa", revision: str | None = None) -> PreTrainedModel:
    """The same without its weights, on PyTorch's meta device: enough to check names and shapes before anything is loaded."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with opening("model", path), torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(path, revision=revision or "main"), attn_implementation=attn_implementation
        )


def unsplittable(net: PreTrainedModel) -> str:
    """Why a model's sequences cannot be split over processes (accelerate's big_modeling, _attach_context_parallel_hooks), or ""."""
    config = net.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or (["sliding_attention"] if getattr(config, "sliding_window", None) else [])
    partial = sorted({kind for kind in kinds if kind != "full_attention"})
    if partial:
        return f"has {', '.join(partial)} layers, which see less than all that precedes"
    if sum(name.rsplit(".", 1)[-1] == "self_attn" for name, _ in net.named_modules()) != config.num_hidden_layers:
        return f"is a {config.model_type}, whose attention Accelerate does not find by its name (self_attn)"
    if getattr(config, "attention_dropout", 0):
        return "has attention_dropout, which PyTorch's ring attention does not take back alike"
    return ""


def embedding_shape(path: str, revision: str | None = None) -> tuple[int, int, int] | None:
    """(rows, width, matrices: 1 where input and output are tied, else 2) by a model's configuration; None where there is none."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path, revision=revision or "main").get_text_config()
        return int(config.vocab_size), int(config.hidden_size), 1 if config.tie_word_embeddings else 2
    except Exception:  # a tokenizer by itself, or beside a model of another kind: what its configuration raises, it alone knows
        return None


def build_model(
    config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, precision: str, attn_implementation: str, seed: int
) -> PreTrainedModel:
    """A new model of a transformers configuration, with the tokenizer's vocabulary. Raises CommandError for a key it lacks."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM

    given = dict(config)
    kind = given.pop("model_type")
    try:
        known = AutoConfig.for_model(kind)
    except ValueError:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        raise CommandError(
            f"model.config.model_type: transformers has no model '{kind}'{did_you_mean(kind, CONFIG_MAPPING.keys())}"
        ) from None
    names = known.to_dict()
    unknown = [key for key in given if key not in names]
    if unknown:
        lines = [f"model.config: a {kind} has no field '{key}'{did_you_mean(key, names)}" for key in unknown]
        raise CommandError("\n".join([*lines, f"Fields: {allowed(names)}"]))
    torch.manual_seed(seed)
    try:
        built = AutoConfig.for_model(
            kind,
            **given,
            vocab_size=rows_needed(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        model = AutoModelForCausalLM.from_config(built, dtype=WEIGHTS[precision], attn_implementation=attn_implementation)
    except (ValueError, TypeError, ArithmeticError, RuntimeError, StrictDataclassError) as error:
        if explain(error) is not None:
            raise
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        raise CommandError(f"model.config: transformers cannot build this {kind}: {reason}") from None
    adopt_special_tokens(model, tokenizer)
    return model


def check_sizes(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """Raise CommandError for a model that lacks rows for its tokenizer's tokens (padding rows beyond them are fine)."""
    rows = model.get_input_embeddings().weight.shape[0]
    needed = rows_needed(tokenizer)
    if needed > rows:
        has = f"has {needed:,} tokens" if needed == len(tokenizer) else f"has ids up to {needed - 1:,}"
        raise CommandError(f"{path}: its tokenizer {has} and its embeddings {rows:,} rows: they do not belong together")


def count(model: torch.nn.Module) -> int:
    """Parameters, a tied matrix counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    state: Mapping[str, torch.Tensor] | None = None,
    new: Sequence[int] = (),
) -> None:
    """Write model and tokenizer into a folder that appears whole or not at all. `state` where the live one is sharded.

    `new`: the ids of the tokens that are new to it.
    """
    with whole_folder(folder) as aside:
        model.save_pretrained(aside, state_dict=state)
        if state is not None:
            _check_saved(aside, state)
        save_tokenizer(tokenizer, aside)
        new_tokens.save(new, aside)


def _check_saved(folder: Path, state: Mapping[str, torch.Tensor]) -> None:
    """Read back the shapes of a model that was gathered from its shards. Raises RunFailed for a weight that is not there whole."""
    from safetensors import safe_open

    found: dict[str, tuple[int, ...]] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            found |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118 - no mapping
    torn = [name for name, tensor in state.items() if found.get(name) != tuple(tensor.shape)]
    if torn:
        raise RunFailed(f"the gathered model was not written whole: {', '.join(torn[:5])}")
