"""The report of an evaluation: measures, differences and samples of models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from azrecipe.report.html import (
    Html,
    Section,
    join_html,
    render_details,
    render_figures,
    render_json,
    render_side_by_side,
    render_table,
    tag,
)
from azrecipe.report.number_format import GENERATION_MEASURES, PERCENT, format_number
from azrecipe.report.svg_plots import PlotFrame, Point, plot_categories
from azrecipe.runs.reader import RunRecord

MEASURE_TITLES = {
    "bpb": "Bits per byte, lower is better",
    "fertility": "Fertility: tokens per word",
    "bytes_per_token": "Bytes per token",
    "generations": "Continuations of the prompts",
    "answers": "Answers to held-out conversations",
    "tasks": "Tasks",
}
# Keys of a model that are no measures, and keys of a sample that do not appear in its note.
_NO_MEASURE = ("path", "parameters", "vocab_size", "samples", "answer_samples")
_NO_NOTE = ("prompt", "output", "messages", "text")
DIFFERENCE_KEYS = ("differences", "difference", "changes")


def collect_headline(run: RunRecord) -> dict[str, str]:
    """Collect the headline: the last model against the first."""
    models = run.result.get("models", {})
    if not models:
        return {}
    first, last = (models[name] for name in (next(iter(models)), list(models)[-1]))
    bpb = {
        name: f"{format_measurement(first['bpb'].get(name))} → {format_measurement(last['bpb'][name])}"
        for name in last.get("bpb", {})
        if "bpb" in first
    }
    return {"models": format_number(len(models)), **{f"bits per byte, {name}": change for name, change in bpb.items()}}


def build_sections(run: RunRecord) -> Iterator[Section]:
    """Build the sections of an evaluation."""
    result = run.result
    models: Mapping[str, Mapping[str, Any]] = result.get("models", {})
    if not models:
        return
    yield from build_model_sections(models)
    yield Section("Differences", render_side_by_side(_render_differences(result)))
    yield Section("Held-out text", _render_texts(result.get("validation", {})))


def build_model_sections(models: Mapping[str, Mapping[str, Any]]) -> Iterator[Section]:
    """Build the sections of models, from one evaluation or several."""
    rows = [
        [name, format_number(model.get("parameters")), format_number(model.get("vocab_size")), str(model.get("path", ""))]
        for name, model in models.items()
    ]
    yield Section("Models", render_table("Measured models", ["model", "parameters", "vocabulary", "from"], rows))
    yield Section("Measures", render_measures(models))
    yield Section("Samples", render_samples(models))


def render_measures(models: Mapping[str, Mapping[str, Any]]) -> Html:
    """Render every measure that the models have."""
    return join_html([render_figures([(_plot_bits_per_byte(models), "")]), render_side_by_side(_render_tables(models))])


def _plot_bits_per_byte(models: Mapping[str, Mapping[str, Any]]) -> Html:
    """Plot the bits per byte of each model, set by set."""
    names = list(models)
    sets = dict.fromkeys(name for model in models.values() for name in model.get("bpb", {}))
    series = {
        dataset: [
            Point(name, index, parse_number(model["bpb"][dataset]) or 0.0, parse_interval(model["bpb"][dataset]))
            for index, (name, model) in enumerate(models.items())
            if parse_number(model.get("bpb", {}).get(dataset)) is not None
        ]
        for dataset in sets
    }
    if len(names) < 2 or not any(series.values()):
        return Html("")
    return plot_categories(PlotFrame("Bits per byte of held-out text", "", "bits per byte", long_labels=len(names) > 3), names, series)


def _render_tables(models: Mapping[str, Mapping[str, Any]]) -> Iterator[Html]:
    """Render a table for each measure, those of MEASURE_TITLES first."""
    keys = dict.fromkeys([*MEASURE_TITLES, *(key for model in models.values() for key in model)])
    for key in keys:
        if key in _NO_MEASURE or key in DIFFERENCE_KEYS:
            continue
        yield _render_measure(_measure_title(key, models), {name: model.get(key) for name, model in models.items()}, key)


def _render_differences(result: Mapping[str, Any]) -> Iterator[Html]:
    """Render differences to the first model.

    They are a key of the result, or of each model.
    """
    models = result["models"]
    for key in DIFFERENCE_KEYS:
        differences = {name: model[key] for name, model in models.items() if key in model} or result.get(key) or {}
        if not isinstance(differences, Mapping):
            continue
        differences = {name: values for name, values in differences.items() if isinstance(values, Mapping)}
        for measure in dict.fromkeys(measure for values in differences.values() for measure in values):
            rows = {name: values.get(measure) for name, values in differences.items()}
            yield _render_measure(
                f"{MEASURE_TITLES.get(measure, measure.replace('_', ' '))}: difference to {next(iter(models))}", rows, measure, sign=True
            )


def _render_measure(caption: str, rows: Mapping[str, Any], measure: str, sign: bool = False) -> Html:
    numbers = {name: dict(iterate_numbers(values)) for name, values in rows.items()}
    columns = list(dict.fromkeys(column for row in numbers.values() for column in row))
    if not columns:
        return Html("")
    cells = [
        [name, *(format_measurement(row.get(column), _number_format(measure, column), sign) for column in columns)]
        for name, row in numbers.items()
        if row
    ]
    titles = {key: style.title for key, style in GENERATION_MEASURES.items()} if measure in ("generations", "answers") else {}
    return render_table(caption, ["model", *(titles.get(column, column or measure) for column in columns)], cells)


def iterate_numbers(measure: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Iterate over a measure's numbers, with their keys.

    {"value", "interval"} is one number.
    """
    if isinstance(measure, bool):
        return
    if isinstance(measure, int | float) or (isinstance(measure, Mapping) and isinstance(measure.get("value"), int | float)):
        yield path, measure
    elif isinstance(measure, Mapping):
        for key, child in measure.items():
            yield from iterate_numbers(child, f"{path}: {key}" if path else str(key))


