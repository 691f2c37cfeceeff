"""Write config.json so that transformers 4 computes the same model as transformers 5."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from azrecipe.utils.atomic_files import read_json, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# transformers 4's names where a model family has its own: for all layers, or for (full, sliding) attention.
THETA_KEYS: Mapping[str, str] = {"gpt_neox": "rotary_emb_base", "gpt_neox_japanese": "rotary_emb_base"}
FRACTION_KEYS: Mapping[str, str] = {"gpt_neox": "rotary_pct"}
LAYER_THETA_KEYS: Mapping[str, tuple[str, str]] = {
    "gemma3_text": ("rope_theta", "rope_local_base_freq"),
    "gemma3n_text": ("rope_theta", "rope_local_base_freq"),
}
EQUAL_THETA_FAMILIES = ("olmo3",)  # one theta for both kinds of layers, which is also how transformers 4 stores it
THETA_FIELDS = ("rope_theta", "partial_rotary_factor")  # beside rope_scaling in transformers 4, in rope_parameters in 5


def add_legacy_keys(folder: Path, config: PreTrainedConfig) -> None:
    """Add transformers 4's spelling of a model's settings to its config.json.

    transformers 4 ignores rope_parameters and would compute other rotary frequencies without a word. Keys that transformers 5 would
    read as another model are left out.

    Args:
        folder: The folder of config.json, which transformers 5 wrote.
        config: The configuration, for its class.
    """
    file = folder / "config.json"
    data: dict[str, Any] = read_json(file)
    extended = _extend(data)
    before, after = _parse(config, data), _parse(config, extended)
    if all(after.get(key) == value for key, value in before.items()):
        write_json(file, extended)


def _parse(config: PreTrainedConfig, data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that transformers 5 reads from a configuration file."""
    parsed: dict[str, Any] = type(config).from_dict(copy.deepcopy(dict(data))).to_dict()
    if isinstance(parsed.get("rope_parameters"), dict):
        parsed["rope_parameters"].pop("type", None)  # the old name of rope_type, which stands beside it
    return parsed


def _extend(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration in both spellings, and the configurations within it too."""
    extended = {key: _extend(value) if key.endswith("_config") and isinstance(value, dict) else value for key, value in data.items()}
    if data.get("dtype") is not None:
        extended["torch_dtype"] = data["dtype"]
    return extended | _list_legacy_rope_keys(data)


def _list_legacy_rope_keys(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return transformers 4's keys of a configuration's rotary embeddings."""
    rope_parameters, model_type = data.get("rope_parameters"), str(data.get("model_type"))
    if not rope_parameters:
        return {}
    if not any(isinstance(value, dict) for value in rope_parameters.values()):
        keys = {
            THETA_KEYS.get(model_type, "rope_theta"): rope_parameters.get("rope_theta"),
            "rope_scaling": _read_scaling(rope_parameters, model_type),
        }
        if "partial_rotary_factor" in rope_parameters:
            keys[FRACTION_KEYS.get(model_type, "partial_rotary_factor")] = rope_parameters["partial_rotary_factor"]
        return keys
    full, sliding = (rope_parameters.get(name) or {} for name in ("full_attention", "sliding_attention"))
    if model_type in LAYER_THETA_KEYS:
        thetas = dict(zip(LAYER_THETA_KEYS[model_type], (full.get("rope_theta"), sliding.get("rope_theta")), strict=True))
        return {**thetas, "rope_scaling": _read_scaling(full, model_type)}
    if model_type in EQUAL_THETA_FAMILIES and full.get("rope_theta") == sliding.get("rope_theta"):
        return {"rope_theta": full.get("rope_theta"), "rope_scaling": _read_scaling(full, model_type)}
    return {}


def _read_scaling(rope_parameters: Mapping[str, Any], model_type: str) -> dict[str, Any] | None:
    """Return the rope_scaling of rope_parameters, or None where nothing is scaled."""
    rope_type = rope_parameters.get("rope_type", "default")
    if rope_type == "default":
        return None
    if model_type == "phi3":  # takes these three fields and no other
        return {"type": rope_type, **{name: rope_parameters.get(name) for name in ("short_factor", "long_factor")}}
    return {key: value for key, value in rope_parameters.items() if key not in THETA_FIELDS}
