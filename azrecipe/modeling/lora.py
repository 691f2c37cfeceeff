"""LoRA adapters: configure them, and merge them into plain weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from azrecipe.errors import CannotRun, CommandError, did_you_mean
from azrecipe.modeling import weight_checks
from azrecipe.modeling.attention import prepare_attention
from azrecipe.modeling.loading import WEIGHT_DTYPES, load_model, load_weights
from azrecipe.modeling.vocabulary_swap import add_embedding_rows
from azrecipe.recipe.types import Lora, Model
from azrecipe.tokenization.tokenizer import count_embedding_rows
from azrecipe.utils.hub_errors import translate_hub_errors
from azrecipe.utils.output_checksums import check_output_files
from azrecipe.utils.time_limits import match_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def build_lora_config(lora: Lora, model: PreTrainedModel, new_token_ids: Sequence[int] = ()) -> Any:
    """Build the peft.LoraConfig for a model.

    Args:
        lora: The recipe's settings.
        model: The model that gets the adapter.
        new_token_ids: Ids of the tokens whose rows train too.

    Raises:
        CommandError: A target names no linear layer, or `modules_to_save` no module.
    """
    from peft import LoraConfig

    problems: list[str] = []
    targets = _resolve_targets(lora, model, problems)
    modules = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    for name in lora.modules_to_save:
        if name not in modules:
            problems.append(f"lora.modules_to_save: no module is called '{name}'{did_you_mean(name, modules)}")
    if problems:
        raise CommandError("\n".join(problems))
    token_modules, saved_matrices = list_token_modules(model), {"embed_tokens", "lm_head"} & set(lora.modules_to_save)
    rows = {name: list(new_token_ids) for name in token_modules if name not in lora.modules_to_save} if new_token_ids else {}
    if model.config.tie_word_embeddings and saved_matrices:
        rows = {}  # the whole matrix trains
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=targets,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        modules_to_save=list(lora.modules_to_save) or None,
        trainable_token_indices=rows or None,
        ensure_weight_tying=bool(saved_matrices) and bool(model.config.tie_word_embeddings),
        bias="none",
        task_type="CAUSAL_LM",
    )


def list_token_modules(model: PreTrainedModel) -> list[str]:
    """List the modules that have a row for each token.

    They are the input embeddings, and the head where it is not tied to them.
    """
    token_modules = [model.get_input_embeddings()] + ([] if model.config.tie_word_embeddings else [model.get_output_embeddings()])
    return [name.rsplit(".", 1)[-1] for name, module in model.named_modules() if any(module is other for other in token_modules)]


def _resolve_targets(lora: Lora, model: PreTrainedModel, problems: list[str]) -> str | list[str]:
    """Resolve the targets: layer names, all-linear, or regular expressions over full names."""
    names = [lora.target_modules] if isinstance(lora.target_modules, str) else lora.target_modules
    head = model.get_output_embeddings()
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and module is not head]
    layer_names = sorted({name.rsplit(".", 1)[-1] for name in linear})
    if "all-linear" in names:
        return "all-linear"
    targets: list[str] = []
    for target in names:
        if target in layer_names:
            targets.append(target)
            continue
        try:
            matched = match_names(target, linear, is_whole=True)
        except CommandError as error:
            problems.append(f"lora.target_modules: no layer has this name, and {error}")
            continue
        targets += matched
        if not matched:
            details = f"\nLinear layers of this model: {', '.join(layer_names)}, or all-linear; a regular expression must match a whole name: {linear[0]}"
            problems.append(f"lora.target_modules: no linear layer is called '{target}'{did_you_mean(target, layer_names)}{details}")
    return list(dict.fromkeys(targets))


@dataclass(frozen=True)
class BaseModel:
    """The base model of a finetuning run and its tokenizer."""

    path: str
    settings: Model
    tokenizer: PreTrainedTokenizerBase

    def load(self, precision: str) -> PreTrainedModel:
        """Load the weights, with a row for each token.

        `precision` sets the type of the weights.
        """
        return self._add_rows(load_model(self.path, precision, self.settings.attn_implementation, self.settings.revision))

    def load_quantized(self, precision: str) -> PreTrainedModel:
        """Load the weights in 4 bits.

        NF4 with double quantisation (Dettmers et al. 2023, arXiv:2305.14314). Raises CannotRun without bitsandbytes.
        """
        from transformers import BitsAndBytesConfig

        compute_dtype = torch.float32 if precision == "float32" else torch.bfloat16
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute_dtype
        )
        try:
            return self._add_rows(
                load_weights(
                    self.path,
                    self.settings.revision,
                    dtype=compute_dtype,
                    quantization_config=quantization,
                    attn_implementation=prepare_attention(self.settings.attn_implementation),
                )
            )
        except ImportError as error:
            raise CannotRun(f"adapter: qlora needs bitsandbytes (pip install 'azrecipe[qlora]'): {error}") from None

    def load_saved(self, folder: Path, precision: str) -> PreTrainedModel:
        """Load the tuned model from the folder that holds it."""
        return load_model(str(folder), precision, self.settings.attn_implementation)

    def _add_rows(self, model: PreTrainedModel) -> PreTrainedModel:
        add_embedding_rows(model, count_embedding_rows(self.tokenizer))
        return model


def find_untrained_tokens(model: PreTrainedModel, ids: Sequence[int]) -> list[int]:
    """Find the tokens whose embedding rows no training has changed.

    Such a row is all zeros or equals another row of `ids`.
    """
    rows = model.get_input_embeddings().weight.detach()[list(ids)].float().cpu()
    has_twin = (rows[:, None] == rows[None]).all(-1).sum(1) > 1
    return [i for i, row, same in zip(ids, rows, has_twin.tolist(), strict=True) if same or not row.any()]


def merge_adapter(base: BaseModel, adapter: Path, precision: str) -> PreTrainedModel:
    """Merge an adapter into its base model's weights.

    The sum is taken in float32 and rounded once to the type of `precision`.
    """
    model: PreTrainedModel = _attach_adapter(base.load("float32"), adapter)
    for parameter in model.parameters():  # not the buffers: rotary frequencies stay in float32, as after loading
        parameter.data = parameter.data.to(WEIGHT_DTYPES[precision])
    return model


def _attach_adapter(model: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    """Merge an adapter, all of whose weights must be there and be numbers.

    peft leaves an adapter that it does not find at zero, and only warns.

    Raises:
        CommandError: Weights are missing, unexpected, no numbers, or in a damaged file.
    """
    from peft import PeftModel, get_peft_model_state_dict

    file = adapter / "adapter_model.safetensors"
    stored = set(weight_checks.read_tensor_shapes(file)) if file.is_file() else None
    check_output_files(adapter)
    with translate_hub_errors("adapter", str(adapter)):
        tuned = PeftModel.from_pretrained(model, str(adapter))
    if stored is not None:
        expected = set(get_peft_model_state_dict(tuned))
        weight_checks.check_loading_report(
            str(adapter), {"missing_keys": expected - stored, "unexpected_keys": stored - expected, "mismatched_keys": ()}
        )
    weight_checks.check_finite(str(adapter), tuned)
    merged: PreTrainedModel = tuned.merge_and_unload(safe_merge=True)
    return merged
