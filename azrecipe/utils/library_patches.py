"""Where azrecipe changes or relies on the inside of a library.

Each entry names the version that it was written for: look at it again when that library is updated. docs/library_patches.md is generated
from this table: python -m azrecipe.utils.library_patches
"""

from __future__ import annotations

from typing import NamedTuple


class LibraryPatch(NamedTuple):
    """One place that changes or relies on the inside of a library.

    Attributes:
        module: The module of azrecipe, without the package's name.
        target: What it assigns to, or the private method that it overrides or calls.
        library: The library.
        version: The version that it was written for.
        upstream: Where in the library the code is that makes it necessary.
        reason: Why.
    """

    module: str
    target: str
    library: str
    version: str
    upstream: str
    reason: str


PATCHES = (
    LibraryPatch(
        "distributed.cpu_backend", "PartialState._prepare_backend", "accelerate", "1.15.0", "accelerate/state.py, PartialState._prepare_backend",
        "Without an accelerator the distributed type is NO, with which FSDP and DeepSpeed are dropped",
    ),
    LibraryPatch(
        "distributed.cpu_backend", "deepspeed.ops.__compatible_ops__", "deepspeed", "0.19.8", "deepspeed/comm/torch.py, build_shm_op",
        "DeepSpeed compiles shared-memory collectives at the first start; only inference uses them, and there is no setting",
    ),
    LibraryPatch(
        "distributed.cpu_backend", "ring.custom_ops", "torch", "2.13.0",
        "torch/distributed/tensor/experimental/_context_parallel/_attention.py, custom_ops",
        "Its table of attention operators lacks those of the CPU",
    ),
    LibraryPatch(
        "distributed.process_group", "_set_pg_timeout", "torch", "2.13.0", "torch/distributed/distributed_c10d.py, _set_pg_timeout and _world",
        "A group's timeout fits saving and measuring, and a step's is shorter; no public function changes it, or lists the groups",
    ),
    LibraryPatch(
        "evaluation.token_losses", "head.forward", "transformers", "5.23.0", "the forward method of each model's ForCausalLM class",
        "While a batch is scored, the head returns losses instead of logits; the batch's logits are never in memory",
    ),
    LibraryPatch(
        "modeling.chunked_loss", "head.__class__", "transformers", "5.23.0", "the forward method of each model's ForCausalLM class",
        "The head computes the loss in chunks; a wrapper would change the names of parameters",
    ),
    LibraryPatch(
        "modeling.chunked_loss", "model.__class__", "transformers", "5.23.0", "the forward method of each model's ForCausalLM class",
        "The model hands labels to its head instead of computing all logits",
    ),
    LibraryPatch(
        "planning.simulation.bitsandbytes_stubs", "module.__class__", "torch", "2.13.0", "torch/nn/modules/linear.py, Linear",
        "Linear layers stand for bitsandbytes' 4-bit layers, which need a GPU; in a simulated step only",
    ),
    LibraryPatch(
        "planning.simulation.memory_tracker", "torch.UntypedStorage.resize_", "torch", "2.13.0",
        "torch/distributed/fsdp/_fully_shard/_fsdp_param.py, which frees storages by it",
        "FSDP 2 frees and refills storages outside the dispatcher; replaced while a simulated step runs only",
    ),
    LibraryPatch(
        "planning.simulation.memory_tracker", "ShardingPropagator._propagate_tensor_meta_non_cached", "torch", "2.13.0",
        "torch/distributed/tensor/_sharding_prop.py, ShardingPropagator._propagate_tensor_meta_non_cached",
        "DTensor infers a result's shape from tensors of the whole shape, which no process has; they are not counted in a simulated step",
    ),
    LibraryPatch(
        "training.async_checkpoint", "_save_optimizer_and_scheduler", "transformers", "5.23.0",
        "transformers/trainer.py, Trainer._save_optimizer_and_scheduler",
        "The optimizer's state is copied, and a thread writes it; there is no public hook",
    ),
    LibraryPatch(
        "training.bad_step_guard", "_get_grad_norm", "transformers", "5.23.0", "transformers/trainer.py, Trainer._get_grad_norm",
        "The norm of the gradients is judged before the optimizer's step",
    ),
    LibraryPatch(
        "training.bad_step_guard", "_tr_loss", "transformers", "5.23.0", "transformers/trainer.py, Trainer._tr_loss",
        "A skipped step's loss is taken out of the sum of losses that is logged",
    ),
    LibraryPatch(
        "training.finetuning", "_move_model_to_device", "transformers", "5.23.0", "transformers/trainer.py, Trainer._move_model_to_device",
        "TRL adds the adapter in its trainer's constructor; what is frozen is rounded after that and before it fills a GPU",
    ),
    LibraryPatch(
        "training.finetuning", "_prepare_dataset", "trl", "1.16.0", "trl/trainer/dpo_trainer.py, DPOTrainer._prepare_dataset",
        "The rows are tokenised already, by azrecipe's own checks",
    ),
    LibraryPatch(
        "training.trainer", "_build_accelerator_args", "transformers", "5.23.0", "transformers/trainer.py, Trainer._build_accelerator_args",
        "DDP's gradients lie in its buckets (gradient_as_bucket_view); there is no argument for it",
    ),
    LibraryPatch(
        "utils.template_limits", "chat_template_utils._compile_jinja_template", "transformers", "5.23.0",
        "transformers/utils/chat_template_utils.py, _compile_jinja_template",
        "A chat template of a stranger may loop or grow without end; transformers' sandbox has no limits, and no argument for them",
    ),
    LibraryPatch(
        "utils.template_limits", "environment.__class__", "transformers", "5.23.0",
        "transformers/utils/chat_template_utils.py, _cached_compile_jinja_template",
        "The environment is made in that function, with its filters and the tracker of the assistant's text",
    ),
    LibraryPatch(
        "evaluation.task_code", "_yaml_loader._import_func_in_yml", "lm-eval", "0.4.13", "lm_eval/tasks/_yaml_loader.py, _import_func_in_yml",
        "A task file's !function imports and runs Python; there is no setting that forbids it",
    ),
    LibraryPatch(
        "evaluation.task_code", "task_module.get_metric", "lm-eval", "0.4.13", "lm_eval/api/registry.py, get_metric",
        "A metric that is not registered is downloaded from the hub, or taken from a folder, and run",
    ),
    LibraryPatch(
        "evaluation.task_code", "FilterEnsemble.apply", "lm-eval", "0.4.13", "lm_eval/api/filter.py, FilterEnsemble.apply",
        "A task file's regular expression may backtrack without end on an answer; the harness has no limit",
    ),
    LibraryPatch(
        "evaluation.task_code", "harness_utils.env", "lm-eval", "0.4.13", "lm_eval/utils.py, env",
        "Templates of task files are rendered without a sandbox",
    ),
    LibraryPatch(
        "utils.template_limits", "_generate", "jinja2", "3.1.6", "jinja2/environment.py, Environment._generate",
        "Jinja's hook before a template is compiled: loops and concatenations are counted",
    ),
    LibraryPatch(
        "inference.serve_engine", "server.build_server", "transformers", "5.23.0", "transformers/cli/serving/server.py, build_server",
        "transformers serve checks few of a request's values and has no limits; the front is put around its application",
    ),
)  # fmt: skip


def generate_document() -> str:
    """Generate docs/library_patches.md."""
    rows = [
        f"| {patch.library} {patch.version} | `azrecipe/{patch.module.replace('.', '/')}.py` | `{patch.target}` | {patch.upstream} | {patch.reason} |"
        for patch in PATCHES
    ]
    return "\n".join(
        [
            "# Patches of libraries",
            "",
            "Written by `python -m azrecipe.utils.library_patches > docs/library_patches.md`; edit the table there. A test finds places that the",
            "table lacks, and fails when an installed library is of another minor version than the one an entry was written for.",
            "",
            "| library | where | what | upstream | why |",
            "| --- | --- | --- | --- | --- |",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    print(generate_document(), end="")
