"""docs/recipes.md, written from schema/: `python -m azrecipe.recipe.reference > docs/recipes.md`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from azrecipe.recipe.schema import STAGES, Schema, document, follow

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
| `null`, `~`, nothing | no value: removes the key |
| anything else: `no`, `on`, `True`, `2024-01-01`, `0x10`, `.inf` | text |

Keys are always text. Tags (`!!str`) are refused, `<<` is an ordinary (so an unknown) key, and a file holds at most 20,000
values, its aliases multiplied out.

**Inheritance.** `extends: base.yaml` starts from another recipe, which may extend a further one. Mappings merge, lists and
scalars replace, `null` removes an inherited key. Alternatives exclude each other: a file that sets one of `name_or_path`,
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
else is a name on the Hugging Face hub. On the command line `recipes/…` and `accelerate_configs/…` that do not exist in the
working folder are looked up among the files that ship with azrecipe.

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


def generate() -> str:
    """The whole reference, as GitHub's Markdown."""
    contents = [f"- [`stage: {stage}`](#stage-{stage}): {document(stage)['description']}" for stage in STAGES]
    contents.append("- [Shared keys](#shared-keys), and sources of text")
    parts = [PREFACE, "\n".join(contents), *(part for stage in STAGES for part in _stage(stage)), *_shared()]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _stage(stage: str) -> Iterator[str]:
    schema = document(stage)
    yield f"## stage: {stage}"
    for path, definition in objects(schema):
        if path:
            yield f"### {stage}: `{path}`"
        yield _object(path, definition)


def _shared() -> Iterator[str]:
    definitions: Mapping[str, Schema] = document("common")["$defs"]
    names = _names()
    yield "## Shared keys"
    rows = [_row(names[name], {"$ref": name, **schema}, name) for name, schema in definitions.items() if "properties" not in schema]
    yield "\n".join([_HEAD, *rows])
    for name, schema in definitions.items():
        if "properties" in schema:
            yield f'<a id="{name}"></a>\n\n### Shared: {name.replace("_", " ")}'
            yield _object("", schema)


def _names() -> dict[str, str]:
    """For each shared definition the key that it is used under (`dataset_path` is the `path` of a source)."""
    found = {}
    for name in ("common", *STAGES):
        mappings = document("common")["$defs"].values() if name == "common" else [below for _, below in objects(document(name))]
        for mapping in mappings:
            found.update({_ref(raw): key for key, raw in mapping.get("properties", {}).items() if "$ref" in raw})
    return {name: found.get(name, name) for name in document("common")["$defs"]}


def objects(schema: Schema, path: str = "") -> Iterator[tuple[str, Schema]]:
    """Every mapping with keys of its own in a stage's schema, and its path; not those behind a $ref."""
    if "properties" in schema:
        yield path, schema
    for key, below in schema.get("properties", {}).items():
        yield from objects(below, f"{path}.{key}" if path else key)
    for suffix, keyword in (("[]", "items"), (".<name>", "additionalProperties")):
        if isinstance(below := schema.get(keyword), Mapping):
            yield from objects(below, path + suffix)


def _object(path: str, schema: Schema) -> str:
    required, alternatives = schema.get("x-required", []), schema.get("x-exactly-one", [])
    rules = [f"Required: {_codes(required)}."] if required else []
    rules += [f"Exactly one of: {_codes(alternatives)}."] if alternatives else []
    rows = []
    for key, raw in schema["properties"].items():
        standing = "required" if key in required else "one of" if key in alternatives else ""
        rows.append(_row(f"{path}.{key}" if path else key, raw, standing=standing))
    return "\n\n".join(text for text in (_escape(schema["description"]), " ".join(rules), "\n".join([_HEAD, *rows])) if text)


def _row(key: str, raw: Schema, anchor: str = "", standing: str = "") -> str:
    """One line of a table. `anchor` makes it the place that links to a shared definition lead to."""
    schema = raw if anchor else follow(raw)
    description = _escape(schema["description"])
    cell = f"`{key}`"
    if anchor:
        cell = f'<a id="{anchor}"></a>{cell}'
    elif "$ref" in raw:
        cell = f"[{cell}](#{_ref(raw)})"
        description = description.partition(". ")[0].rstrip(".") + "."
    mark = " ↻" if schema.get("x-changes-weights") is False else ""
    return f"| {cell}{mark} | {_type(schema)} | {_default(schema, standing)} | {_allowed(schema)} | {description} |"


def _ref(raw: Schema) -> str:
    return str(raw["$ref"]).rpartition("/")[2]


def _type(schema: Schema) -> str:
    if "const" in schema:
        return "text"
    kinds = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
    return " or ".join(_kind(kind, schema) for kind in kinds)


def _kind(kind: str, schema: Schema) -> str:
    if kind == "array":
        return f"list of {_inner(schema.get('items', {}))}"
    extra = schema.get("additionalProperties")
    if kind == "object" and isinstance(extra, Mapping):
        return f"names to {_inner(extra)}"
    return _TYPES[kind]


def _inner(raw: Schema) -> str:
    if "$ref" in raw:
        return f"[{_ref(raw).replace('_', ' ')}](#{_ref(raw)})"
    return _type(raw)


def _default(schema: Schema, standing: str) -> str:
    default = schema.get("default")
    if standing or default is None or (default == {} and "properties" in schema):
        return standing
    return f"`{json.dumps(default, ensure_ascii=False)}`"


def _allowed(schema: Schema) -> str:
    found = [f"`{schema['const']}`"] if "const" in schema else []
    values = schema if "enum" in schema else schema["items"] if "enum" in schema.get("items", {}) else {}
    found += [_codes(values.get("enum", []))]
    found += [f"{sign} {schema[key]:,}" for key, sign in (_LOWER | _UPPER).items() if key in schema]
    found += [f"`{where['pattern']}`" for where in (schema, schema.get("propertyNames", {})) if "pattern" in where]
    found += ["not empty" for key in ("minLength", "minItems", "minProperties") if key in schema][:1]
    found += ["none twice"] if schema.get("uniqueItems") else []
    return _escape(", ".join(text for text in found if text))


def _codes(words: Any) -> str:
    return ", ".join(f"`{word}`" for word in words)


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    sys.stdout.write(generate())
