"""The weights of a model's folder, read one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from azrecipe.errors import CommandError
from azrecipe.modeling.weight_checks import KNOWN_BUFFERS, find_weight_files, is_finite, read_tensor_shapes
from azrecipe.utils.output_checksums import check_output_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class WeightFiles:
    """A folder's tensors by name, read when they are used.

    `aliases` names, for a weight that a file leaves out because it is tied, the one that stands for it.
    """

    folder: str
    files: dict[str, Path]
    aliases: dict[str, str]

    def read(self, name: str) -> torch.Tensor:
        """Read a tensor. Raises CommandError where numbers of it are NaN or infinite."""
        from safetensors import safe_open

        name = name if name in self.files else self.aliases[name]
        with safe_open(self.files[name], "pt") as tensors:
            tensor: torch.Tensor = tensors.get_tensor(name)
        if not is_finite(tensor):
            raise CommandError(f"{self.folder}: {name} has numbers that are NaN or infinite")
        return tensor


def open_weight_files(folder: str, model: PreTrainedModel) -> WeightFiles | None:
    """Find each weight of a model in its folder.

    Args:
        folder: The folder.
        model: The model that its config.json describes, on the meta device.

    Returns:
        None where the files are no safetensors files, or where they store the weights under other names or in another form.

    Raises:
        CannotRun: A file of a run's final/ was damaged.
    """
    check_output_files(folder)
    paths = find_weight_files(folder)
    if any(path.suffix != ".safetensors" for path in paths) or getattr(model.config, "quantization_config", None) is not None:
        return None
    files = {name: path for path in paths for name in read_tensor_shapes(path)}
    names = list_weight_names(model)
    aliases = _find_aliases(model, files)
    present = {name for name in files if not name.endswith(KNOWN_BUFFERS)}
    if present - names or any(name not in files and name not in aliases for name in names):
        return None
    return WeightFiles(folder, {name: files[name] for name in files if name in names}, aliases)


def list_weight_names(model: PreTrainedModel) -> set[str]:
    """List the names of a model's weights and stored buffers."""
    return set(model.state_dict())


def _find_aliases(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, str]:
    """Map each tied weight that is not stored to the stored one."""
    by_parameter: dict[int, str] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in stored:
        if name in parameters:
            by_parameter[id(parameters[name])] = name
    return {
        name: by_parameter[id(parameter)] for name, parameter in parameters.items() if name not in stored and id(parameter) in by_parameter
    }
