"""One HTML file that shows a run and opens from disk with no network: tables, plots inside, both themes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from azrecipe.parts.files import read_json, write_text
from azrecipe.report import plots
from azrecipe.report.figures import MEASURES, PERCENT, axes, number, series, with_interval

STYLE = """
:root { color-scheme: light dark; --line: #8886; }
body { font: 16px/1.5 system-ui, "Noto Sans", "DejaVu Sans", sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
h1 { line-height: 1.2; } h2 { margin-top: 2.5rem; }
.wide { overflow-x: auto; } svg { max-width: 100%; height: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; } th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); }
th { text-align: left; vertical-align: bottom; } td.n, th.n { text-align: right; white-space: nowrap; }
small { opacity: .75; } tr.chosen { font-weight: bold; } dt { font-weight: bold; } dd { margin: 0 0 .4rem 1.5rem; }
.cut span { border: 1px solid var(--line); border-radius: .25rem; padding: 0 .15rem; margin-right: .1rem; }
@media print { body { max-width: none; } }
"""


def write(run: Path) -> Path | None:
    """Make report.html from what a finished run left; returns its path, or None for a stage that has no page yet.

    A page that says the same already is not touched.
    """
    result = read_json(run / "result.json") or {}
    section = {"tokenizer": _tokenizer, "pipeline": _comparison}.get(result.get("stage", ""))
    if section is None:
        return None
    title = f"{'Tokenizers' if section is _tokenizer else 'Comparison'}: {run.parent.name}/{run.name}"
    body = "".join(section(result)) + _definitions(result["definitions"]) + _environment(read_json(run / "environment.json"))
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><h1>{escape(title)}</h1>\n{body}</body></html>\n"
    )
    file = run / "report.html"
    if not file.exists() or file.read_text(encoding="utf-8") != page:
        write_text(file, page)
    return file


def _tokenizer(result: Mapping[str, Any]) -> list[str]:
    sets = list(result["validation"])
    lines = result["candidates"]
    window = f"{result['window']:,}"
    found = [
        "<h2>Fertility and vocabulary size</h2><div class=wide>",
        plots.against(series(result), "tokens in the vocabulary", "tokens a word"),
        "</div>",
    ]
    for name in sets:
        size = result["validation"][name]
        grouped = f" in {size['groups']:,} groups" if size["groups"] != size["documents"] else ""
        found.append(
            f"<h2>On {escape(name)}</h2><p>{size['documents']:,} held-out documents{grouped}, {size['words']:,} words, {size['bytes']:,} bytes. In brackets: 95 % intervals.</p>"
        )
        heads = ["candidate", "tokens", *(title.format(window=window) for title in MEASURES.values())]
        rows = [[line["name"], number(line["vocab_size"]), *(with_interval(line[key][name], key) for key in MEASURES)] for line in lines]
        found.append(_table(heads, rows, [line["name"] == result["selected"] for line in lines]))
    found.append("<h2>What it costs</h2>")
    heads = ["candidate", "kind", "embedding rows", "embedding parameters", "unused tokens", "encoding, MB/s", "encoding, tokens/s"]
    heads += ["parity with English"] if "parity" in lines[0] else []
    rows = [
        [line["name"], line["kind"], number(line["embedding_rows_added"], sign=True), number(line["embedding_parameters_added"], sign=True),
         f"{line['unused_tokens']['value']:,} ({line['unused_tokens']['share']:{PERCENT}})", f"{line['encoding']['bytes_per_second'] / 1e6:.1f}",
         f"{line['encoding']['tokens_per_second']:,}", *([with_interval(line["parity"])] if "parity" in line else [])]
        for line in lines
    ]  # fmt: skip
    found.append(_table(heads, rows))
    if result["show_words"]:
        found.append(
            "<h2>How words are cut</h2><p>Boxes are tokens. A bar stands where the pre-tokenizer cuts; no token crosses it.</p>"
            + _words(result)
        )
    return [*found, _corpus(result)]


def _words(result: Mapping[str, Any]) -> str:
    heads = "".join(f"<th>{escape(word)}</th>" for word in result["show_words"])
    rows = []
    for line in result["candidates"]:
        cells = "".join(f'<td class="cut">{_pieces(cut)} <small>{sum(map(len, cut))}</small></td>' for cut in line["words"])
        rows.append(f"<tr><th>{escape(line['name'])}</th>{cells}</tr>")
    return f"<div class=wide><table><tr><th>candidate</th>{heads}</tr>{''.join(rows)}</table></div>"


def _pieces(cut: Sequence[Sequence[str]]) -> str:
    """Tokens in boxes; a bar where the pre-tokenizer cuts."""
    return " | ".join("".join(f"<span>{escape(token)}</span>" for token in piece) for piece in cut)


def _comparison(result: Mapping[str, Any]) -> list[str]:
    """A matrix' cells ranked, what each read and cost, and those that are not finished."""
    rows = result["ranking"]
    points, sets = axes(result)
    found = [f"<p>Cells ranked by bits per byte on {escape(result['dataset'])}, lowest first.</p>"]
    for name in sets:
        values = [[row["bpb_after"].get(point, {}).get(name) for point in points] for row in rows]
        cells = [[row["cell"], *("–" if v is None else f"{v:.3f}" for v in value)] for row, value in zip(rows, values, strict=True)]
        found += [f"<h2>Bits per byte on {escape(name)}</h2>", _table(["cell", *points], cells)]
    costs = {"vocabulary": "vocab_size", "parameters": "parameters", "bytes read": "bytes", "tokens": "tokens", "steps": "steps"}
    rates = {"tokens/s": "tokens_per_second", "bytes/s": "bytes_per_second"}
    priced = any("price" in row for row in rows)
    cells = [
        [row["cell"], *(number(row[key]) for key in costs.values()), *(f"{row[key]:,.0f}" for key in rates.values()), f"{row['training_seconds'] / 3600:,.3f}",
         *([f"{row['price']:,.2f}"] if priced else []), "" if row["same_bytes"] else "not the same bytes"]
        for row in rows
    ]  # fmt: skip
    found += ["<h2>What they read and cost</h2>", _table(["cell", *costs, *rates, "hours", *(["price"] if priced else []), ""], cells)]
    for cell in result["unfinished"]:
        found.append(f"<p>{escape(cell['cell'])}: {escape(cell['state'])} ({escape(cell['step'])}) {escape(cell['message'])}</p>")
    return found


