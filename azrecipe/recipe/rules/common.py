"""What a schema cannot say: the few rules that look at two values, or at another file."""

from __future__ import annotations

import ast
import importlib.util
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from azrecipe.errors import Place, Problem, did_you_mean, hint
from azrecipe.recipe import parameter_groups, schema
from azrecipe.recipe.rules import evaluate, optimizer, sft
from azrecipe.recipe.yaml_tree import Node

# Fields of TrainingArguments that follow from the recipe, the launcher or the run directory.
OWNED = {
    "output_dir", "num_train_epochs", "max_steps", "learning_rate", "gradient_accumulation_steps", "warmup_steps", "bf16", "fp16", "seed",
    "data_seed", "use_cpu", "save_strategy", "eval_strategy", "logging_strategy", "train_sampling_strategy", "remove_unused_columns",
    "label_names", "fsdp", "fsdp_config", "deepspeed", "enable_jit_checkpoint", "load_best_model_at_end", "do_train", "do_eval", "run_name",
    "bf16_full_eval", "disable_tqdm", "average_tokens_across_devices", "overwrite_output_dir", "resume_from_checkpoint", "gradient_checkpointing", "auto_find_batch_size", "ignore_data_skip",
    "accelerator_config", "parallelism_config", "dataloader_drop_last", "max_length", "shuffle_dataset", "include_num_input_tokens_seen",
    "ddp_timeout", "save_only_model", "restore_callback_states_from_checkpoint", "torch_compile_backend", "torch_compile_mode", "save_on_each_node",
    "push_to_hub", "lr_scheduler_kwargs",
}  # fmt: skip


def check(root: Node, stage: str) -> list[Problem]:
    """Problems of a merged tree, which may have failed its schema: only what still makes sense is said."""
    found: list[Problem] = []
    found += _recipes_exist(root, schema.document(stage))
    found += _apostrophes(root, schema.document(stage))
    found += _filters(root)
    if stage == "pretrain":
        found += _phases(root)
        found += _tokenizer_source(root)
        found += _temperature(root)
        found += _ignored(root)
    if stage == "sft":
        found += sft.check(root)
    if stage in ("pretrain", "sft"):
        found += _trainer_arguments(root)
        found += _kernels(root, stage)
        found += optimizer.check(root, stage)
    if stage == "tokenizer":
        found += _candidates(root)
    if stage == "evaluate":
        found += evaluate.check(root)
    if stage == "pipeline":
        found += _compare(root)
    return found


def _recipes_exist(node: Node, definition: schema.Schema) -> Iterator[Problem]:
    """Every path of a recipe (`output_of`, `continue_from`, a pipeline's steps) is there."""
    definition = schema.follow(definition)
    if isinstance(node.value, dict):
        for key, value in node.value.items():
            if (inner := schema.below(definition, key)) is not None:
                yield from _recipes_exist(value, inner)
    elif isinstance(node.value, list):
        if (inner := schema.below(definition, 0)) is not None:
            for item in node.value:
                yield from _recipes_exist(item, inner)
    elif definition.get("x-path") == "recipe" and isinstance(node.value, str) and node.place.line:
        file = Path(os.path.dirname(node.place.file), node.value)
        if not file.is_file():
            near = did_you_mean(file.name, (p.name for p in file.parent.glob("*.y*ml"))) if file.parent.is_dir() else ""
            yield Problem(node.place, f"no such recipe: {os.path.normpath(file)}{near}")


def _apostrophes(node: Node, definition: schema.Schema) -> Iterator[Problem]:
    """The two ways to write an apostrophe exclude each other in one source's `normalize`."""
    definition = schema.follow(definition)
    inside = node.value.items() if isinstance(node.value, dict) else enumerate(node.value) if isinstance(node.value, list) else ()
    for key, inner in inside:
        below = schema.below(definition, key)
        if below is None:
            continue
        yield from _apostrophes(inner, below)
        if key == "normalize" and isinstance(inner.value, list):
            named = [item for item in inner.value if item.value in ("apostrophes", "uzbek_apostrophes")]
            if len({item.value for item in named}) == 2:
                message = "normalize: apostrophes and uzbek_apostrophes write the same mark in two ways; name one of them"
                yield Problem(named[-1].place, message)


