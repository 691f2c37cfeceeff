"""Whether a split model's gradients are summed after every batch. No torch."""

from __future__ import annotations

# Below this, whole gradients cost less than another sum over the processes after every batch: an eighth of a card of 80 GB
AUTO_GRADIENT_BYTES = 8 * 2**30


def syncs_each_batch(setting: bool | str, shards: int, gradient_bytes: float) -> bool:
    """Decide whether each batch's gradients are summed over the processes.

    Else they are summed once a step, and FSDP keeps a whole gradient of every trained parameter in each process meanwhile.

    Args:
        setting: The recipe's training.sync_each_batch: true, false or "auto".
        shards: Processes that the model is split over; 1: it is not.
        gradient_bytes: Bytes of the whole gradients, in the number format of the trained parameters.
    """
    if isinstance(setting, bool):
        return setting
    return shards > 1 and gradient_bytes >= AUTO_GRADIENT_BYTES
