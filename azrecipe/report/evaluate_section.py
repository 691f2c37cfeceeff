"""Knows how a page shows an evaluation: each measure as a table of models, differences, and what the models wrote, side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from azrecipe.report.html import Html, Part, folded, joined, listing, plots, table, tables, tag
from azrecipe.report.number_format import PERCENT, WRITTEN, number
from azrecipe.report.svg_plots import Frame, Point, steps
from azrecipe.runs.reader import Run

TITLES = {
    "bpb": "Bits per byte, lower is better",
    "fertility": "Fertility: tokens a word",
    "bytes_per_token": "Bytes a token",
    "generations": "What was written after the prompts",
    "answers": "Answers to held-out conversations",
    "tasks": "Tasks",
}
# Keys of a model that are no measure, and of a generation that are not said in small print.
_NO_MEASURE = ("path", "parameters", "vocab_size", "samples", "answer_samples")
_NO_NOTE = ("prompt", "output", "messages", "text")
CHANGES = ("differences", "difference", "changes")


def facts(run: Run) -> dict[str, str]:
    """The headline: the last model against the first."""
    models = run.result.get("models", {})
    if not models:
        return {}
    first, last = (models[name] for name in (next(iter(models)), list(models)[-1]))
    bpb = {name: f"{value(first['bpb'].get(name))} → {value(last['bpb'][name])}" for name in last.get("bpb", {}) if "bpb" in first}
    return {"models": number(len(models)), **{f"bits per byte, {name}": said for name, said in bpb.items()}}


def parts(run: Run) -> Iterator[Part]:
    """What was measured and written."""
    result = run.result
    models: Mapping[str, Mapping[str, Any]] = result.get("models", {})
    if not models:
        return
    yield from of_models(models)
    yield Part("Differences", tables(_differences(result)))
    yield Part("Held-out text", _texts(result.get("validation", {})))


def of_models(models: Mapping[str, Mapping[str, Any]]) -> Iterator[Part]:
    """Models side by side, of one evaluation or of several."""
    rows = [
        [name, number(told.get("parameters")), number(told.get("vocab_size")), str(told.get("path", ""))] for name, told in models.items()
    ]
    yield Part("Models", table("What was measured", ["model", "parameters", "vocabulary", "from"], rows))
    yield Part("Measures", measures(models))
    yield Part("Samples", samples(models))


def measures(models: Mapping[str, Mapping[str, Any]]) -> Html:
    """Every measure that the models have."""
    return joined([plots([(_plot(models), "")]), tables(_tables(models))])


def _plot(models: Mapping[str, Mapping[str, Any]]) -> Html:
    """Bits per byte of each model, set by set."""
    names = list(models)
    sets = dict.fromkeys(name for told in models.values() for name in told.get("bpb", {}))
    series = {
        dataset: [
            Point(name, nth, plain(told["bpb"][dataset]) or 0.0, interval(told["bpb"][dataset]))
            for nth, (name, told) in enumerate(models.items())
            if plain(told.get("bpb", {}).get(dataset)) is not None
        ]
        for dataset in sets
    }
    if len(names) < 2 or not any(series.values()):
        return Html("")
    return steps(Frame("Bits per byte of held-out text", "", "bits per byte", leaning=len(names) > 3), names, series)


def _tables(models: Mapping[str, Mapping[str, Any]]) -> Iterator[Html]:
    """A table for each measure that models have, those known here first; intervals stand below the values."""
    keys = dict.fromkeys([*TITLES, *(key for told in models.values() for key in told)])
    for key in keys:
        if key in _NO_MEASURE or key in CHANGES:
            continue
        yield _table(_title(key, models), {name: told.get(key) for name, told in models.items()}, key)


def _differences(result: Mapping[str, Any]) -> Iterator[Html]:
    """Differences to the first model, wherever they stand: beside the models or in each of them."""
    models = result["models"]
    for key in CHANGES:
        of_models = {name: told[key] for name, told in models.items() if key in told}
        found = of_models or result.get(key) or {}
        if not isinstance(found, Mapping):
            continue
        measures = dict.fromkeys(measure for told in found.values() if isinstance(told, Mapping) for measure in told)
        for measure in measures:
            rows = {name: told.get(measure) for name, told in found.items() if isinstance(told, Mapping)}
            yield _table(f"{TITLES.get(measure, measure.replace('_', ' '))}: difference to {next(iter(models))}", rows, measure, sign=True)


def _table(caption: str, rows: Mapping[str, Any], measure: str, sign: bool = False) -> Html:
    found = {name: dict(leaves(told)) for name, told in rows.items()}
    columns = list(dict.fromkeys(column for told in found.values() for column in told))
    if not columns:
        return Html("")
    cells = [[name, *(value(told.get(column), _form(measure, column), sign) for column in columns)] for name, told in found.items() if told]
    known = WRITTEN if measure in ("generations", "answers") else {}
    return table(caption, ["model", *(known[column][0] if column in known else column or measure for column in columns)], cells)


def leaves(told: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    """The numbers below a measure with the names that lead to them; {"value", "interval"} is one number."""
    if isinstance(told, bool):
        return
    if isinstance(told, int | float) or (isinstance(told, Mapping) and isinstance(told.get("value"), int | float)):
        yield at, told
    elif isinstance(told, Mapping):
        for key, below in told.items():
            yield from leaves(below, f"{at}: {key}" if at else str(key))


def _form(measure: str, column: str) -> str:
    if measure in ("generations", "answers") and column in WRITTEN:
        return WRITTEN[column][1]
    return {"bpb": ".3f", "fertility": ".2f", "bytes_per_token": ".2f"}.get(measure, ".4g")


def plain(found: Any) -> float | None:
    """The value of a measure, with or without its interval; None for what is no number."""
    if isinstance(found, Mapping):
        found = found.get("value")
    return float(found) if isinstance(found, int | float) and not isinstance(found, bool) else None


def interval(found: Any) -> Sequence[float] | None:
    """The interval of a measure that has one."""
    ends = found.get("interval") if isinstance(found, Mapping) else None
    return ends if ends and len(ends) == 2 and all(isinstance(end, int | float) for end in ends) else None


def value(found: Any, form: str = ".3f", sign: bool = False) -> str:
    """A measure as a table shows it, its interval in brackets."""
    number_, ends = plain(found), interval(found)
    if number_ is None:
        return "–"
    form = f"+{form}" if sign else form
    if isinstance(found, Mapping) and found.get("stderr") is not None:
        return f"{number_:{form}} ± {found['stderr']:{form.removeprefix('+')}}"
    return f"{number_:{form}}" + (f" [{ends[0]:{form}}–{ends[1]:{form}}]" if ends else "")


def _title(key: str, models: Mapping[str, Mapping[str, Any]]) -> str:
    name = TITLES.get(key, key.replace("_", " "))
    measured = any(interval(found) for told in models.values() for _, found in leaves(told.get(key)))
    return f"{name}. In brackets: its interval" if measured else name


def samples(models: Mapping[str, Mapping[str, Any]]) -> Html:
    """What each model wrote to each prompt, a column a model where there is room."""
    found: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
    for name, told in models.items():
        for sample in told.get("samples") or told.get("generations") or []:
            if isinstance(sample, Mapping) and "output" in sample:
                found.setdefault(str(sample.get("prompt", "")), []).append((name, sample))
    pieces = []
    for prompt, answers in found.items():
        pieces.append(tag("blockquote", prompt, class_="text"))
        columns = [
            joined([tag("h5", name), tag("p", sample["output"] or "(nothing)"), tag("small", _note(sample))]) for name, sample in answers
        ]
        pieces.append(tag("div", joined(tag("div", column) for column in columns), class_="samples"))
    return joined(pieces)


def _note(sample: Mapping[str, Any]) -> str:
    """What is known of a sample, in small print: every short value that stands beside the text."""
    said = []
    for key, told in sample.items():
        if key in _NO_NOTE or told is None or isinstance(told, list | Mapping):
            continue
        name = key.replace("_", " ")
        if isinstance(told, bool):
            said.append(name if told else f"not {name}")
        elif isinstance(told, float):
            said.append(f"{name} {told:{PERCENT}}" if 0 <= told <= 1 else f"{name} {told:.4g}")
        else:
            said.append(f"{told} {name}" if isinstance(told, int) else f"{name} {told}")
    return ", ".join(said)


def _texts(sets: Mapping[str, Mapping[str, Any]]) -> Html:
    columns = list(dict.fromkeys(key for told in sets.values() for key, found in told.items() if isinstance(found, int)))
    rows = [[name, *(number(told.get(column)) for column in columns)] for name, told in sets.items()]
    more = [
        folded(f"{key} of {name}", listing(found))
        for name, told in sets.items()
        for key, found in told.items()
        if isinstance(found, Mapping)
    ]
    return joined([table("What was measured on", ["set", *columns], rows), *more])