def _phases(root: Node) -> Iterator[Problem]:
    phases = root.get("phases")
    names: dict[object, Place] = {}
    for phase in phases.value if phases and isinstance(phases.value, list) else []:
        name = phase.get("name")
        if name and isinstance(name.value, str):
            if name.value in names:
                yield Problem(name.place, f"two phases are called '{name.value}'; the other stands at {names[name.value]}")
            names.setdefault(name.value, name.place)
        patterns = phase.get("trainable_parameters")
        for pattern in patterns.value if patterns and isinstance(patterns.value, list) else []:
            if isinstance(pattern.value, str) and (wrong := parameter_groups.problem(pattern.value)):
                yield Problem(pattern.place, wrong)


def _tokenizer_source(root: Node) -> Iterator[Problem]:
    tokenizer, model = root.get("tokenizer"), root.get("model")
    if tokenizer is None or not isinstance(tokenizer.value, dict):
        if model and model.get("config"):
            yield Problem(
                model.at,
                "a model built from `config` has no tokenizer of its own: say `tokenizer:` (name_or_path, output_of, or family and vocab_size)",
            )
        return
    sources = [key for key in ("name_or_path", "output_of", "family") if key in tokenizer.value]
    if len(sources) > 1:
        yield Problem(tokenizer.at, f"give at most one of name_or_path, output_of, family: there are {', '.join(sources)}")
    if not sources and model and model.get("config"):
        yield Problem(
            tokenizer.at, "a model built from `config` has no tokenizer of its own: give name_or_path, output_of, or family and vocab_size"
        )
    if "candidate" in tokenizer.value and "output_of" not in tokenizer.value:
        yield Problem(tokenizer.value["candidate"].at, "candidate is one of a tokenizer recipe's: it goes with output_of")
    if ("family" in tokenizer.value) != ("vocab_size" in tokenizer.value):
        yield Problem(tokenizer.at, "family and vocab_size go together: they ask for a new tokenizer")


def _temperature(root: Node) -> Iterator[Problem]:
    """Weights and a temperature are two answers to one question."""
    datasets = root.get("data", "datasets")
    if root.get("data", "sampling_temperature") is None or datasets is None or not isinstance(datasets.value, list):
        return
    for source in datasets.value:
        if (weight := source.get("weight")) is not None:
            yield Problem(weight.at, "weight and data.sampling_temperature both say how much is read of a source: take one of them away")


def _ignored(root: Node) -> Iterator[Problem]:
    """Keys of `data` that nothing reads beside what else is there."""
    packing, strategy = root.get("data", "packing"), root.get("data", "packing_strategy")
    if packing and packing.value is False and strategy and strategy.value != "wrapped":
        yield Problem(strategy.at, "packing: false packs nothing: packing_strategy says nothing then, take one of them away")
    method = root.get("data", "deduplication", "method")
    if method and method.value == "exact":
        default = (schema.below(schema.below(schema.document("pretrain"), "data") or {}, "deduplication") or {}).get("properties", {})
        for key in ("threshold", "ngram_size", "num_perm"):
            node = root.get("data", "deduplication", key)
            if node and node.value != default[key]["default"]:
                yield Problem(node.at, f"{key} is minhash's, and method is exact")


def _filters(root: Node) -> Iterator[Problem]:
    """Limits that no document can keep."""
    datasets = root.get("data", "datasets")
    for source in datasets.value if datasets and isinstance(datasets.value, list) else []:
        low, high = source.get("filters", "min_characters"), source.get("filters", "max_characters")
        if low and high and isinstance(low.value, int) and isinstance(high.value, int) and low.value > high.value:
            yield Problem(low.at, f"min_characters = {low.value:,} is more than max_characters = {high.value:,}: no document is left")


