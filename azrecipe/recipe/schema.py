"""Read the schema files, and check recipes by them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from azrecipe.errors import Problem, did_you_mean, suggest_choices
from azrecipe.recipe.overrides import format_key_path
from azrecipe.recipe.yaml_tree import Key, YamlNode, suggest_number
from azrecipe.utils import shipped_files

STAGES = ("tokenizer", "pretrain", "sft", "merge", "evaluate", "pipeline")
MAX_WORDS_SHOWN = 15  # messages abbreviate a longer list of allowed words
MAX_CHARACTERS_SHOWN = 200  # and a longer value
Schema = Mapping[str, Any]


@cache
def load_schema(name: str) -> Schema:
    """Return the content of a schema file: "pretrain", "common"."""
    loaded: Schema = json.loads((shipped_files.locate_root() / "schema" / f"{name}.json").read_text(encoding="utf-8"))
    return loaded


def resolve_ref(schema: Schema) -> Schema:
    """Return the definition behind a $ref.

    Keys beside the $ref are added. A schema without a $ref is returned unchanged.
    """
    while "$ref" in schema:
        definition: Any = load_schema("common")
        for part in schema["$ref"].partition("#/")[2].split("/"):
            definition = definition[part]
        schema = {**definition, **{key: value for key, value in schema.items() if key != "$ref"}}
    return schema


def subschema(schema: Schema, key: Key) -> Schema | None:
    """Return the schema of one key, or of a list's items.

    Returns None where the schema does not define the key.
    """
    schema = resolve_ref(schema)
    if isinstance(key, int):
        definition = schema.get("items")
    else:
        definition = schema.get("properties", {}).get(key, schema.get("additionalProperties"))
    return resolve_ref(definition) if isinstance(definition, Mapping) else None


def check_schema(root: YamlNode, stage: str) -> list[Problem]:
    """Return every problem of a merged tree with its stage's schema."""
    problems = []
    for error in _validator(stage).iter_errors(root.to_plain()):
        keys: tuple[Key, ...] = tuple(error.absolute_path)
        if error.validator == "additionalProperties":
            node = root.get(*keys, str(error.validator_value))
            assert node is not None
            problems.append(Problem(node.entry_location, error.message))
        else:
            is_name = "propertyNames" in error.absolute_schema_path
            node = root.find_nearest((*keys, error.instance) if is_name else keys)
            location = node.entry_location if is_name or error.validator in ("x-required", "x-exactly-one") else node.location
            problems.append(Problem(location, _format_error(error, keys)))
    return problems


def _validate_additional_keys(validator: Any, extra: Any, instance: Any, schema: Schema) -> Iterator[Any]:
    """additionalProperties, with one error for each unknown key."""
    from jsonschema import ValidationError

    properties = schema.get("properties", {})
    for key in [key for key in instance if key not in properties] if isinstance(instance, dict) else []:
        if extra is False:
            message = f"unknown key '{key}'{suggest_choices(key, properties, 'Allowed here')}"
            yield ValidationError(message, validator="additionalProperties", validator_value=key)
        elif isinstance(extra, dict):
            yield from validator.descend(instance[key], extra, path=key)


def _validate_required(_validator: Any, keys: list[str], instance: Any, schema: Schema) -> Iterator[Any]:
    """x-required: keys that a resolved recipe must have."""
    from jsonschema import ValidationError

    for key in [key for key in keys if key not in instance] if isinstance(instance, dict) else []:
        description = resolve_ref(schema.get("properties", {}).get(key, {})).get("description", "").split(". ")[0].rstrip(".")
        yield ValidationError(f"missing key '{key}'" + (f": {description}" if description else ""))


def _validate_exactly_one(_validator: Any, keys: list[str], instance: Any, _schema: Schema) -> Iterator[Any]:
    """x-exactly-one: keys of which a resolved recipe has exactly one."""
    from jsonschema import ValidationError

    present = [key for key in keys if key in instance] if isinstance(instance, dict) else keys[:1]
    if len(present) != 1:
        state = "there is none" if not present else f"there are {', '.join(present)}"
        yield ValidationError(f"give exactly one of {', '.join(keys)}: {state}")


@cache
def _validator(stage: str) -> Any:
    from jsonschema import Draft202012Validator, validators
    from referencing import Registry, Resource

    extend: Any = validators.extend
    keywords = {
        "additionalProperties": _validate_additional_keys,
        "x-required": _validate_required,
        "x-exactly-one": _validate_exactly_one,
    }
    validator_class = extend(Draft202012Validator, keywords)
    registry: Any = Registry().with_resources((f"{n}.json", Resource.from_contents(dict(load_schema(n)))) for n in (stage, "common"))
    return validator_class(load_schema(stage), registry=registry)


_TYPES = {
    "string": "text", "integer": "a whole number", "number": "a number", "boolean": "true or false", "array": "a list", "object": "a mapping", "null": "empty",
}  # fmt: skip


def _shorten(text: str) -> str:
    return text if len(text) <= MAX_CHARACTERS_SHOWN else f"{text[:MAX_CHARACTERS_SHOWN]}…"


