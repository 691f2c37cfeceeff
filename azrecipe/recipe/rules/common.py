"""Rules of every stage that read two values or another file."""

from __future__ import annotations

import ast
import importlib.util
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from azrecipe.errors import Problem, SourceLocation, did_you_mean, suggest_choices
from azrecipe.recipe import parameter_groups, schema
from azrecipe.recipe.rules import evaluate, merge, mix, optimizer, sft
from azrecipe.recipe.yaml_tree import YamlNode
from azrecipe.utils.paths import LOCAL_PATH_CHECKS, is_file, is_folder, is_s3

# Fields of TrainingArguments that the recipe, the launcher or the run directory determines.
RESERVED_TRAINER_ARGUMENTS = {
    "output_dir", "num_train_epochs", "max_steps", "learning_rate", "gradient_accumulation_steps", "warmup_steps", "bf16", "fp16", "seed",
    "data_seed", "use_cpu", "save_strategy", "eval_strategy", "logging_strategy", "train_sampling_strategy", "remove_unused_columns",
    "label_names", "fsdp", "fsdp_config", "deepspeed", "enable_jit_checkpoint", "load_best_model_at_end", "do_train", "do_eval", "run_name",
    "bf16_full_eval", "disable_tqdm", "average_tokens_across_devices", "overwrite_output_dir", "resume_from_checkpoint", "gradient_checkpointing", "auto_find_batch_size", "ignore_data_skip",
    "accelerator_config", "parallelism_config", "dataloader_drop_last", "max_length", "shuffle_dataset", "include_num_input_tokens_seen",
    "ddp_timeout", "save_only_model", "restore_callback_states_from_checkpoint", "torch_compile_backend", "torch_compile_mode", "save_on_each_node",
    "push_to_hub", "lr_scheduler_kwargs",
}  # fmt: skip


def check_rules(root: YamlNode, stage: str) -> list[Problem]:
    """Return the problems of a merged tree.

    The tree may have failed its schema, so each rule checks the types that it needs.
    """
    problems: list[Problem] = []
    problems += _check_recipe_files(root, schema.load_schema(stage))
    problems += _check_hub_names(root, schema.load_schema(stage))
    problems += _check_apostrophes(root, schema.load_schema(stage))
    problems += _check_filters(root)
    if stage == "pretrain":
        problems += _check_phases(root)
        problems += _check_tokenizer_source(root)
        problems += mix.check_mix(root)
        problems += _check_unread_data_keys(root)
    if stage == "sft":
        problems += sft.check_sft(root)
    if stage in ("pretrain", "sft"):
        problems += _check_trainer_arguments(root)
        problems += _check_kernels(root, stage)
        problems += optimizer.check_optimizer(root, stage)
    if stage == "tokenizer":
        problems += _check_candidates(root)
    if stage == "evaluate":
        problems += evaluate.check_evaluate(root)
    if stage == "merge":
        problems += merge.check_merge(root)
    if stage == "pipeline":
        problems += _check_compare(root)
    return problems


def _check_recipe_files(node: YamlNode, definition: schema.Schema) -> Iterator[Problem]:
    """Check that the files of `output_of`, `continue_from` and `steps` exist."""
    definition = schema.resolve_ref(definition)
    if isinstance(node.value, dict):
        for key, value in node.value.items():
            if (child := schema.subschema(definition, key)) is not None:
                yield from _check_recipe_files(value, child)
    elif isinstance(node.value, list):
        if (child := schema.subschema(definition, 0)) is not None:
            for item in node.value:
                yield from _check_recipe_files(item, child)
    elif definition.get("x-path") == "recipe" and isinstance(node.value, str) and node.location.line:
        file = Path(os.path.dirname(node.location.file), node.value)
        if not is_file(file):
            suggestion = did_you_mean(file.name, (p.name for p in file.parent.glob("*.y*ml"))) if is_folder(file.parent) else ""
            yield Problem(node.location, f"no such recipe: {os.path.normpath(file)}{suggestion}")


def _check_hub_names(node: YamlNode, definition: schema.Schema) -> Iterator[Problem]:
    """Refuse names on the hub that are local files or folders, too.

    The libraries would take what is in the working folder, and no change of it would be noticed.
    """
    definition = schema.resolve_ref(definition)
    children = node.value.items() if isinstance(node.value, dict) else enumerate(node.value) if isinstance(node.value, list) else ()
    for key, child in children:
        if (child_schema := schema.subschema(definition, key)) is not None:
            yield from _check_hub_names(child, child_schema)
    kind, path = definition.get("x-path"), node.value
    if kind not in ("model", "data") or not isinstance(path, str) or LOCAL_PATH_CHECKS[kind](path) or is_s3(path):
        return
    base = os.path.dirname(node.location.file) if node.location.line else ""
    for folder in dict.fromkeys((base, "")):
        file = Path(folder, path)
        if path and (is_file(file) or is_folder(file)):
            what = "a folder" if is_folder(file) else "a file"
            local = f"./{path}" if folder == base else os.path.relpath(path, base or ".")
            message = f"'{path}' is a name on the hub, and there is {what} {file} here: write {local} for that, or rename it"
            yield Problem(node.location, message)
            return


