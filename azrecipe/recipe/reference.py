"""Generate docs/recipes.md from schema/.

Run `python -m azrecipe.recipe.reference > docs/recipes.md`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from azrecipe.recipe.schema import STAGES, Schema, load_schema, resolve_ref

PREFACE = """\
# Recipes

<!-- Generated from schema/ by `python -m azrecipe.recipe.reference > docs/recipes.md`. Change the schema, not this file. -->

A recipe is one YAML file that says what one stage of one job does. It names no hardware: the launcher decides that.
What a run leaves behind is described in [design.md](design.md), how its numbers are computed in [metrics.md](metrics.md).

## The language

**Schema.** `stage` picks one of the closed schemas below. An unknown key is an error with its place and the nearest known
key, and so is a duplicate key. Every default is in the schema; `azrecipe show RECIPE` prints the recipe with all of them
filled in. A first comment `# yaml-language-server: $schema=…/schema/<stage>.json` makes an editor complete and check keys.

**YAML.** UTF-8, one document. An unquoted scalar means:

| written | read as |
| --- | --- |
| `5_000`, `-3` | a whole number |
| `1.5`, `2e-5`, `1_000.0` | a number |
| `true`, `false` | the only booleans |
| `null`, `~`, nothing | no value: removes an inherited key |
| anything else: `no`, `on`, `True`, `2024-01-01`, `0x10`, `.inf` | text |

Keys are always text. Tags (`!!str`) are refused, `<<` is an ordinary (so an unknown) key, and a file holds at most 20,000
values, its aliases multiplied out.

**Inheritance.** `extends: base.yaml` starts from another recipe, which may extend a further one. Mappings merge, lists and
scalars replace, `null` removes an inherited key. An unknown key is an error with `null` too, and so is a name of your own choice
(a candidate, a validation set) whose `null` removes nothing. Alternatives exclude each other: a file that sets one of `name_or_path`,
`output_of`, `config`, `family`, or one of `max_steps`, `max_tokens`, `max_bytes`, `num_train_epochs`, drops the inherited
other ones in that mapping (and the `revision` or `vocab_size` that belonged to them). A file with `fragment: true` is only
extended, never run, and is checked through the recipes that extend it.

**Variables.** `variables:` holds scalars. `${name}` in a value takes one: a value that is only `${name}` keeps its type,
`$${` is a literal `${`. Keys, and the values of `variables:` itself, are left as they are. A variable that is not defined is
an error, and so is one that a file sets though nothing that it extends declares it and no value takes it.

**Overrides.** `--set key.path=value` puts one value in place, after inheritance and before variables, read in the same YAML
and checked like the file: `--set data.max_length=4096`, `--set data.datasets[0].weight=0.5`, `--set variables.language=kaz_Cyrl`,
`--set training.eval_steps=null`. A list position must exist. A mapping merges with what is there.

**Results of other recipes.** `output_of: tokenizer.yaml` takes the `final/` folder of that recipe's run in the same project
and the same runs directory; that run must be complete. `continue_from` goes on in that run's data.

