"""The report of a tokenizer run and its candidates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from azrecipe.report import svg_plots
from azrecipe.report.html import Html, Section, join_html, render_details, render_figures, render_json, render_table, tag
from azrecipe.report.number_format import MEASURE_HEADERS, PERCENT, collect_points, format_measure, format_number
from azrecipe.runs.reader import RunRecord


def collect_headline(run: RunRecord) -> dict[str, str]:
    """Collect the headline: the selected candidate against the first."""
    lines = run.result.get("candidates", [])
    if not lines:
        return {}
    selected = next(line for line in lines if line["name"] == run.result["selected"])
    tokens = {
        f"tokens per word, {name}": f"{lines[0]['fertility'][name]['value']:.2f} → {measure['value']:.2f}"
        for name, measure in selected["fertility"].items()
        if measure["value"] is not None and lines[0]["fertility"][name]["value"] is not None
    }
    return {"selected": selected["name"], "tokens in it": format_number(selected["vocab_size"]), **tokens}


def build_sections(run: RunRecord) -> Iterator[Section]:
    """Build the sections of a tokenizer run."""
    result = run.result
    if not result:
        return
    plots = [
        svg_plots.plot_over_log_x(name, points, "tokens in the vocabulary", "tokens per word")
        for name, points in collect_points(result).items()
    ]
    yield Section("Fertility and vocabulary size", render_figures((plot, "") for plot in plots))
    for name in result["validation"]:
        yield Section(f"On {name}", _render_measures(result, name))
    yield Section("Costs", _render_costs(result))
    if result["show_words"]:
        note = tag("p", "Boxes are tokens. A bar is a split of the pre-tokenizer; no token crosses it.")
        yield Section("How words are split", join_html([note, _render_words(result)]))
    yield Section("The corpus", _render_corpus(result))


def _render_measures(result: Mapping[str, Any], name: str) -> Html:
    size = result["validation"][name]
    groups = f" in {size['groups']:,} groups" if size["groups"] != size["documents"] else ""
    caption = (
        f"{size['documents']:,} held-out documents{groups}, {size['words']:,} words, {size['bytes']:,} bytes. In brackets: 95 % intervals"
    )
    heads = ["candidate", "tokens", *(title.format(window=f"{result['window']:,}") for title in MEASURE_HEADERS.values())]
    rows = [
        [line["name"], format_number(line["vocab_size"]), *(format_measure(line[key][name], key) for key in MEASURE_HEADERS)]
        for line in result["candidates"]
    ]
    return render_table(caption, heads, rows, [line["name"] == result["selected"] for line in result["candidates"]])


def _render_costs(result: Mapping[str, Any]) -> Html:
    lines = result["candidates"]
    heads = ["candidate", "kind", "embedding rows", "embedding parameters", "unused tokens", "encoding, MB/s", "encoding, tokens/s"]
    heads += ["parity with English"] if "parity" in lines[0] else []
    rows = [
        [
            line["name"],
            line["kind"],
            format_number(line["embedding_rows_added"], sign=True),
            format_number(line["embedding_parameters_added"], sign=True),
            f"{line['unused_tokens']['value']:,} ({line['unused_tokens']['share']:{PERCENT}})",
            f"{line['encoding']['bytes_per_second'] / 1e6:.1f}",
            f"{line['encoding']['tokens_per_second']:,}",
            *([format_measure(line["parity"])] if "parity" in line else []),
        ]
        for line in lines
    ]
    return render_table("Rows and parameters are differences from the base", heads, rows)


def _render_words(result: Mapping[str, Any]) -> Html:
    rows = [[line["name"], *(_render_split(word) for word in line["words"])] for line in result["candidates"]]
    return render_table("Words, and how many tokens they are", ["candidate", *result["show_words"]], rows)


def _render_split(word: Sequence[Sequence[str]]) -> Html:
    """Render the tokens of a word, by the pieces of the pre-tokenizer."""
    pieces = Html(" | ".join(join_html(tag("span", token) for token in piece) for piece in word))
    return tag("span", join_html([pieces, Html(" "), tag("small", sum(map(len, word)))]), class_="cut")


def _render_corpus(result: Mapping[str, Any]) -> Html:
    """Render the training corpus and the report of its clean-up."""
    trained = next((line["training"] for line in result["candidates"] if line.get("training")), None)
    if trained is None:
        return Html("")
    summary = (
        f"{trained['documents']:,} documents, {trained['bytes']:,} bytes; {trained['held_out_left_out']:,} held-out documents left out; "
        f"{trained['special_tokens_in_text']:,} special tokens removed from the text."
    )
    rows = [[source["source"], format_number(source["bytes"]), f"{source['share']:{PERCENT}}"] for source in trained["sources"]]
    cleaned = {source["source"]: source["cleaned"] for source in trained["sources"] if "cleaned" in source}
    cleaned |= {f"{name} (held out)": counts["cleaned"] for name, counts in result["validation"].items() if "cleaned" in counts}
    details = [render_details(f"Clean-up of {name}", render_json(report)) for name, report in cleaned.items()]
    return join_html([tag("p", summary), render_table("Training data of the candidates", ["source", "bytes", "share"], rows), *details])
