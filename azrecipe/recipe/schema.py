"""The law: the schema files, each key's definition, and what jsonschema finds wrong, said in words."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from azrecipe.errors import Problem, did_you_mean, hint
from azrecipe.recipe.overrides import dotted
from azrecipe.recipe.yaml_tree import Key, Node
from azrecipe.utils import shipped_files

STAGES = ("tokenizer", "pretrain", "sft", "evaluate", "pipeline")
SHOWN = 15  # a longer list of allowed words is cut in messages
Schema = Mapping[str, Any]


@cache
def document(name: str) -> Schema:
    """A schema file as it stands: document("pretrain"), document("common")."""
    loaded: Schema = json.loads((shipped_files.root() / "schema" / f"{name}.json").read_text(encoding="utf-8"))
    return loaded


def follow(schema: Schema) -> Schema:
    """The definition behind a $ref, with what stands beside it; the schema itself where there is none."""
    while "$ref" in schema:
        definition: Any = document("common")
        for part in schema["$ref"].partition("#/")[2].split("/"):
            definition = definition[part]
        schema = {**definition, **{key: value for key, value in schema.items() if key != "$ref"}}
    return schema


def below(schema: Schema, key: Key) -> Schema | None:
    """The definition of one key of a mapping, or of a list's items; None where the schema says nothing of it."""
    schema = follow(schema)
    if isinstance(key, int):
        found = schema.get("items")
    else:
        found = schema.get("properties", {}).get(key, schema.get("additionalProperties"))
    return follow(found) if isinstance(found, Mapping) else None


def check(root: Node, stage: str) -> list[Problem]:
    """Every way in which a merged tree breaks the schema of its stage, each at its place."""
    problems = []
    for error in _validator(stage).iter_errors(root.plain()):
        keys: tuple[Key, ...] = tuple(error.absolute_path)
        if error.validator == "additionalProperties":
            node = root.get(*keys, str(error.validator_value))
            assert node is not None
            problems.append(Problem(node.at, error.message))
        else:
            named = "propertyNames" in error.absolute_schema_path
            node = root.nearest((*keys, error.instance) if named else keys)
            at = node.at if named or error.validator in ("x-required", "x-exactly-one") else node.place
            problems.append(Problem(at, _words(error, keys)))
    return problems


def _closed(validator: Any, extra: Any, instance: Any, schema: Schema) -> Iterator[Any]:
    """additionalProperties, with one error for each unknown key."""
    from jsonschema import ValidationError

    known = schema.get("properties", {})
    for key in [key for key in instance if key not in known] if isinstance(instance, dict) else []:
        if extra is False:
            message = f"unknown key '{key}'{hint(key, known, 'Allowed here')}"
            yield ValidationError(message, validator="additionalProperties", validator_value=key)
        elif isinstance(extra, dict):
            yield from validator.descend(instance[key], extra, path=key)


def _required(_validator: Any, keys: list[str], instance: Any, schema: Schema) -> Iterator[Any]:
    """x-required: what a resolved recipe must have."""
    from jsonschema import ValidationError

    for key in [key for key in keys if key not in instance] if isinstance(instance, dict) else []:
        what = follow(schema.get("properties", {}).get(key, {})).get("description", "").split(". ")[0].rstrip(".")
        yield ValidationError(f"missing key '{key}'" + (f": {what}" if what else ""))


def _exactly_one(_validator: Any, keys: list[str], instance: Any, _schema: Schema) -> Iterator[Any]:
    """x-exactly-one: alternatives of which a resolved recipe has one."""
    from jsonschema import ValidationError

    found = [key for key in keys if key in instance] if isinstance(instance, dict) else keys[:1]
    if len(found) != 1:
        have = "there is none" if not found else f"there are {', '.join(found)}"
        yield ValidationError(f"give exactly one of {', '.join(keys)}: {have}")


@cache
def _validator(stage: str) -> Any:
    from jsonschema import Draft202012Validator, validators
    from referencing import Registry, Resource

    extend: Any = validators.extend
    kind = extend(Draft202012Validator, {"additionalProperties": _closed, "x-required": _required, "x-exactly-one": _exactly_one})
    registry: Any = Registry().with_resources((f"{n}.json", Resource.from_contents(dict(document(n)))) for n in (stage, "common"))
    return kind(document(stage), registry=registry)


