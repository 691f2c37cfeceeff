"""Knows how a page shows a tokenizer run: its candidates measured on each held-out set, what they cost, how words are cut."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from azrecipe.report import svg_plots
from azrecipe.report.html import Html, Part, folded, joined, listing, table, tag
from azrecipe.report.html import plots as laid
from azrecipe.report.number_format import MEASURES, PERCENT, number, series, with_interval
from azrecipe.runs.reader import Run


def facts(run: Run) -> dict[str, str]:
    """The headline: the selected candidate against the first."""
    lines = run.result.get("candidates", [])
    if not lines:
        return {}
    chosen = next(line for line in lines if line["name"] == run.result["selected"])
    tokens = {
        f"tokens a word, {name}": f"{lines[0]['fertility'][name]['value']:.2f} → {measure['value']:.2f}"
        for name, measure in chosen["fertility"].items()
        if measure["value"] is not None and lines[0]["fertility"][name]["value"] is not None
    }
    return {"selected": chosen["name"], "tokens in it": number(chosen["vocab_size"]), **tokens}


def parts(run: Run) -> Iterator[Part]:
    """What was measured."""
    result = run.result
    if not result:
        return
    yield Part("Fertility and vocabulary size", laid((svg_plots.against(name, points, "tokens in the vocabulary", "tokens a word"), "") for name, points in series(result).items()))  # fmt: skip
    for name in result["validation"]:
        yield Part(f"On {name}", _measures(result, name))
    yield Part("What it costs", _costs(result))
    if result["show_words"]:
        said = tag("p", "Boxes are tokens. A bar stands where the pre-tokenizer cuts; no token crosses it.")
        yield Part("How words are cut", joined([said, _words(result)]))
    yield Part("The corpus", _corpus(result))


def _measures(result: Mapping[str, Any], name: str) -> Html:
    size = result["validation"][name]
    grouped = f" in {size['groups']:,} groups" if size["groups"] != size["documents"] else ""
    caption = (
        f"{size['documents']:,} held-out documents{grouped}, {size['words']:,} words, {size['bytes']:,} bytes. In brackets: 95 % intervals"
    )
    heads = ["candidate", "tokens", *(title.format(window=f"{result['window']:,}") for title in MEASURES.values())]
    rows = [
        [line["name"], number(line["vocab_size"]), *(with_interval(line[key][name], key) for key in MEASURES)]
        for line in result["candidates"]
    ]
    return table(caption, heads, rows, [line["name"] == result["selected"] for line in result["candidates"]])


def _costs(result: Mapping[str, Any]) -> Html:
    lines = result["candidates"]
    heads = ["candidate", "kind", "embedding rows", "embedding parameters", "unused tokens", "encoding, MB/s", "encoding, tokens/s"]
    heads += ["parity with English"] if "parity" in lines[0] else []
    rows = [
        [line["name"], line["kind"], number(line["embedding_rows_added"], sign=True), number(line["embedding_parameters_added"], sign=True),
         f"{line['unused_tokens']['value']:,} ({line['unused_tokens']['share']:{PERCENT}})", f"{line['encoding']['bytes_per_second'] / 1e6:.1f}",
         f"{line['encoding']['tokens_per_second']:,}", *([with_interval(line["parity"])] if "parity" in line else [])]
        for line in lines
    ]  # fmt: skip
    return table("Rows and parameters are against the base's", heads, rows)


def _words(result: Mapping[str, Any]) -> Html:
    rows = [[line["name"], *(_cut(cut) for cut in line["words"])] for line in result["candidates"]]
    return table("Words, and how many tokens they are", ["candidate", *result["show_words"]], rows)


def _cut(cut: Sequence[Sequence[str]]) -> Html:
    """Tokens in boxes; a bar where the pre-tokenizer cuts."""
    pieces = Html(" | ".join(joined(tag("span", token) for token in piece) for piece in cut))
    return tag("span", joined([pieces, Html(" "), tag("small", sum(map(len, cut)))]), class_="cut")


def _corpus(result: Mapping[str, Any]) -> Html:
    """What the candidates were trained on; what the clean-up dropped and changed, with samples."""
    trained = next((line["training"] for line in result["candidates"] if line.get("training")), None)
    if trained is None:
        return Html("")
    said = (
        f"{trained['documents']:,} documents, {trained['bytes']:,} bytes; {trained['held_out_left_out']:,} held-out documents left out; "
        f"{trained['special_tokens_in_text']:,} special tokens spelled out in the text, cut out."
    )
    rows = [[source["source"], number(source["bytes"]), f"{source['share']:{PERCENT}}"] for source in trained["sources"]]
    cleaned = {s["source"]: s["cleaned"] for s in trained["sources"] if "cleaned" in s}
    cleaned |= {f"{name} (held out)": v["cleaned"] for name, v in result["validation"].items() if "cleaned" in v}
    folds = [folded(f"Clean-up of {name}", listing(told)) for name, told in cleaned.items()]
    return joined([tag("p", said), table("What the candidates were trained on", ["source", "bytes", "share"], rows), *folds])
