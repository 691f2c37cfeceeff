"""The launch of a process that tests start with torchrun: FSDP 2 over gloo, as accelerate_configs/fsdp.yaml has it."""

from __future__ import annotations

import os

from azrecipe.distributed.backend import Backend, set_up_backend


def set_up_fsdp() -> Backend:
    """Set what an accelerate config would, and set the backend up."""
    os.environ |= {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
    }
    return set_up_backend()