def _check_apostrophes(node: YamlNode, definition: schema.Schema) -> Iterator[Problem]:
    """Check that each `normalize` has at most one step for apostrophes."""
    definition = schema.resolve_ref(definition)
    children = node.value.items() if isinstance(node.value, dict) else enumerate(node.value) if isinstance(node.value, list) else ()
    for key, child in children:
        child_schema = schema.subschema(definition, key)
        if child_schema is None:
            continue
        yield from _check_apostrophes(child, child_schema)
        if key == "normalize" and isinstance(child.value, list):
            apostrophe_steps = [item for item in child.value if item.value in ("apostrophes", "uzbek_apostrophes")]
            if len({item.value for item in apostrophe_steps}) == 2:
                message = "normalize: apostrophes and uzbek_apostrophes write the same mark in two ways; name one of them"
                yield Problem(apostrophe_steps[-1].location, message)


def _check_phases(root: YamlNode) -> Iterator[Problem]:
    phases = root.get("phases")
    names: dict[object, SourceLocation] = {}
    for phase in phases.value if phases and isinstance(phases.value, list) else []:
        name = phase.get("name")
        if name and isinstance(name.value, str):
            if name.value in names:
                yield Problem(name.location, f"two phases are called '{name.value}'; the other is at {names[name.value]}")
            names.setdefault(name.value, name.location)
        patterns = phase.get("trainable_parameters")
        for pattern in patterns.value if patterns and isinstance(patterns.value, list) else []:
            if isinstance(pattern.value, str) and (problem := parameter_groups.find_pattern_problem(pattern.value)):
                yield Problem(pattern.location, problem)
        rates = phase.get("learning_rates")
        for part, node in rates.value.items() if rates and isinstance(rates.value, dict) else ():
            if problem := parameter_groups.find_pattern_problem(part):
                yield Problem(node.entry_location, problem)


def _check_tokenizer_source(root: YamlNode) -> Iterator[Problem]:
    tokenizer, model = root.get("tokenizer"), root.get("model")
    if tokenizer is None or not isinstance(tokenizer.value, dict):
        if model and model.get("config"):
            yield Problem(
                model.entry_location,
                "a model built from `config` has no tokenizer of its own: say `tokenizer:` (name_or_path, output_of, or family and vocab_size)",
            )
        return
    sources = [key for key in ("name_or_path", "output_of", "family") if key in tokenizer.value]
    if len(sources) > 1:
        yield Problem(tokenizer.entry_location, f"give at most one of name_or_path, output_of, family: there are {', '.join(sources)}")
    if not sources and model and model.get("config"):
        yield Problem(
            tokenizer.entry_location,
            "a model built from `config` has no tokenizer of its own: give name_or_path, output_of, or family and vocab_size",
        )
    if "candidate" in tokenizer.value and "output_of" not in tokenizer.value:
        yield Problem(tokenizer.value["candidate"].entry_location, "candidate is one of a tokenizer recipe's: it goes with output_of")
    if ("family" in tokenizer.value) != ("vocab_size" in tokenizer.value):
        yield Problem(tokenizer.entry_location, "family and vocab_size go together: they ask for a new tokenizer")


def _check_unread_data_keys(root: YamlNode) -> Iterator[Problem]:
    """Find keys of `data` that have no effect beside the other keys."""
    packing, strategy = root.get("data", "packing"), root.get("data", "packing_strategy")
    if packing and packing.value is False and strategy and strategy.value != "wrapped":
        yield Problem(strategy.entry_location, "packing_strategy has no effect with packing: false: remove one of them")
    method = root.get("data", "deduplication", "method")
    if method and method.value == "exact":
        data = schema.subschema(schema.load_schema("pretrain"), "data") or {}
        properties = (schema.subschema(data, "deduplication") or {}).get("properties", {})
        for key in ("threshold", "ngram_size", "num_perm"):
            node = root.get("data", "deduplication", key)
            if node and node.value != properties[key]["default"]:
                yield Problem(node.entry_location, f"{key} is a key of method: minhash, and method is exact")


def _check_filters(root: YamlNode) -> Iterator[Problem]:
    """Find limits that no document can meet."""
    datasets = root.get("data", "datasets")
    for source in datasets.value if datasets and isinstance(datasets.value, list) else []:
        low, high = source.get("filters", "min_characters"), source.get("filters", "max_characters")
        if low and high and isinstance(low.value, int) and isinstance(high.value, int) and low.value > high.value:
            yield Problem(
                low.entry_location, f"min_characters = {low.value:,} is more than max_characters = {high.value:,}: no document is left"
            )