def _describe_type(value: Any) -> str:
    if isinstance(value, bool):
        return "true/false"
    for kind, word in ((str, "text"), (int, "a whole number"), (float, "a number"), (list, "a list"), (dict, "a mapping")):
        if isinstance(value, kind):
            return word
    return "empty"


_BOUNDS = {
    "minimum": "too small: at least", "exclusiveMinimum": "too small: it must be above",
    "maximum": "too large: at most", "exclusiveMaximum": "too large: it must be below",
}  # fmt: skip
_BOOLEANS = {"yes": "true", "on": "true", "true": "true", "no": "false", "off": "false", "false": "false"}


def _suggest_value(text: str, kinds: Sequence[str]) -> str:
    """Return the end of a message: how to write such a value."""
    if "boolean" in kinds and (word := _BOOLEANS.get(text.strip().lower())):
        return f": write {word} without quotes" if text == word else f": write {word}"
    suggestion = suggest_number(text.strip()) if {"integer", "number"} & set(kinds) else None
    return f": {suggestion}" if suggestion else ""


def _format_error(error: Any, keys: tuple[Key, ...]) -> str:
    """Format a jsonschema error: the key, its value, the allowed values."""
    name, value, limit = format_key_path(keys) or "the recipe", error.instance, error.validator_value
    text = _shorten(json.dumps(value, ensure_ascii=False)) if not isinstance(value, (dict, list)) else _describe_type(value)
    match error.validator:
        case "type":
            kinds = [limit] if isinstance(limit, str) else limit
            advice = _suggest_value(value, kinds) if isinstance(value, str) else ""
            return f"{name} must be {' or '.join(_TYPES[kind] for kind in kinds)}, not {text if isinstance(value, (dict, list)) else f'{_describe_type(value)} ({text})'}{advice}"
        case "enum" | "anyOf":
            return f"{name} = {text} is not known{_list_allowed(value, limit)}"
        case "const":
            return f"{name} must be {limit}, not {text}"
        case "minimum" | "exclusiveMinimum" | "maximum" | "exclusiveMaximum":
            return f"{name} = {text} is {_BOUNDS[error.validator]} {limit}"
        case "minItems" | "minProperties" | "minLength":
            return f"{name} must not be empty"
        case "maxLength":
            name = f"the name {_shorten(value)}" if "propertyNames" in error.absolute_schema_path else name
            return f"{name} has {len(value):,} characters: at most {limit}"
        case "uniqueItems":
            return f"{name} names something twice"
        case "pattern":
            if "propertyNames" in error.absolute_schema_path:
                narrow = "letters, digits and _ only, a letter first"
                wide = "letters, digits, '-', '_' and '.' only, a letter or digit first"
                return f"{_shorten(repr(value))} is no name to use here: {wide if '.-' in limit else narrow}"
            kinds = {"ya?ml": "the file name of a recipe, ending in .yaml", "[0-9]{4}-": "a day, as in 2026-01-31"}
            kinds |= {
                r"ml\.": "an instance type of SageMaker, as in ml.p4d.24xlarge",
                "iam::": "a role's name, or its ARN (arn:aws:iam::…:role/…)",
            }
            expected = next((words for part, words in kinds.items() if part in limit), "letters, digits, '-', '_' and '.', no spaces")
            return f"{name} = {text} must be {expected}"
        case _:
            return f"{name}: {error.message}"


def _list_allowed(value: Any, choices: list[Any]) -> str:
    """List the words of an enum, or the words and patterns of anyOf."""
    values = [value for choice in choices for value in (choice.get("enum", ()) if isinstance(choice, Mapping) else (choice,))]
    words = [word if isinstance(word, str) else json.dumps(word) for word in values if word is not None]
    patterns = [f"what matches {choice['pattern']}" for choice in choices if isinstance(choice, Mapping) and "pattern" in choice]
    suggestion = did_you_mean(value, words) if isinstance(value, str) else ""
    total = f", … ({len(words)} in all)" if len(words) > MAX_WORDS_SHOWN else ""
    return f"{suggestion or '.'} Allowed: {', '.join([*words[:MAX_WORDS_SHOWN], *patterns])}{total}"


def fill_defaults(root: YamlNode, stage: str) -> Any:
    """Return plain data with every default of the schema.

    The tree must have no problems.
    """
    return _fill(root.to_plain(), load_schema(stage))


def _fill(value: Any, schema: Schema) -> Any:
    schema = resolve_ref(schema)
    if isinstance(value, list):
        items = schema.get("items", {})
        return [_fill(item, items) for item in value]
    if isinstance(value, float) and schema.get("type") == "integer":
        return int(value)  # 1e3
    if not isinstance(value, dict):
        return value
    filled = {}
    for key, definition in schema.get("properties", {}).items():
        if key in value:
            filled[key] = _fill(value[key], definition)
        elif "default" in (target := resolve_ref(definition)):
            filled[key] = _fill(target["default"], definition)
    extra = schema.get("additionalProperties", {})
    for key in value.keys() - filled.keys():
        filled[key] = _fill(value[key], extra) if isinstance(extra, Mapping) else value[key]
    ordered = [key for key in schema.get("properties", {}) if key in filled]
    return {key: filled[key] for key in [*ordered, *(k for k in value if k not in ordered)]}
