"""LoRA adapters: which layers and token rows get one, and the adapter folded into plain weights."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from azrecipe.errors import CannotRun, CommandError, did_you_mean
from azrecipe.modeling.loading import WEIGHTS, load_model
from azrecipe.modeling.vocabulary_swap import add_rows
from azrecipe.recipe.types import Lora, Model
from azrecipe.tokenization.tokenizer import rows_needed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def lora_config(lora: Lora, model: PreTrainedModel, new_tokens: Sequence[int] = ()) -> Any:
    """peft.LoraConfig for a model, whose rows of `new_tokens` (ids) train too. Raises CommandError for a target that names no linear layer."""
    from peft import LoraConfig

    problems: list[str] = []
    targets = _targets(lora, model, problems)
    modules = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    for name in lora.modules_to_save:
        if name not in modules:
            problems.append(f"lora.modules_to_save: no module is called '{name}'{did_you_mean(name, modules)}")
    if problems:
        raise CommandError("\n".join(problems))
    matrices, saved = token_matrices(model), {"embed_tokens", "lm_head"} & set(lora.modules_to_save)
    rows = {name: list(new_tokens) for name in matrices if name not in lora.modules_to_save} if new_tokens else {}
    if model.config.tie_word_embeddings and saved:
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
        ensure_weight_tying=bool(saved) and bool(model.config.tie_word_embeddings),
        bias="none",
        task_type="CAUSAL_LM",
    )


def token_matrices(model: PreTrainedModel) -> list[str]:
    """The names of the modules that have a row a token: the input embeddings, and the head where it is not tied to them."""
    wanted = [model.get_input_embeddings()] + ([] if model.config.tie_word_embeddings else [model.get_output_embeddings()])
    return [name.rsplit(".", 1)[-1] for name, module in model.named_modules() if any(module is one for one in wanted)]


def _targets(lora: Lora, model: PreTrainedModel, problems: list[str]) -> str | list[str]:
    """Names of linear layers, all-linear, or regular expressions over their whole names."""
    asked = [lora.target_modules] if isinstance(lora.target_modules, str) else lora.target_modules
    head = model.get_output_embeddings()
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and module is not head]
    known = sorted({name.rsplit(".", 1)[-1] for name in linear})
    if "all-linear" in asked:
        return "all-linear"
    found: list[str] = []
    for target in asked:
        if target in known:
            found.append(target)
            continue
        try:
            matched = [name for name in linear if re.fullmatch(target, name)]
        except re.error as error:
            problems.append(f"lora.target_modules: '{target}' is no layer and no regular expression: {error}")
            continue
        found += matched
        if not matched:
            more = f"\nLinear layers of this model: {', '.join(known)}, or all-linear; a regular expression must match a whole name: {linear[0]}"
            problems.append(f"lora.target_modules: no linear layer is called '{target}'{did_you_mean(target, known)}{more}")
    return list(dict.fromkeys(found))


@dataclass(frozen=True)
class Base:
    """The model that is tuned, as its recipe names it: where it is, and what its vocabulary is made to hold."""

    path: str
    asked: Model
    tokenizer: PreTrainedTokenizerBase

    def load(self, precision: str) -> PreTrainedModel:
        """Its weights in what `precision` keeps them in, with a row for each token of the tokenizer."""
        return self._fitted(load_model(self.path, precision, self.asked.attn_implementation, self.asked.revision))

    def load_quantized(self, precision: str) -> PreTrainedModel:
        """In 4 bits (NF4, double quantisation: Dettmers et al. 2023, arXiv:2305.14314). Raises CannotRun without bitsandbytes."""
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        compute = torch.float32 if precision == "float32" else torch.bfloat16
        how = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
        )
        try:
            return self._fitted(
                AutoModelForCausalLM.from_pretrained(
                    self.path,
                    dtype=compute,
                    quantization_config=how,
                    attn_implementation=self.asked.attn_implementation,
                    revision=self.asked.revision or "main",
                )
            )
        except ImportError as error:
            raise CannotRun(f"adapter: qlora needs bitsandbytes (pip install 'azrecipe[qlora]'): {error}") from None

    def reopened(self, folder: Path, precision: str) -> PreTrainedModel:
        """What became of it, from where it was saved."""
        return load_model(str(folder), precision, self.asked.attn_implementation)

    def _fitted(self, model: PreTrainedModel) -> PreTrainedModel:
        add_rows(model, rows_needed(self.tokenizer))
        return model


def untrained(model: PreTrainedModel, ids: Sequence[int]) -> list[int]:
    """Of these tokens the ones whose rows no training has touched, as far as the rows show: zeros, or the same as another one's."""
    rows = model.get_input_embeddings().weight.detach()[list(ids)].float().cpu()
    alike = (rows[:, None] == rows[None]).all(-1).sum(1) > 1
    return [i for i, row, twin in zip(ids, rows, alike.tolist(), strict=True) if twin or not row.any()]


def merged(base: Base, adapter: Path, precision: str) -> PreTrainedModel:
    """The base model with the adapter added to its weights, an ordinary model; summed in float32 and rounded once to `precision`'s format."""
    from peft import PeftModel

    whole: PreTrainedModel = PeftModel.from_pretrained(base.load("float32"), str(adapter)).merge_and_unload(safe_merge=True)
    for parameter in whole.parameters():  # not the buffers: rotary frequencies stay in float32, as in a model that is opened
        parameter.data = parameter.data.to(WEIGHTS[precision])
    return whole
