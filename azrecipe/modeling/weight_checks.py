"""Check a model's weights: their files, names, shapes and numbers.

transformers fills weights that it does not find with random numbers and only logs it. Here such a model is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from azrecipe.errors import CommandError
from azrecipe.utils.console import print_progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
COMPILED_PREFIX = "_orig_mod."  # torch.compile's, before a weight's name
COMPILED_NAMES = {r"_orig_mod\.": ""}
# Buffers that older versions saved and that newer ones compute
KNOWN_BUFFERS = ("rotary_emb.inv_freq", "position_ids", "attn.bias", "attn.masked_bias", "attention.bias", "attention.masked_bias")
MAX_NAMES = 5  # that a message lists of each kind
MAX_LAYERS = 1_000  # the largest published models have about 130
LAYER_KEYS = ("num_hidden_layers", "n_layer", "num_layers")
LFS_POINTER = b"version https://git-lfs"


def find_weight_files(path: str) -> list[Path]:
    """Find the files with a model's weights.

    They are what transformers reads: the first of WEIGHT_FILES, or the parts that it lists.

    Raises:
        CommandError: There are none, one is missing, or the list of parts cannot be read.
    """
    folder = Path(path)
    first = next((file for name in WEIGHT_FILES if (file := folder / name).is_file()), None)
    if first is None:
        raise CommandError(f"the folder {path} holds a model's configuration and no weights: it has none of {', '.join(WEIGHT_FILES)}")
    if not first.name.endswith("index.json"):
        return [first]
    try:
        shards = sorted(set(json.loads(first.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [folder / str(shard) for shard in shards]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CommandError(f"{first}: not the list of a model's files (weight_map). It is damaged: download it again") from None
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CommandError(f"the folder {path} lacks {len(missing)} of the {len(files)} files of its model: {', '.join(missing[:3])}")
    return files


def read_tensor_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Read names and shapes from the header of a safetensors file.

    Raises:
        CommandError: The file is cut short or damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError) as error:
        with file.open("rb") as content:
            is_pointer = content.read(len(LFS_POINTER)) == LFS_POINTER
        reason = "a Git LFS pointer, not the weights themselves" if is_pointer else f"the file is cut short or damaged ({error})"
        raise CommandError(f"{file}: {reason}: download it again{' with git lfs pull' if is_pointer else ''}") from None


def check_weight_files(path: str, meta_model: PreTrainedModel, *, allow_compiled: bool = True) -> None:
    """Check names and shapes of a folder's weights against the model.

    Only the headers of safetensors files are read. Files of other kinds, and quantised weights, are checked when they are loaded.

    Args:
        path: The folder of the model.
        meta_model: The model that its config.json describes, on the meta device.
        allow_compiled: Whether names may have torch.compile's prefix, which `load_model` leaves out.

    Raises:
        CommandError: Weights are missing, unexpected, of another shape, or in a damaged file.
    """
    files = find_weight_files(path)
    if any(file.suffix != ".safetensors" for file in files) or getattr(meta_model.config, "quantization_config", None) is not None:
        return
    shapes = {name: shape for file in files for name, shape in read_tensor_shapes(file).items()}
    is_compiled = any(COMPILED_PREFIX in name for name in shapes)
    if is_compiled and not allow_compiled:
        raise CommandError(
            f"{path}: the names of its weights have torch.compile's prefix {COMPILED_PREFIX}, with which no other program knows them. "
            "Save the model again without it"
        )
    with quiet_transformers():
        _, report = type(meta_model).from_pretrained(
            None,
            config=meta_model.config,
            state_dict={name: torch.empty(shape, device="meta") for name, shape in shapes.items()},
            device_map={"": "meta"},
            key_mapping=COMPILED_NAMES if is_compiled else None,
            **REPORT_OPTIONS,
        )
    check_loading_report(path, report)


# Options of from_pretrained that give a report instead of a warning
REPORT_OPTIONS: Mapping[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers from printing notices and progress in the block."""
    from transformers.utils import logging

    level, has_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if has_bar:
            logging.enable_progress_bar()


def has_compiled_names(report: Mapping[str, Any]) -> bool:
    """Whether a loading report has unexpected names of a compiled model."""
    return any(COMPILED_PREFIX in name for name in report["unexpected_keys"])


def announce_compiled_names(path: str) -> None:
    """Say that torch.compile's prefix is left out of the names."""
    print_progress(
        f"{path}: the names of its weights have torch.compile's prefix {COMPILED_PREFIX}, which is left out",
        os.environ.get("RANK", "0") == "0",
    )


def check_loading_report(path: str, report: Mapping[str, Any]) -> None:
    """Check what transformers reports of loading a model.

    transformers leaves tied weights out of the report.

    Raises:
        CommandError: Weights are missing, unexpected or of another shape.
    """
    missing = sorted(report["missing_keys"])
    unexpected = sorted(name for name in report["unexpected_keys"] if not name.endswith(KNOWN_BUFFERS))
    mismatched = [
        f"{name} is {list(stored)}, and {list(expected)} by the configuration"
        for name, stored, expected in sorted(report["mismatched_keys"])
    ]
    parts = [("missing", missing), ("not the model's", unexpected), ("of another shape", mismatched)]
    lines = [f"  {kind} ({len(names)}): {_list_names(names)}" for kind, names in parts if names]
    lines += [f"  {message}" for message in report.get("error_msgs", [])]
    if lines:
        raise CommandError("\n".join([f"{path}: its weights do not fit its config.json; missing ones would be random numbers", *lines]))


def check_finite(path: str, model: torch.nn.Module) -> None:
    """Check that no weight is NaN or infinite.

    It takes one pass over the weights.

    Raises:
        CommandError: Some are; the message has their names.
    """
    broken = [name for name, tensor in model.named_parameters() if not is_finite(tensor.detach())]
    if broken:
        raise CommandError(f"{path}: weights that are NaN or infinite ({len(broken)}): {_list_names(broken)}")


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no number of a tensor is NaN or infinite, in one pass."""
    if tensor.is_meta or not tensor.is_floating_point() or not tensor.numel():
        return True
    low, high = torch.aminmax(tensor)  # a NaN anywhere makes both NaN; ten times as fast as isfinite of each number
    return bool(torch.isfinite(low) & torch.isfinite(high))


def check_layer_count(path: str, config: Mapping[str, Any]) -> None:
    """Check that a configuration has no absurd number of layers.

    Building them would take minutes and gigabytes, even without weights.

    Raises:
        CommandError: It has more than MAX_LAYERS.
    """
    text_config = config.get("text_config")
    for values in (config, text_config if isinstance(text_config, Mapping) else {}):
        for key in LAYER_KEYS:
            count = values.get(key)
            if isinstance(count, int | float) and count > MAX_LAYERS:
                raise CommandError(f"{path}: {key} = {count:,} is more than the {MAX_LAYERS:,} layers that are built")


def _list_names(names: Collection[str]) -> str:
    first = list(names)[:MAX_NAMES]
    return ", ".join(first) + (f" and {len(names) - len(first):,} more" if len(names) > len(first) else "")