**Pipelines.** `steps` names recipes, each known by its file name. They run in that order, each in processes of its own, under
the pipeline's `project`. Its `variables` replace those of the same name that a step declares. `set:` changes single steps (`set: {sft.yaml:
{lora.r: 8}}`), and on the command line `--set sft.yaml:lora.r=8` does, which wins. `--step sft.yaml` runs or shows one step.

**Paths.** A relative path is relative to the file that it stands in: one in a pipeline's `set:` to the pipeline, one
from `--set` to the working folder. A dataset's `path` is local if it begins with `./`, `../`, `/` or `~`, or ends in `.jsonl`,
`.txt`, `.parquet`, `.jsonl.gz` or `.txt.gz`; a model's or tokenizer's `name_or_path` if it begins with one of the former. Anything
else is a name on the Hugging Face hub, and is refused where a file or folder of that name is here: write `./name` for that one.
On the command line `recipes/…` and `accelerate_configs/…` that do not exist in the working folder are looked up among the files
that ship with azrecipe.

**Before a run.** `azrecipe validate` reads recipes only. Each step of a pipeline is checked by what the steps before it will make:
a model, a tokenizer, a chat template, positions, held-out conversations. `azrecipe check` also reads the text, and builds models
without their weights. A step whose upstream recipes have no run is checked too, but not what depends on their tokens and weights:
lengths in tokens, and rows that are left out.

**Commands.** `azrecipe validate`, `show` and `run` take a recipe; `accelerate launch … -m azrecipe RECIPE` and torchrun run one in
the processes that they start. Exit codes of `azrecipe`:

| code | meaning |
| --- | --- |
| 0 | done, or already complete |
| 1 | the run failed |
| 2 | the recipe or the command is wrong |
| 3 | the environment cannot do it: memory, disk, network, GPU, package |
| 130, 143 | interrupted by SIGINT or SIGTERM, a checkpoint saved where training had begun; the same command goes on |

`accelerate launch` and torchrun end with a code of their own; a run that had begun leaves its code in `status.json`.

## How to read the tables

A path with dots leads through mappings, `[]` stands for each element of a list, `<name>` for a name of your choice. A linked
key is shared by several stages and described in full under [Shared keys](#shared-keys). "one of" stands where exactly one of
several keys must be given. ↻ marks a key that may change while a run is unfinished: the run goes on with the new value. With any
other key changed its run directory is refused.
"""

_TYPES = {"string": "text", "integer": "whole number", "number": "number", "boolean": "true or false", "array": "list", "object": "mapping"}
_LOWER = {"minimum": "≥", "exclusiveMinimum": ">"}
_UPPER = {"maximum": "≤", "exclusiveMaximum": "<"}
_HEAD = "| key | type | default | allowed | description |\n| --- | --- | --- | --- | --- |"


def generate_reference() -> str:
    """Return the reference as GitHub Markdown."""
    contents = [f"- [`stage: {stage}`](#stage-{stage}): {load_schema(stage)['description']}" for stage in STAGES]
    contents.append("- [Shared keys](#shared-keys), and sources of text")
    parts = [PREFACE, "\n".join(contents), *(part for stage in STAGES for part in _format_stage(stage)), *_format_shared_keys()]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _format_stage(stage: str) -> Iterator[str]:
    schema = load_schema(stage)
    yield f"## stage: {stage}"
    for path, definition in iter_objects(schema):
        if path:
            yield f"### {stage}: `{path}`"
        yield _format_object(path, definition)


def _format_shared_keys() -> Iterator[str]:
    definitions: Mapping[str, Schema] = load_schema("common")["$defs"]
    names = _map_key_names()
    yield "## Shared keys"
    rows = [_format_row(names[name], {"$ref": name, **schema}, name) for name, schema in definitions.items() if "properties" not in schema]
    yield "\n".join([_HEAD, *rows])
    for name, schema in definitions.items():
        if "properties" in schema:
            yield f'<a id="{name}"></a>\n\n### Shared: {name.replace("_", " ")}'
            yield _format_object("", schema)


def _map_key_names() -> dict[str, str]:
    """Return the key under which each shared definition is used.

    For example `dataset_path` is the `path` of a source.
    """
    keys = {}
    for name in ("common", *STAGES):
        mappings = load_schema("common")["$defs"].values() if name == "common" else [child for _, child in iter_objects(load_schema(name))]
        for mapping in mappings:
            keys.update({_get_ref_name(raw): key for key, raw in mapping.get("properties", {}).items() if "$ref" in raw})
    return {name: keys.get(name, name) for name in load_schema("common")["$defs"]}


def iter_objects(schema: Schema, path: str = "") -> Iterator[tuple[str, Schema]]:
    """Yield the paths and mappings of a schema.

    Mappings behind a $ref are left out.
    """
    if "properties" in schema:
        yield path, schema
    for key, child in schema.get("properties", {}).items():
        yield from iter_objects(child, f"{path}.{key}" if path else key)
    for suffix, keyword in (("[]", "items"), (".<name>", "additionalProperties")):
        if isinstance(child := schema.get(keyword), Mapping):
            yield from iter_objects(child, path + suffix)


def _format_object(path: str, schema: Schema) -> str:
    required, alternatives = schema.get("x-required", []), schema.get("x-exactly-one", [])
    rules = [f"Required: {_format_codes(required)}."] if required else []
    rules += [f"Exactly one of: {_format_codes(alternatives)}."] if alternatives else []
    rows = []
    for key, raw in schema["properties"].items():
        requirement = "required" if key in required else "one of" if key in alternatives else ""
        rows.append(_format_row(f"{path}.{key}" if path else key, raw, requirement=requirement))
    return "\n\n".join(text for text in (_escape(schema["description"]), " ".join(rules), "\n".join([_HEAD, *rows])) if text)


def _format_row(key: str, raw: Schema, anchor: str = "", requirement: str = "") -> str:
    """Return one row of a table.

    `anchor` is the target of links to a shared definition.
    """
    schema = raw if anchor else resolve_ref(raw)
    description = _escape(schema["description"])
    cell = f"`{key}`"
    if anchor:
        cell = f'<a id="{anchor}"></a>{cell}'
    elif "$ref" in raw:
        cell = f"[{cell}](#{_get_ref_name(raw)})"
        description = description.partition(". ")[0].rstrip(".") + "."
    mark = " ↻" if schema.get("x-changes-weights") is False else ""
    return f"| {cell}{mark} | {_format_type(schema)} | {_format_default(schema, requirement)} | {_format_limits(schema)} | {description} |"


def _get_ref_name(raw: Schema) -> str:
    return str(raw["$ref"]).rpartition("/")[2]


def _format_type(schema: Schema) -> str:
    if "const" in schema:
        return "text"
    kinds = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
    return " or ".join(_format_kind(kind, schema) for kind in kinds)


def _format_kind(kind: str, schema: Schema) -> str:
    if kind == "array":
        return f"list of {_format_element_type(schema.get('items', {}))}"
    extra = schema.get("additionalProperties")
    if kind == "object" and isinstance(extra, Mapping):
        return f"names to {_format_element_type(extra)}"
    return _TYPES[kind]


def _format_element_type(raw: Schema) -> str:
    if "$ref" in raw:
        return f"[{_get_ref_name(raw).replace('_', ' ')}](#{_get_ref_name(raw)})"
    return _format_type(raw)


def _format_default(schema: Schema, requirement: str) -> str:
    default = schema.get("default")
    if requirement or default is None or (default == {} and "properties" in schema):
        return requirement
    return f"`{json.dumps(default, ensure_ascii=False)}`"


def _format_limits(schema: Schema) -> str:
    limits = [f"`{schema['const']}`"] if "const" in schema else []
    values = schema if "enum" in schema else schema["items"] if "enum" in schema.get("items", {}) else {}
    limits += [_format_codes(values.get("enum", []))]
    for choice in schema.get("anyOf", []):
        limits += [_format_codes(choice.get("enum", []))] + ([f"`{choice['pattern']}`"] if "pattern" in choice else [])
    limits += [f"{sign} {schema[key]:,}" for key, sign in (_LOWER | _UPPER).items() if key in schema]
    for node in (schema, schema.get("propertyNames", {})):
        limits += [f"`{_shorten_pattern(node['pattern'])}`"] if "pattern" in node else []
        limits += [f"at most {node['maxLength']} characters"] if "maxLength" in node else []
    limits += ["not empty" for key in ("minLength", "minItems", "minProperties") if key in schema][:1]
    limits += ["none twice"] if schema.get("uniqueItems") else []
    return _escape(", ".join(text for text in limits if text))


def _shorten_pattern(pattern: str) -> str:
    """Return a pattern without the parts that refuse line breaks."""
    return pattern.removeprefix(r"^[^\x00-\x1f]+").replace(r"$(?!\n)", "$")


def _format_codes(words: Any) -> str:
    return ", ".join(f"`{word if isinstance(word, str) else json.dumps(word)}`" for word in words)


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    sys.stdout.write(generate_reference())
