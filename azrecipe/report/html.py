"""Knows how a page is written: what is escaped, how tables, plots and parts are laid out, in both themes, on paper and on a phone."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import count

STYLE = """
:root { color-scheme: light dark; --line: #8886; --soft: #8882; }
body { font: 1rem/1.5 system-ui, "Noto Sans", "DejaVu Sans", sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem;
  overflow-wrap: anywhere; }
h1 { line-height: 1.2; } h2 { margin-top: 3rem; border-bottom: 2px solid var(--line); } h3 { margin-top: 2rem; }
p, dl, figcaption { max-width: 48rem; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
caption { text-align: left; padding: .2rem 0; opacity: .8; }
caption span { display: inline-block; position: sticky; left: 0; max-width: min(48rem, 100vw - 2rem); }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
thead th { vertical-align: bottom; } tbody th { font-weight: normal; }
td.n, th.n { text-align: right; } td.n { white-space: nowrap; } td.t { min-width: 14rem; overflow-wrap: anywhere; }
small { opacity: .8; } tr.chosen, tr.chosen th { font-weight: bold; }
dl.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .6rem 1.5rem; max-width: none; }
dl.facts dt { font-size: .85rem; opacity: .8; } dl.facts dd { margin: 0; font-size: 1.1rem; }
dl.terms dt { font-weight: bold; } dl.terms dd { margin: 0 0 .4rem 1.5rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(21rem, 100%), 1fr)); gap: 1rem 1.5rem; }
figure { margin: 0; max-width: 38rem; } svg { display: block; width: 100%; height: auto; } figcaption { font-size: .85rem; opacity: .8; }
.samples { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(13rem, 100%), 1fr)); gap: .8rem; }
.samples > div { border: 1px solid var(--line); border-radius: .4rem; padding: .4rem .8rem; }
.samples h5 { margin: 0; font-size: .9rem; } .samples p { margin: .3rem 0; white-space: pre-wrap; }
.text, .samples p, .cut { font-variant-ligatures: no-common-ligatures; }
.cut span { border: 1px solid var(--line); border-radius: .25rem; padding: 0 .15rem; margin-right: .1rem; white-space: pre; }
pre { overflow-x: auto; background: var(--soft); padding: .8rem; font-size: .85rem; line-height: 1.4; }
details { margin: 1rem 0; } summary { cursor: pointer; }
blockquote { margin: .5rem 0; padding-left: .8rem; border-left: 3px solid var(--line); white-space: pre-wrap; }
.tables { display: flex; flex-wrap: wrap; gap: 0 2.5rem; align-items: flex-start; } .tables > .wide { max-width: 100%; }
@media (max-width: 40rem) { body { margin: 1rem auto; } th, td { padding: .25rem .45rem; font-size: .9rem; } }
@media print {
  :root { color-scheme: light; } html { font-size: 11px; } body { max-width: none; margin: 0; } h2, h3, h4 { break-after: avoid; }
  figure, tr, .samples > div { break-inside: avoid; } .wide, pre { overflow: visible; } pre { white-space: pre-wrap; }
  td.n { white-space: normal; } details::details-content { content-visibility: visible; block-size: auto; } a { color: inherit; }
}
"""
OWN = "\ue000"  # begins a plot's ids until the page has numbered its plots
# The page holds no script and asks for nothing; with this the browser holds it to that.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_NUMBER = re.compile(r"[+\-–−]?(\d|$)")


class Html(str):
    """Text that is markup already; any other text is escaped where it goes into a page."""

    __slots__ = ()


@dataclass(frozen=True)
class Part:
    """A part of a page with a heading; parts below it have smaller ones."""

    title: str
    body: Html
    below: Sequence[Part] = ()
    anchor: str = ""


def text(value: object) -> Html:
    """A value as markup."""
    return value if isinstance(value, Html) else Html(escape(str(value)))


def joined(pieces: Iterable[str]) -> Html:
    """Pieces of markup one after the other."""
    return Html("".join(text(piece) for piece in pieces))


def tag(name: str, body: object, **attributes: str) -> Html:
    """An element; `class_` stands for class."""
    given = "".join(f' {key.rstrip("_")}="{escape(value)}"' for key, value in attributes.items() if value)
    return Html(f"<{name}{given}>{text(body)}</{name}>")


def page(title: str, body: Html) -> str:
    """A whole file. Plots are numbered, so that ids are never twice in it."""
    numbers = count(1)
    body = Html(re.sub(r"<svg.*?</svg>", lambda plot: plot[0].replace(OWN, f"p{next(numbers)}-"), body, flags=re.DOTALL))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"><title>{escape(title)}</title><style>{STYLE}</style></head>\n'
        f"<body><h1>{escape(title)}</h1>\n{body}</body></html>\n"
    )


def parts(found: Iterable[Part], level: int = 2) -> Html:
    """Parts with their headings, from h2 downwards; one that says nothing is left out."""
    return joined(
        Html(f"{tag(f'h{level}', part.title, id=part.anchor)}\n{part.body}\n{parts(part.below, level + 1)}")
        for part in found
        if part.body or part.below
    )


def table(caption: str, heads: Sequence[str], rows: Sequence[Sequence[str]], chosen: Sequence[bool] | None = None) -> Html:
    """A table in a box that scrolls by itself; the first column names the rows, columns of numbers stand to the right.

    A bold row, marked with a word too, is the chosen one. An interval, "1.2 [1.1–1.3]", stands below its value. No rows, no table.
    """
    if not rows:
        return Html("")
    numeric = [all(_NUMBER.match(row[nth]) for row in rows) for nth in range(len(heads))]
    top = joined(tag("th", head, scope="col", class_="n" if numeric[nth] and nth else "") for nth, head in enumerate(heads))
    body = []
    for nth, row in enumerate(rows):
        mark = bool(chosen and chosen[nth])
        first = tag("th", f"{row[0]} ← selected" if mark else row[0], scope="row")
        cells = joined(_cell(cell, numeric[column]) for column, cell in enumerate(row[1:], 1))
        body.append(tag("tr", Html(first + cells), class_="chosen" if mark else ""))
    said = tag("caption", tag("span", caption)) if caption else ""
    return Html(f'<div class="wide" tabindex="0"><table>{said}<thead><tr>{top}</tr></thead><tbody>{joined(body)}</tbody></table></div>')


def tables(found: Iterable[Html]) -> Html:
    """Tables side by side where there is room."""
    inside = joined(found)
    return tag("div", inside, class_="tables") if inside else inside


def _cell(cell: str, numeric: bool) -> Html:
    if not numeric:
        return tag("td", cell, class_="t" if len(cell) > 30 and not isinstance(cell, Html) else "")
    value, bracket, interval = cell.partition(" [")
    below = f"<br><small>[{escape(interval)}</small>" if bracket else ""
    return Html(f'<td class="n">{escape(value)}{below}</td>')


def plots(figures: Iterable[tuple[str, str]]) -> Html:
    """Plots, each with its caption, as many side by side as there is room for; those that show nothing are left out."""
    drawn = [tag("figure", Html(svg + (tag("figcaption", said) if said else ""))) for svg, said in figures if svg]
    return tag("div", joined(drawn), class_="plots") if drawn else Html("")


def facts(found: Mapping[str, str]) -> Html:
    """Names and short values in a grid; empty values are left out."""
    items = joined(Html(f"<div>{tag('dt', name)}{tag('dd', value)}</div>") for name, value in found.items() if value)
    return tag("dl", items, class_="facts") if items else Html("")


def definitions(found: Mapping[str, str]) -> Html:
    """What measures mean."""
    return (
        tag("dl", joined(joined([tag("dt", key), tag("dd", said)]) for key, said in found.items()), class_="terms") if found else Html("")
    )


def folded(summary: str, body: Html) -> Html:
    """Something long that is opened by a click, and stands open on paper."""
    return Html(f"<details>{tag('summary', summary)}{body}</details>") if body else Html("")


def listing(told: object) -> Html:
    """Counts and samples as indented JSON."""
    return tag("pre", json.dumps(told, indent=1, ensure_ascii=False))