def _candidates(root: Node) -> Iterator[Problem]:
    candidates, select = root.get("candidates"), root.get("select")
    entries = candidates.value if candidates and isinstance(candidates.value, dict) else {}
    needs = {"baseline": (set(), set()), "custom": ({"vocab_size"}, {"pre_tokenizer"}), "extension": ({"new_tokens"}, {"protect"})}
    for name, candidate in entries.items():
        kind = candidate.get("kind")
        if kind is None or not isinstance(kind.value, str) or kind.value not in needs or not isinstance(candidate.value, dict):
            continue
        required, optional = needs[kind.value]
        for key in sorted(required - candidate.value.keys()):
            yield Problem(candidate.at, f"candidate '{name}': kind {kind.value} needs {key}")
        for key in sorted(candidate.value.keys() - required - optional - {"kind"}):
            if key in ("vocab_size", "new_tokens", "protect", "pre_tokenizer"):
                yield Problem(candidate.value[key].at, f"candidate '{name}': kind {kind.value} takes no {key}")
    if select and isinstance(select.value, str) and entries and select.value not in entries and select.value != "lowest_fertility":
        known = [*entries, "lowest_fertility"]
        yield Problem(select.place, f"select names no candidate: '{select.value}'{hint(select.value, known, 'Candidates')}")


def _compare(root: Node) -> Iterator[Problem]:
    compare, matrix = root.get("compare"), root.get("matrix")
    if compare is not None and (matrix is None or not matrix.value):
        yield Problem(compare.at, "compare ranks the cells of a matrix, and there is none: say `matrix:`")


def _kernels(root: Node, stage: str) -> Iterator[Problem]:
    """Kernels that exclude each other, or that nothing would put in."""

    def said(*keys: str) -> Node | None:
        node = root.get("training", *keys)
        return node if node is not None and node.value not in (None, False) else None

    chosen, loss = said("liger_kernel_config"), said("fused_linear_cross_entropy")
    if said("use_liger_kernel") is None:
        if chosen is not None:
            yield Problem(chosen.at, "liger_kernel_config chooses among Liger's kernels, and use_liger_kernel is not true")
        if loss is not None and loss.value == "liger":
            message = "fused_linear_cross_entropy: liger is one of Liger's kernels, and use_liger_kernel is not true. PyTorch's own: torch"
            yield Problem(loss.at, message)
        return
    whole, fused = (said("liger_kernel_config", name) for name in ("cross_entropy", "fused_linear_cross_entropy"))
    if whole is not None and fused is not None:
        yield Problem(fused.at, "cross_entropy and fused_linear_cross_entropy are two ways to one loss; name one of them")
    elif fused is not None and stage == "sft":
        message = "sft has no use for Liger's fused_linear_cross_entropy: TRL's SFTTrainer takes the loss a chunk at a time by itself"
        yield Problem(fused.at, message)
    elif loss is not None and (other := whole or (fused if loss.value == "torch" else None)) is not None:
        yield Problem(other.at, f"training.fused_linear_cross_entropy: {loss.value} takes the loss; leave this kernel out")
    off = root.get("training", "liger_kernel_config", "fused_linear_cross_entropy")
    if loss is not None and loss.value == "liger" and off is not None and off.value is False:
        yield Problem(off.at, "training.fused_linear_cross_entropy: liger asks for this kernel, and here it is left out")


def _trainer_arguments(root: Node) -> Iterator[Problem]:
    given = root.get("training", "trainer_arguments")
    if given is None or not isinstance(given.value, dict) or not given.value:
        return
    own = schema.below(schema.document(str(root.plain()["stage"])), "training") or {}
    ours = set(own.get("properties", {})) - {"trainer_arguments"}
    known = _training_arguments_fields()
    for key, node in given.value.items():
        if key in ours:
            yield Problem(node.at, f"'{key}' is a key of training itself: write training.{key}")
        elif key in OWNED:
            yield Problem(node.at, f"'{key}' follows from the recipe, the launcher or the run directory and cannot be set")
        elif known and key not in known:
            yield Problem(node.at, f"transformers.TrainingArguments has no field '{key}'{did_you_mean(key, known)}")


@cache
def _training_arguments_fields() -> frozenset[str]:
    """Field names of the installed TrainingArguments, read from its source: importing it would pull torch in."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        return frozenset()
    tree = ast.parse(Path(spec.origin).with_name("training_args.py").read_text(encoding="utf-8"))
    classes = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "TrainingArguments")
    return frozenset(n.target.id for c in classes for n in c.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name))
