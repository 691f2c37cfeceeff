"""Write a model's weights into safetensors files, one tensor after another."""

from __future__ import annotations

from pathlib import Path

import torch

from azrecipe.utils.atomic_files import write_json

MAX_SHARD_BYTES = 1 << 30  # of weights that wait in memory; a larger tensor is a file of its own


class ShardWriter:
    """Collects tensors and writes a file whenever enough are there.

    Files have the names that transformers gives them. Call `finish` after the last tensor.
    """

    def __init__(self, folder: Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        self.folder = folder
        self.max_shard_bytes = max_shard_bytes
        self.total_bytes = 0
        self._waiting: dict[str, torch.Tensor] = {}
        self._waiting_bytes = 0
        self._shards: list[list[str]] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Add a tensor; it is written at once or with later ones."""
        size = tensor.numel() * tensor.element_size()
        if self._waiting and self._waiting_bytes + size > self.max_shard_bytes:
            self._write()
        self._waiting[name] = tensor.contiguous()
        self._waiting_bytes += size
        self.total_bytes += size

    def finish(self) -> None:
        """Write the last file, give all files their names, and write the index."""
        self._write()
        count = len(self._shards)
        if count == 1:
            self._locate(0).replace(self.folder / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for index, names in enumerate(self._shards):
            file = self.folder / f"model-{index + 1:05d}-of-{count:05d}.safetensors"
            self._locate(index).replace(file)
            weight_map |= dict.fromkeys(names, file.name)
        write_json(
            self.folder / "model.safetensors.index.json",
            {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(weight_map.items()))},
        )

    def _locate(self, index: int) -> Path:
        return self.folder / f"part-{index}.safetensors"

    def _write(self) -> None:
        from safetensors.torch import save_file

        if not self._waiting:
            return
        save_file(self._waiting, self._locate(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(list(self._waiting))
        self._waiting, self._waiting_bytes = {}, 0
