"""Batches padded to multiples of 64 train what batches padded to their longest train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from azrecipe.data.packing import Collator, get_length_multiple
from azrecipe.evaluation.generation import TextGenerator
from azrecipe.modeling.loading import load_model
from azrecipe.recipe.types import Generation
from azrecipe.tokenization.tokenizer import load_tokenizer

ROWS = [list(range(5, 5 + length)) for length in (7, 19, 30)]


def gradients(model: Any, batch: dict[str, Any]) -> tuple[float, torch.Tensor]:
    model.zero_grad()
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("kind", ["sft", "packed"])
def test_padding_changes_no_loss_and_no_gradient(llama: Path, kind: str) -> None:
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    model, lengths, results = load_model(str(llama), "float32"), [], []
    for multiple in (1, 64):
        if kind == "sft":
            batch = DataCollatorForLanguageModeling(pad_token_id=3, pad_to_multiple_of=multiple)([{"input_ids": row} for row in ROWS])
        else:
            rows = [{"input_ids": torch.tensor(row), "labels": torch.tensor(row), "position_ids": torch.arange(len(row))} for row in ROWS]
            batch = Collator(3, multiple)(rows)
        lengths.append(batch["input_ids"].shape[1])
        results.append(gradients(model, batch))
    assert lengths == [30, 64]
    (loss, gradient), (padded_loss, padded_gradient) = results
    assert padded_loss == pytest.approx(loss, abs=1e-6)
    assert (padded_gradient - gradient).norm() < 1e-5 * gradient.norm()


def test_padded_pairs_have_the_same_log_probabilities(llama: Path) -> None:
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    model = load_model(str(llama), "float32").eval()
    pairs = [{"prompt_ids": row[:3], "chosen_ids": row[3:], "rejected_ids": row[4:]} for row in ROWS]
    sums = []
    for multiple in (1, 64):
        batch = DataCollatorForPreference(pad_token_id=3, pad_to_multiple_of=multiple)(pairs)
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits[:, :-1]
        log_p = logits.log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None])[..., 0]
        sums.append((log_p * batch["completion_mask"][:, 1:]).sum(1))
    assert batch["input_ids"].shape[1] == 64
    assert torch.allclose(*sums, atol=1e-4)


def test_a_batch_is_never_longer_than_the_model_s_positions(llama: Path) -> None:
    model = load_model(str(llama), "float32")
    assert get_length_multiple(model, "cpu") == 1
    model.config.max_position_embeddings = 128
    assert get_length_multiple(model, "cuda") == 64
    model.config.max_position_embeddings = 100
    assert get_length_multiple(model, "cuda") == 1


def test_cudnn_s_attention_is_off_while_text_is_generated(llama: Path) -> None:
    enabled: list[bool] = []

    def record(*args: Any, **more: Any) -> Any:
        enabled.append(torch.backends.cuda.cudnn_sdp_enabled())
        return sdpa_attention_forward(*args, **more)

    AttentionInterface.register("cudnn_recorder", record)
    generator = TextGenerator(
        load_model(str(llama), "float32", "cudnn_recorder"), load_tokenizer(str(llama)), Generation(3, 0.0, 1.0, 1.0), 1
    )
    before = torch.backends.cuda.cudnn_sdp_enabled()
    generator.generate(["Bir"])
    assert enabled and not any(enabled)
    assert torch.backends.cuda.cudnn_sdp_enabled() == before
