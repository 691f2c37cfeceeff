"""Rules of `stage: evaluate` that a schema cannot say: which languages there are, and names that must be there, or once only."""

from __future__ import annotations

from collections.abc import Iterator

from azrecipe.errors import Problem, did_you_mean, hint
from azrecipe.recipe.yaml_tree import Node

# What lingua tells apart, by ISO 639-1 code (a test holds this equal to the library's own list).
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


def check(root: Node) -> list[Problem]:
    """Problems of an evaluate recipe's tree, which may have failed its schema."""
    return [*_baseline(root), *_languages(root), *_tasks(root)]


def _baseline(root: Node) -> Iterator[Problem]:
    baseline, models = root.get("baseline"), root.get("models")
    if baseline and models and isinstance(baseline.value, str) and isinstance(models.value, dict) and baseline.value not in models.value:
        yield Problem(baseline.place, f"baseline names no model: '{baseline.value}'{hint(baseline.value, models.value, 'Models')}")


def _languages(root: Node) -> Iterator[Problem]:
    listed = root.get("languages")
    asked = [root.get("language"), *(listed.value if listed and isinstance(listed.value, list) else [])]
    asked += [prompt.get("language") for prompt in _items(root.get("prompts"))]
    for node in asked:
        if node is not None and isinstance(node.value, str) and node.value not in LANGUAGES:
            yield Problem(node.place, f"lingua knows no language '{node.value}'{_nearest(node.value)} Languages: {', '.join(LANGUAGES)}")


def _nearest(word: str) -> str:
    """`; did you mean 'az' (Azerbaijani)?`, for a code, a name or a longer code that is near one."""
    names = {name.lower(): code for code, name in LANGUAGES.items()}
    near = did_you_mean(word.lower(), [*LANGUAGES, *names])
    found = near.split("'")[1] if near else ""
    code = names.get(found, found)
    return f"; did you mean '{code}' ({LANGUAGES[code]})?" if code else "."


def _tasks(root: Node) -> Iterator[Problem]:
    seen: dict[str, Node] = {}
    for item in _items(root.get("tasks")):
        node = item if isinstance(item.value, str) else item.get("task")
        if node is None or not isinstance(node.value, str):
            continue
        if node.value in seen:
            yield Problem(node.place, f"the task {node.value} stands already at {seen[node.value].place}: its results would have one name")
        seen.setdefault(node.value, node)


def _items(node: Node | None) -> list[Node]:
    return node.value if node is not None and isinstance(node.value, list) else []