def _corpus(result: Mapping[str, Any]) -> str:
    """What the candidates were trained on; what the clean-up dropped and changed, with samples."""
    trained = next((line["training"] for line in result["candidates"] if line.get("training")), None)
    if trained is None:
        return ""
    found = [
        f"<h2>The corpus</h2><p>{trained['documents']:,} documents, {trained['bytes']:,} bytes; {trained['held_out_left_out']:,} held-out documents left out; {trained['special_tokens_in_text']:,} special tokens spelled out in the text, cut out.</p>"
    ]
    rows = [[source["source"], number(source["bytes"]), f"{source['share']:{PERCENT}}"] for source in trained["sources"]]
    found.append(_table(["source", "bytes", "share"], rows))
    cleaned = {s["source"]: s["cleaned"] for s in trained["sources"] if "cleaned" in s}
    cleaned |= {f"{name} (held out)": v["cleaned"] for name, v in result["validation"].items() if "cleaned" in v}
    for name, told in cleaned.items():
        found.append(f"<h3>Clean-up of {escape(name)}</h3><pre>{escape(json.dumps(told, indent=1, ensure_ascii=False))}</pre>")
    return "".join(found)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], chosen: Sequence[bool] | None = None) -> str:
    """The first column is text; a bold row, marked with a word too, is the chosen one. An interval stands below its value."""
    top = "".join(f'<th class="{"n" if i else ""}">{escape(head)}</th>' for i, head in enumerate(heads))
    body = []
    for nth, row in enumerate(rows):
        mark = bool(chosen and chosen[nth])
        first = f"<td>{escape(row[0])}{' ← selected' if mark else ''}</td>"
        body.append(f"<tr{' class=chosen' if mark else ''}>{first}{''.join(map(_number, row[1:]))}</tr>")
    return f"<div class=wide><table><tr>{top}</tr>{''.join(body)}</table></div>"


def _number(cell: str) -> str:
    value, bracket, interval = cell.partition(" [")
    below = f"<br><small>[{escape(interval)}</small>" if bracket else ""
    return f'<td class="n">{escape(value)}{below}</td>'


def _definitions(definitions: Mapping[str, str]) -> str:
    items = "".join(f"<dt>{escape(key)}</dt><dd>{escape(text)}</dd>" for key, text in definitions.items())
    return f"<h2>Definitions</h2><dl>{items}</dl>"


def _environment(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    versions = ", ".join(f"{name} {version}" for name, version in found.get("versions", {}).items())
    machine = f"azrecipe {found.get('azrecipe')}, Python {found.get('python')}, {found.get('platform')}, {found.get('cpus')} CPUs"
    return f"<h2>Environment</h2><p>{escape(machine)}; {escape(versions)}</p>"
