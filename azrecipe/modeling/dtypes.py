"""The type of a model's weights for each precision."""

from __future__ import annotations

import torch

PARAM_DTYPES = {"float32": torch.float32, "bf16_mixed": torch.float32, "bf16_pure": torch.bfloat16}