def _number_format(measure: str, column: str) -> str:
    if measure in ("generations", "answers") and column in GENERATION_MEASURES:
        return GENERATION_MEASURES[column].format_spec
    return {"bpb": ".3f", "fertility": ".2f", "bytes_per_token": ".2f"}.get(measure, ".4g")


def parse_number(measure: Any) -> float | None:
    """Return a measure's value; None for what is no number."""
    number = measure.get("value") if isinstance(measure, Mapping) else measure
    return float(number) if isinstance(number, int | float) and not isinstance(number, bool) else None


def parse_interval(measure: Any) -> Sequence[float] | None:
    """Return the ends of a measure's interval, if it has one."""
    ends = measure.get("interval") if isinstance(measure, Mapping) else None
    return ends if ends and len(ends) == 2 and all(isinstance(end, int | float) for end in ends) else None


def format_measurement(measure: Any, format_spec: str = ".3f", sign: bool = False) -> str:
    """Format a measure for a table, with its interval in brackets."""
    number, ends = parse_number(measure), parse_interval(measure)
    if number is None:
        return "–"
    format_spec = f"+{format_spec}" if sign else format_spec
    if isinstance(measure, Mapping) and measure.get("stderr") is not None:
        return f"{number:{format_spec}} ± {measure['stderr']:{format_spec.removeprefix('+')}}"
    return f"{number:{format_spec}}" + (f" [{ends[0]:{format_spec}}–{ends[1]:{format_spec}}]" if ends else "")


def _measure_title(key: str, models: Mapping[str, Mapping[str, Any]]) -> str:
    name = MEASURE_TITLES.get(key, key.replace("_", " "))
    has_intervals = any(parse_interval(measure) for model in models.values() for _, measure in iterate_numbers(model.get(key)))
    return f"{name}. In brackets: its interval" if has_intervals else name


def render_samples(models: Mapping[str, Mapping[str, Any]]) -> Html:
    """Render what each model wrote to each prompt, side by side."""
    samples_by_prompt: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
    for name, model in models.items():
        for sample in model.get("samples") or model.get("generations") or []:
            if isinstance(sample, Mapping) and "output" in sample:
                samples_by_prompt.setdefault(str(sample.get("prompt", "")), []).append((name, sample))
    pieces = []
    for prompt, answers in samples_by_prompt.items():
        pieces.append(tag("blockquote", prompt, class_="text"))
        columns = [
            join_html([tag("h5", name), tag("p", sample["output"] or "(nothing)"), tag("small", _describe_sample(sample))])
            for name, sample in answers
        ]
        pieces.append(tag("div", join_html(tag("div", column) for column in columns), class_="samples"))
    return join_html(pieces)


def _describe_sample(sample: Mapping[str, Any]) -> str:
    """Describe a sample by the short values beside its text."""
    words = []
    for key, entry in sample.items():
        if key in _NO_NOTE or entry is None or isinstance(entry, list | Mapping):
            continue
        name = key.replace("_", " ")
        if isinstance(entry, bool):
            words.append(name if entry else f"not {name}")
        elif isinstance(entry, float):
            words.append(f"{name} {entry:{PERCENT}}" if 0 <= entry <= 1 else f"{name} {entry:.4g}")
        else:
            words.append(f"{entry} {name}" if isinstance(entry, int) else f"{name} {entry}")
    return ", ".join(words)


def _render_texts(sets: Mapping[str, Mapping[str, Any]]) -> Html:
    columns = list(dict.fromkeys(key for counts in sets.values() for key, count in counts.items() if isinstance(count, int)))
    rows = [[name, *(format_number(counts.get(column)) for column in columns)] for name, counts in sets.items()]
    details = [
        render_details(f"{key} of {name}", render_json(entry))
        for name, counts in sets.items()
        for key, entry in counts.items()
        if isinstance(entry, Mapping)
    ]
    return join_html([render_table("Held-out sets", ["set", *columns], rows), *details])
