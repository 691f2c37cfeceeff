"""The model that an earlier step of a pipeline will make, without weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from azrecipe.modeling import loading
from azrecipe.recipe.stage_outputs import StageOutput
from azrecipe.recipe.types import PretrainModel
from azrecipe.tokenization import bpe_training, chat_templates
from azrecipe.tokenization.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STAND_IN_VOCABULARY = 600  # tokens; more than the bytes and special tokens of any family


@dataclass(frozen=True)
class PlannedModel:
    """A model on the meta device, and a tokenizer with its chat template.

    The tokenizer is the base's: the vocabulary may be another one.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def build_planned_model(output: StageOutput) -> PlannedModel | None:
    """Build the model that a step will make, without its weights.

    Returns None where they do not tell.

    Raises:
        CommandError: The configuration is wrong.
        CannotRun: The hub cannot be reached.
    """
    base, source = output.base_model, output.base_tokenizer
    if source is not None and source.name_or_path is not None:
        tokenizer = load_tokenizer(source.name_or_path, source.revision)
    elif output.has_template is False or output.chat_template is not None:  # a new tokenizer, of a family
        tokenizer = bpe_training.train_llama3(iter(["a b"]), STAND_IN_VOCABULARY)
    else:
        return None
    if output.chat_template is not None:
        chat_templates.set_chat_template(tokenizer, output.chat_template, marks=False)
    if isinstance(base, PretrainModel) and base.config is not None:
        with torch.device("meta"):
            return PlannedModel(loading.build_model(base.config, tokenizer, "float32", "sdpa", 0), tokenizer)
    if base is None or base.name_or_path is None:
        return None
    return PlannedModel(loading.load_meta_model(base.name_or_path, base.revision), tokenizer)
