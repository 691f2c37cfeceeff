"""The types that weights are kept in, by precision."""

from __future__ import annotations

import torch

STORED = {"float32": torch.float32, "bf16_mixed": torch.float32, "bf16_pure": torch.bfloat16}
