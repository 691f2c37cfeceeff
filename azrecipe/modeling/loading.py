"""Open, build and save models that plain transformers opens again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from azrecipe.errors import CommandError, RunFailed, did_you_mean, explain_error, list_choices
from azrecipe.modeling import attention, config_file, new_tokens, weight_checks
from azrecipe.modeling.dtypes import PARAM_DTYPES
from azrecipe.modeling.vocabulary_swap import adopt_special_tokens
from azrecipe.recipe.attention_kinds import AUTO
from azrecipe.tokenization.tokenizer import count_embedding_rows, save_tokenizer
from azrecipe.utils.atomic_files import atomic_folder
from azrecipe.utils.hub_errors import translate_hub_errors
from azrecipe.utils.output_checksums import check_output_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WEIGHT_DTYPES = {**PARAM_DTYPES, "bfloat16": torch.bfloat16}


class EmbeddingShape(NamedTuple):
    """The size of a model's embeddings."""

    rows: int
    width: int
    matrices: int  # 1 where input and output are tied, else 2


def load_model(path: str, precision: str, attn_implementation: str = AUTO, revision: str | None = None) -> PreTrainedModel:
    """Load a causal language model from a folder or the hub.

    Args:
        path: A folder, or a name on the hub.
        precision: The recipe's precision, which sets the type of the weights.
        attn_implementation: As a recipe names it.
        revision: Of the hub's repository; None for main.

    Raises:
        AzrecipeError: The model cannot be opened, or its weights are not those of its configuration or no numbers.
    """
    return load_weights(
        path, revision, dtype=WEIGHT_DTYPES[precision], attn_implementation=attention.prepare_attention(attn_implementation)
    )


def load_weights(path: str, revision: str | None, **options: Any) -> PreTrainedModel:
    """Load a model with options of from_pretrained, and check its weights.

    Every model that azrecipe computes with comes from here. Code that comes with a model is never run.

    Args:
        path: A folder, or a name on the hub.
        revision: Of the hub's repository; None for main.
        options: Other options of from_pretrained.

    Raises:
        AzrecipeError: As for `load_model`.
    """
    from transformers import AutoModelForCausalLM

    check_output_files(path)
    options = {**options, **weight_checks.REPORT_OPTIONS, "revision": revision or "main", "trust_remote_code": False}
    with translate_hub_errors("model", path):
        if Path(path).is_dir():
            weight_checks.check_weight_files(path, _build_meta_model(path, None))
        model, report = AutoModelForCausalLM.from_pretrained(path, **options)
        if weight_checks.has_compiled_names(report):
            weight_checks.announce_compiled_names(path)
            model, report = AutoModelForCausalLM.from_pretrained(path, key_mapping=weight_checks.COMPILED_NAMES, **options)
    weight_checks.check_loading_report(path, report)
    weight_checks.check_finite(path, model)
    return model


def load_meta_model(path: str, revision: str | None = None) -> PreTrainedModel:
    """Load a model without weights, on PyTorch's meta device.

    It is enough to check names and shapes before weights are loaded. Its attention is what transformers takes by itself.
    The weights of a folder are checked by their names and shapes.

    Raises:
        AzrecipeError: The model cannot be opened, or its weights are not those of its configuration.
    """
    with translate_hub_errors("model", path):
        model = _build_meta_model(path, revision)
        if Path(path).is_dir():
            weight_checks.check_weight_files(path, model)
        return model


def check_weight_files(path: str) -> None:
    """Check a folder's configuration, and its weights by name and shape.

    For programs that read the folder themselves. They would not know torch.compile's names.

    Raises:
        AzrecipeError: The model cannot be opened, or its weights are not those of its configuration.
    """
    with translate_hub_errors("model", path):
        weight_checks.check_weight_files(path, _build_meta_model(path, None), allow_compiled=False)


def _build_meta_model(path: str, revision: str | None) -> PreTrainedModel:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        config = AutoConfig.from_pretrained(path, revision=revision or "main", trust_remote_code=False)
        weight_checks.check_layer_count(path, config.to_dict())
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def find_context_parallel_obstacle(model: PreTrainedModel) -> str:
    """Say why a model's sequences cannot be split over processes, or "".

    The conditions are Accelerate's (big_modeling, _attach_context_parallel_hooks).
    """
    config = model.config.get_text_config()
    layer_types = getattr(config, "layer_types", None) or (["sliding_attention"] if getattr(config, "sliding_window", None) else [])
    partial_types = sorted({layer_type for layer_type in layer_types if layer_type != "full_attention"})
    if partial_types:
        return f"has {', '.join(partial_types)} layers, which do not attend to all earlier tokens"
    if sum(name.rsplit(".", 1)[-1] == "self_attn" for name, _ in model.named_modules()) != config.num_hidden_layers:
        return f"is a {config.model_type}, whose attention Accelerate does not find by its name (self_attn)"
    if getattr(config, "attention_dropout", 0):
        return "has attention_dropout, whose mask PyTorch's ring attention does not repeat in the backward pass"
    return ""


