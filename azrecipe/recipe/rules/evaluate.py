"""Rules of `stage: evaluate`: languages and names."""

from __future__ import annotations

from collections.abc import Iterator

from azrecipe.errors import Problem, did_you_mean, suggest_choices
from azrecipe.recipe.yaml_tree import YamlNode

# The languages that lingua detects, by ISO 639-1 code (a test compares them with the library's list).
LANGUAGES = {
    "af": "Afrikaans", "ar": "Arabic", "az": "Azerbaijani", "be": "Belarusian", "bg": "Bulgarian", "bn": "Bengali", "bs": "Bosnian",
    "ca": "Catalan", "cs": "Czech", "cy": "Welsh", "da": "Danish", "de": "German", "el": "Greek", "en": "English", "eo": "Esperanto",
    "es": "Spanish", "et": "Estonian", "eu": "Basque", "fa": "Persian", "fi": "Finnish", "fr": "French", "ga": "Irish", "gu": "Gujarati",
    "he": "Hebrew", "hi": "Hindi", "hr": "Croatian", "hu": "Hungarian", "hy": "Armenian", "id": "Indonesian", "is": "Icelandic",
    "it": "Italian", "ja": "Japanese", "ka": "Georgian", "kk": "Kazakh", "ko": "Korean", "la": "Latin", "lg": "Ganda", "lt": "Lithuanian",
    "lv": "Latvian", "mi": "Maori", "mk": "Macedonian", "mn": "Mongolian", "mr": "Marathi", "ms": "Malay", "nb": "Bokmal", "nl": "Dutch",
    "nn": "Nynorsk", "pa": "Punjabi", "pl": "Polish", "pt": "Portuguese", "ro": "Romanian", "ru": "Russian", "sk": "Slovak",
    "sl": "Slovene", "sn": "Shona", "so": "Somali", "sq": "Albanian", "sr": "Serbian", "st": "Sotho", "sv": "Swedish", "sw": "Swahili",
    "ta": "Tamil", "te": "Telugu", "th": "Thai", "tl": "Tagalog", "tn": "Tswana", "tr": "Turkish", "ts": "Tsonga", "uk": "Ukrainian",
    "ur": "Urdu", "vi": "Vietnamese", "xh": "Xhosa", "yo": "Yoruba", "zh": "Chinese", "zu": "Zulu",
}  # fmt: skip


def check_evaluate(root: YamlNode) -> list[Problem]:
    """Return the problems of a tree, which may have failed its schema."""
    return [*check_distinct_models(root), *_check_baseline(root), *_check_languages(root), *_check_unread(root), *_check_tasks(root)]


def check_distinct_models(root: YamlNode) -> Iterator[Problem]:
    """Find models that are named twice."""
    models, names = root.get("models"), dict[str, str]()
    for name, model in models.value.items() if models and isinstance(models.value, dict) else ():
        source = repr(sorted(model.to_plain().items())) if isinstance(model.value, dict) and model.value else None
        if source is not None and source in names:
            yield Problem(model.entry_location, f"'{name}' is the same model as '{names[source]}': name it once")
        elif source is not None:
            names[source] = name


def _check_baseline(root: YamlNode) -> Iterator[Problem]:
    baseline, models = root.get("baseline"), root.get("models")
    if baseline and models and isinstance(baseline.value, str) and isinstance(models.value, dict) and baseline.value not in models.value:
        advice = suggest_choices(baseline.value, models.value, "Models")
        yield Problem(baseline.location, f"baseline names no model: '{baseline.value}'{advice}")


def _check_languages(root: YamlNode) -> Iterator[Problem]:
    languages = [root.get("language"), *_get_items(root.get("languages"))]
    languages += [prompt.get("language") for prompt in _get_items(root.get("prompts"))]
    for node in languages:
        if node is not None and isinstance(node.value, str) and node.value not in LANGUAGES:
            suggestion = _suggest_language(node.value)
            yield Problem(node.location, f"lingua knows no language '{node.value}'{suggestion} Languages: {', '.join(LANGUAGES)}")


def _check_unread(root: YamlNode) -> Iterator[Problem]:
    """Find keys that nothing reads in this recipe."""
    has_language = root.get("language") is not None or any(prompt.get("language") for prompt in _get_items(root.get("prompts")))
    if (node := root.get("languages")) is not None and not has_language:
        yield Problem(node.entry_location, "languages is what `language` is decided among, and no language is expected: say `language:`")


def _suggest_language(word: str) -> str:
    """Return `; did you mean 'az' (Azerbaijani)?`.

    It names a language with a similar code or name; "." where there is none.
    """
    codes = {name.lower(): code for code, name in LANGUAGES.items()}
    suggestion = did_you_mean(word.lower(), [*LANGUAGES, *codes])
    match = suggestion.split("'")[1] if suggestion else ""
    code = codes.get(match, match)
    return f"; did you mean '{code}' ({LANGUAGES[code]})?" if code else "."


def _check_tasks(root: YamlNode) -> Iterator[Problem]:
    first_nodes: dict[str, YamlNode] = {}
    for item in _get_items(root.get("tasks")):
        node = item if isinstance(item.value, str) else item.get("task")
        if node is None or not isinstance(node.value, str):
            continue
        if node.value in first_nodes:
            message = f"the task {node.value} is already at {first_nodes[node.value].location}: both results would have the same name"
            yield Problem(node.location, message)
        first_nodes.setdefault(node.value, node)


def _get_items(node: YamlNode | None) -> list[YamlNode]:
    return node.value if node is not None and isinstance(node.value, list) else []