def _check_candidates(root: YamlNode) -> Iterator[Problem]:
    candidates, select = root.get("candidates"), root.get("select")
    entries = candidates.value if candidates and isinstance(candidates.value, dict) else {}
    needs = {"baseline": (set(), set()), "custom": ({"vocab_size"}, {"pre_tokenizer"}), "extension": ({"new_tokens"}, {"protect"})}
    lower: dict[str, str] = {}
    for name, candidate in entries.items():
        if name == "lowest_fertility":
            message = "a candidate cannot be called lowest_fertility: select: lowest_fertility takes the best one. Give it another name"
            yield Problem(candidate.entry_location, message)
        if name.lower() in lower:
            message = f"candidate '{name}' differs from '{lower[name.lower()]}' in case only, and both name folders: give one another name"
            yield Problem(candidate.entry_location, message)
        lower.setdefault(name.lower(), name)
        kind = candidate.get("kind")
        if kind is None or not isinstance(kind.value, str) or kind.value not in needs or not isinstance(candidate.value, dict):
            continue
        required, optional = needs[kind.value]
        for key in sorted(required - candidate.value.keys()):
            yield Problem(candidate.entry_location, f"candidate '{name}': kind {kind.value} needs {key}")
        for key in sorted(candidate.value.keys() - required - optional - {"kind"}):
            if key in ("vocab_size", "new_tokens", "protect", "pre_tokenizer"):
                yield Problem(candidate.value[key].entry_location, f"candidate '{name}': kind {kind.value} takes no {key}")
    if select and isinstance(select.value, str) and entries and select.value not in entries and select.value != "lowest_fertility":
        names = [*entries, "lowest_fertility"]
        yield Problem(select.location, f"select names no candidate: '{select.value}'{suggest_choices(select.value, names, 'Candidates')}")


def _check_compare(root: YamlNode) -> Iterator[Problem]:
    compare, matrix = root.get("compare"), root.get("matrix")
    if compare is not None and (matrix is None or not matrix.value):
        yield Problem(compare.entry_location, "compare ranks the cells of a matrix, and there is none: say `matrix:`")


def _check_kernels(root: YamlNode, stage: str) -> Iterator[Problem]:
    """Find kernels that exclude each other or that are not enabled."""

    def get_enabled(*keys: str) -> YamlNode | None:
        node = root.get("training", *keys)
        return node if node is not None and node.value not in (None, False) else None

    config, loss = get_enabled("liger_kernel_config"), get_enabled("fused_linear_cross_entropy")
    if get_enabled("use_liger_kernel") is None:
        if config is not None:
            yield Problem(config.entry_location, "liger_kernel_config chooses among Liger's kernels, and use_liger_kernel is not true")
        if loss is not None and loss.value == "liger":
            message = "fused_linear_cross_entropy: liger is one of Liger's kernels, and use_liger_kernel is not true. PyTorch's own: torch"
            yield Problem(loss.entry_location, message)
        return
    unfused, fused = (get_enabled("liger_kernel_config", name) for name in ("cross_entropy", "fused_linear_cross_entropy"))
    if unfused is not None and fused is not None:
        yield Problem(fused.entry_location, "cross_entropy and fused_linear_cross_entropy compute the same loss; name one of them")
    elif fused is not None and stage == "sft":
        message = "sft has no use for Liger's fused_linear_cross_entropy: TRL's SFTTrainer takes the loss a chunk at a time by itself"
        yield Problem(fused.entry_location, message)
    elif loss is not None and (other := unfused or (fused if loss.value == "torch" else None)) is not None:
        yield Problem(other.entry_location, f"training.fused_linear_cross_entropy: {loss.value} takes the loss; leave this kernel out")
    fused_node = root.get("training", "liger_kernel_config", "fused_linear_cross_entropy")
    if loss is not None and loss.value == "liger" and fused_node is not None and fused_node.value is False:
        yield Problem(fused_node.entry_location, "training.fused_linear_cross_entropy: liger asks for this kernel, and here it is left out")


def _check_trainer_arguments(root: YamlNode) -> Iterator[Problem]:
    arguments = root.get("training", "trainer_arguments")
    if arguments is None or not isinstance(arguments.value, dict) or not arguments.value:
        return
    training = schema.subschema(schema.load_schema(str(root.to_plain()["stage"])), "training") or {}
    recipe_keys = set(training.get("properties", {})) - {"trainer_arguments"}
    known_fields = _read_training_arguments_fields()
    for key, node in arguments.value.items():
        if key in recipe_keys:
            yield Problem(node.entry_location, f"'{key}' is a key of training itself: write training.{key}")
        elif key in RESERVED_TRAINER_ARGUMENTS:
            yield Problem(node.entry_location, f"'{key}' follows from the recipe, the launcher or the run directory and cannot be set")
        elif known_fields and key not in known_fields:
            yield Problem(node.entry_location, f"transformers.TrainingArguments has no field '{key}'{did_you_mean(key, known_fields)}")


@cache
def _read_training_arguments_fields() -> frozenset[str]:
    """Return the fields of the installed TrainingArguments.

    They are read from its source, as an import would load torch.
    """
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        return frozenset()
    tree = ast.parse(Path(spec.origin).with_name("training_args.py").read_text(encoding="utf-8"))
    classes = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "TrainingArguments")
    return frozenset(n.target.id for c in classes for n in c.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name))