_TYPES = {
    "string": "text", "integer": "a whole number", "number": "a number", "boolean": "true or false", "array": "a list", "object": "a mapping",
}  # fmt: skip


def _type_of(value: Any) -> str:
    if isinstance(value, bool):
        return "true/false"
    for kind, word in ((str, "text"), (int, "a whole number"), (float, "a number"), (list, "a list"), (dict, "a mapping")):
        if isinstance(value, kind):
            return word
    return "empty"


def _words(error: Any, keys: tuple[Key, ...]) -> str:
    """A jsonschema error as a sentence: the key, what it holds, what it may hold."""
    name, value, limit = dotted(keys) or "the recipe", error.instance, error.validator_value
    shown = json.dumps(value, ensure_ascii=False) if not isinstance(value, (dict, list)) else _type_of(value)
    match error.validator:
        case "type":
            kinds = [limit] if isinstance(limit, str) else limit
            return f"{name} must be {' or '.join(_TYPES[kind] for kind in kinds)}, not {shown if isinstance(value, (dict, list)) else f'{_type_of(value)} ({shown})'}"
        case "enum":
            limit = [word for word in limit if word is not None]
            near = did_you_mean(value, limit) if isinstance(value, str) else ""
            more = f", … ({len(limit)} in all)" if len(limit) > SHOWN else ""
            return f"{name} = {shown} is not known{near or '.'} Allowed: {', '.join(limit[:SHOWN])}{more}"
        case "const":
            return f"{name} must be {limit}, not {shown}"
        case "minimum":
            return f"{name} = {shown} is too small: at least {limit}"
        case "exclusiveMinimum":
            return f"{name} = {shown} is too small: it must be above {limit}"
        case "maximum":
            return f"{name} = {shown} is too large: at most {limit}"
        case "exclusiveMaximum":
            return f"{name} = {shown} is too large: it must be below {limit}"
        case "minItems" | "minProperties" | "minLength":
            return f"{name} must not be empty"
        case "uniqueItems":
            return f"{name} names something twice"
        case "pattern":
            if "propertyNames" in error.absolute_schema_path:
                narrow = "letters, digits and _ only, a letter first"
                wide = "letters, digits, '-', '_' and '.' only, a letter or digit first"
                return f"'{value}' is no name to use here: {wide if '.-' in limit else narrow}"
            kinds = {"ya?ml": "the file name of a recipe, ending in .yaml", "[0-9]{4}-": "a day, as in 2026-01-31"}
            kinds |= {
                r"ml\.": "an instance type of SageMaker, as in ml.p4d.24xlarge",
                "iam::": "a role's name, or its ARN (arn:aws:iam::…:role/…)",
            }
            hint = next((words for part, words in kinds.items() if part in limit), "letters, digits, '-', '_' and '.', no spaces")
            return f"{name} = {shown} must be {hint}"
        case _:
            return f"{name}: {error.message}"


def finish(root: Node, stage: str) -> Any:
    """Plain data with every default of the schema filled in. The tree must have passed `check`."""
    return _fill(root.plain(), document(stage))


def _fill(value: Any, schema: Schema) -> Any:
    schema = follow(schema)
    if isinstance(value, list):
        items = schema.get("items", {})
        return [_fill(item, items) for item in value]
    if not isinstance(value, dict):
        return value
    filled = {}
    for key, definition in schema.get("properties", {}).items():
        if key in value:
            filled[key] = _fill(value[key], definition)
        elif "default" in (target := follow(definition)):
            filled[key] = _fill(target["default"], definition)
    extra = schema.get("additionalProperties", {})
    for key in value.keys() - filled.keys():
        filled[key] = _fill(value[key], extra) if isinstance(extra, Mapping) else value[key]
    known = [key for key in schema.get("properties", {}) if key in filled]
    return {key: filled[key] for key in [*known, *(k for k in value if k not in known)]}