def read_embedding_shape(path: str, revision: str | None = None) -> EmbeddingShape | None:
    """Read the shape of a model's embeddings from its configuration.

    Returns None where the folder holds a tokenizer alone, or a model of another kind.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path, revision=revision or "main", trust_remote_code=False).get_text_config()
        return EmbeddingShape(int(config.vocab_size), int(config.hidden_size), 1 if config.tie_word_embeddings else 2)
    except Exception:  # no configuration, or one of another kind of model, which may raise anything
        return None


def build_model(
    config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, precision: str, attn_implementation: str, seed: int
) -> PreTrainedModel:
    """Build a new model from a transformers configuration and a tokenizer's vocabulary.

    Args:
        config: The fields of the configuration, `model_type` among them.
        tokenizer: It gives the size of the vocabulary and the special tokens.
        precision: The recipe's precision, which sets the type of the weights.
        attn_implementation: As a recipe names it.
        seed: Of the random weights.

    Raises:
        CommandError: The configuration lacks a field that is named, or transformers refuses it.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM

    attention_name = attention.prepare_attention(attn_implementation)
    fields = dict(config)
    model_type = fields.pop("model_type")
    try:
        default_config = AutoConfig.for_model(model_type)
    except ValueError:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        raise CommandError(
            f"model.config.model_type: transformers has no model '{model_type}'{did_you_mean(model_type, CONFIG_MAPPING.keys())}"
        ) from None
    default_fields = default_config.to_dict()
    unknown = [key for key in fields if key not in default_fields]
    if unknown:
        lines = [f"model.config: a {model_type} has no field '{key}'{did_you_mean(key, default_fields)}" for key in unknown]
        raise CommandError("\n".join([*lines, f"Fields: {list_choices(default_fields)}"]))
    weight_checks.check_layer_count("model.config", fields)
    torch.manual_seed(seed)
    try:
        model_config = AutoConfig.for_model(
            model_type,
            **fields,
            vocab_size=count_embedding_rows(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        model = AutoModelForCausalLM.from_config(model_config, dtype=WEIGHT_DTYPES[precision], attn_implementation=attention_name)
    except (ValueError, TypeError, ArithmeticError, RuntimeError, StrictDataclassError) as error:
        if explain_error(error) is not None:
            raise
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        raise CommandError(f"model.config: transformers cannot build this {model_type}: {reason}") from None
    adopt_special_tokens(model, tokenizer)
    return model


def check_vocabulary_size(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """Check that a model has a row for each token.

    Rows beyond the tokens are padding. Raises CommandError where the model has too few.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    needed = count_embedding_rows(tokenizer)
    if needed > rows:
        size = f"has {needed:,} tokens" if needed == len(tokenizer) else f"has ids up to {needed - 1:,}"
        raise CommandError(f"{path}: its tokenizer {size} and its embeddings {rows:,} rows: they do not belong together")


def count_parameters(model: torch.nn.Module) -> int:
    """Count a model's parameters, a tied matrix once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_trainable_bytes(model: torch.nn.Module) -> int:
    """Count the bytes of the parameters that train, a tied matrix once."""
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    new_token_ids: Sequence[int] = (),
) -> None:
    """Write a model and its tokenizer into a folder, atomically.

    Args:
        model: The model whose configuration is written.
        tokenizer: Its tokenizer.
        folder: It appears complete or not at all.
        state_dict: The gathered weights, where the live ones are sharded.
        new_token_ids: Ids of the tokens that the base model's vocabulary lacks.

    Raises:
        RunFailed: A gathered weight was written incompletely.
    """
    with atomic_folder(folder) as partial_folder:
        model.save_pretrained(partial_folder, state_dict=state_dict)
        config_file.add_legacy_keys(partial_folder, model.config)
        if state_dict is not None:
            _check_saved(partial_folder, state_dict)
        save_tokenizer(tokenizer, partial_folder)
        new_tokens.save_new_tokens(new_token_ids, partial_folder)


def _check_saved(folder: Path, state: Mapping[str, torch.Tensor]) -> None:
    """Check the shapes of a gathered model that was written.

    Raises RunFailed for a weight that is missing or incomplete.
    """
    from safetensors import safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118 - no mapping
    incomplete = [name for name, tensor in state.items() if shapes.get(name) != tuple(tensor.shape)]
    if incomplete:
        raise RunFailed(f"the gathered model was not written completely: {', '.join(incomplete[:5])}")
