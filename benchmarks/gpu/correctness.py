"""Stage 3: right before fast. A model of two layers on the GPU against the same one in float32 on the CPU: loss and gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from project import LLAMA_1B, SEED, TOY
from results import Results

LENGTH, ROWS = 512, 2


def run(results: Results, recipe: Path, toy: bool) -> None:
    import torch

    results.measure("correctness", "loss of the whole model by precision", lambda: precisions(recipe, toy))
    results.measure("correctness", "Liger's sum of the head's gradient", lambda: sums(toy))
    case = Case(toy)
    results.measure("correctness", "CPU, float32", case.exact)
    for name, way in WAYS.items():
        on_gpu_only = way.get("liger") or way.get("compiled")
        if on_gpu_only and not torch.cuda.is_available():
            continue
        if not results.measure("correctness", name, lambda way=way: case.compare(**way)):
            return


WAYS: dict[str, dict[str, Any]] = {
    "float32": {},
    "float32, without a mask, a document at a time": {"loop": True},
    "autocast": {"precision": "autocast"},
    "autocast, varlen": {"precision": "autocast", "attention": "varlen"},
    "bfloat16": {"precision": "bfloat16"},
    "bfloat16, varlen": {"precision": "bfloat16", "attention": "varlen"},
    "autocast, varlen, Liger": {"precision": "autocast", "attention": "varlen", "liger": True},
    "bfloat16, varlen, Liger, bfloat16 sum": {"precision": "bfloat16", "attention": "varlen", "liger": True, "shipped_loss": True},
    "bfloat16, varlen, Liger": {"precision": "bfloat16", "attention": "varlen", "liger": True},
    "bfloat16, varlen, Liger, compiled": {"precision": "bfloat16", "attention": "varlen", "liger": True, "compiled": True},
    "autocast, varlen, Liger, compiled": {"precision": "autocast", "attention": "varlen", "liger": True, "compiled": True},
}


def precisions(recipe: Path, toy: bool) -> dict[str, Any]:
    """The loss of the first 56 packed sequences by the model of the training stage, before its first step, and its hidden states' error."""
    import torch
    from project import open_job

    sets = {"training.precision": "float32", "training.use_liger_kernel": False, "model.attn_implementation": "sdpa"}
    job, model = open_job(recipe, sets, "precisions")
    data, size = job.schedule.build_dataset(0), 2
    rows = [data[index] for index in range(4 if toy else 56)]
    model.config.use_cache = False
    exact: list[Any] = []
    found: dict[str, Any] = {}
    for name in ("float32", "autocast", "bfloat16"):
        model = model.to(torch.bfloat16) if name == "bfloat16" else model
        total, count, errors, wins = 0.0, 0, [], 0.0
        for begin in range(0, len(rows), size):
            batch = {key: torch.stack([row[key] for row in rows[begin : begin + size]]).to(model.device) for key in rows[0]}
            following = batch["labels"][:, 1:]
            with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=name == "autocast"):
                out = model.model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).last_hidden_state
                logits = model.lm_head(out)[:, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), following.flatten(), ignore_index=-100, reduction="sum"))
            count += int((following != -100).sum())
            wins += float(logits.gather(2, batch["input_ids"][:, :-1, None]).sum())
            if name == "float32" and begin < 4:
                exact.append(out)
            elif begin < 4:
                errors.append(float((out.float() - exact[begin // size]).norm() / exact[begin // size].norm()))
        found[name] = {"loss": total / count, "error of hidden states": errors, "mean logit of the token itself": wins / count}
    return found


def sums(toy: bool) -> dict[str, Any]:
    """The relative error of the head's gradient by Liger's fused loss on a batch of the published size, against float32 of the same inputs."""
    import torch

    if not torch.cuda.is_available():
        return {"skipped": "no GPU"}
    from environment import grads
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    torch.manual_seed(0)
    rows = 1024 if toy else 7 * 2048
    hidden = torch.randn(rows, 2048, device="cuda").bfloat16()
    weight = (torch.randn(100_000, 2048, device="cuda") * 0.02).bfloat16()
    target = torch.randint(16_000, (rows,), device="cuda")
    exact = torch.zeros(weight.shape, device="cuda")
    for begin in range(0, rows, 1024):
        part, right = hidden[begin : begin + 1024].float(), target[begin : begin + 1024]
        wrong = torch.softmax(part @ weight.float().t(), 1)
        wrong[torch.arange(len(right), device="cuda"), right] -= 1
        exact += wrong.t() @ part / rows
    found = {}
    ways = {
        "bfloat16": {},
        "float32": {"accum_dtype": torch.float32},
        "float32, 8 times larger parts": {"accum_dtype": torch.float32, "chunk_mem_const": 8},
    }
    for name, more in ways.items():
        gradient = grads(lambda h, w, more=more: liger_fused_linear_cross_entropy(h, w, target, **more), hidden, weight)[2].float()
        found[name] = float(f"{float((gradient - exact).norm() / exact.norm()):.3e}")
    return {"relative error of the head's gradient": found}


class Case:
    """A model, a batch of packed documents, and the loss and gradients that float32 on the CPU gives."""

    def __init__(self, toy: bool) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        from azrecipe.modeling import attention

        attention.register_varlen()
        self.toy, self.device = toy, "cuda" if torch.cuda.is_available() else "cpu"
        shape = {**(TOY if toy else LLAMA_1B), "num_hidden_layers": 2}
        kind = shape.pop("model_type")
        self.config = AutoConfig.for_model(kind, vocab_size=512 if toy else 100_000, **shape)
        torch.manual_seed(SEED)
        self.weights = AutoModelForCausalLM.from_config(self.config, dtype=torch.float32).state_dict()
        length = 64 if toy else LENGTH
        lengths = [[length // 4, length // 2, length // 4], [length // 8 + 3, length - length // 8 - 3]]
        self.positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
        self.ids = torch.randint(self.config.vocab_size, (ROWS, length))
        self.labels = self.ids.masked_fill(self.positions == 0, -100)
        self.reference: tuple[Any, dict[str, Any]] | None = None

    def exact(self) -> dict[str, Any]:
        loss, gradients = self.gradients(device="cpu")
        self.reference = loss, {name: gradient.to(self.device) for name, gradient in gradients.items()}
        return {"loss": float(loss)}

    def compare(self, loop: bool = False, **way: Any) -> dict[str, Any]:
        """The loss, its difference from the reference, and the relative difference of the gradients: of all, and of the worst matrix."""
        import torch

        from azrecipe.modeling import attention

        if self.reference is None:
            self.exact()
        assert self.reference is not None
        kernel = attention._attend_kernel
        if loop:  # the loop that CPU tests run in the kernel's place
            attention._attend_kernel, way["attention"] = attention._attend_loop, "varlen"
        try:
            loss, gradients = self.gradients(device=self.device, **way)
        finally:
            attention._attend_kernel = kernel
        exact_loss, exact = self.reference
        differences = {name: (gradients[name] - exact[name]).norm() / exact[name].norm() for name in exact}
        whole = torch.stack([(gradients[name] - exact[name]).norm() for name in exact]).norm()
        worst = max(differences, key=lambda name: float(differences[name]))
        return {
            "loss": float(loss), "loss difference": float(f"{float(loss) - float(exact_loss):.3e}"),
            "gradients": float(f"{float(whole / torch.stack([g.norm() for g in exact.values()]).norm()):.3e}"),
            "worst": [worst, float(f"{float(differences[worst]):.3e}")],
        }  # fmt: skip

    def gradients(self, *, device: str, attention: str = "sdpa", **way: Any) -> tuple[Any, dict[str, Any]]:
        """`way`: precision (float32, autocast or bfloat16), and whether liger, shipped_loss and compiled."""
        import torch
        from transformers import AutoModelForCausalLM

        from azrecipe.data.packing import compute_document_borders
        from azrecipe.modeling import liger_kernels as kernels
        from azrecipe.modeling.compilation import compile_blocks

        torch._dynamo.reset()
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(self.config, dtype=torch.float32, attn_implementation=attention)
        model.load_state_dict(self.weights)
        model = model.to(torch.bfloat16 if way.get("precision") == "bfloat16" else torch.float32)
        model.config.use_cache = False
        if way.get("liger"):
            from liger_kernel.transformers import _apply_liger_kernel_to_instance

            _apply_liger_kernel_to_instance(model=model)
        if way.get("compiled"):
            compile_blocks(model)
        batch = {"input_ids": self.ids, "labels": self.labels, "position_ids": self.positions}
        if attention == "varlen":
            batch |= compute_document_borders(self.positions)
        batch = {key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()}
        more = kernels.build_loss_arguments(model) if not way.get("shipped_loss") else {}
        count = (self.labels[:, 1:] != -100).sum().to(device)
        with torch.autocast(device, torch.bfloat16, enabled=way.get("precision") == "autocast"):
            loss = model.train()(**batch, **more, num_items_in_batch=count).loss
        loss.backward()
        return loss.detach().float().cpu(), {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}
