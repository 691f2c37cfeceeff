"""HTML of pages: escaping, sections, tables and figures.

Pages are readable in light and dark themes, on paper and on a phone. They contain no script.
"""

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
PLOT_ID_PREFIX = "\ue000"  # stands before the ids of a plot until the page numbers its plots
# A page has no script and loads nothing. With this policy the browser enforces it.
GENERATOR_MARK = '<meta name="generator" content="azrecipe">'  # a page with it may be written anew
CONTENT_SECURITY_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_NUMBER = re.compile(r"[+\-–−]?(\d|$)")


class Html(str):
    """Text that is markup already. Any other text is escaped."""

    __slots__ = ()


@dataclass(frozen=True)
class Section:
    """A section of a page: heading, body and subsections."""

    title: str
    body: Html
    children: Sequence[Section] = ()
    anchor: str = ""


def escape_html(value: object) -> Html:
    """Convert a value to markup, and escape what is not Html."""
    return value if isinstance(value, Html) else Html(escape(str(value)))


def join_html(pieces: Iterable[str]) -> Html:
    """Join pieces of markup."""
    return Html("".join(escape_html(piece) for piece in pieces))


def tag(name: str, body: object, **attributes: str) -> Html:
    """Build an element. The attribute class is written `class_`."""
    attribute_text = "".join(f' {key.rstrip("_")}="{escape(value)}"' for key, value in attributes.items() if value)
    return Html(f"<{name}{attribute_text}>{escape_html(body)}</{name}>")


def render_page(title: str, body: Html) -> str:
    """Render the whole page, with unique ids in its plots."""
    numbers = count(1)
    body = Html(re.sub(r"<svg.*?</svg>", lambda plot: plot[0].replace(PLOT_ID_PREFIX, f"p{next(numbers)}-"), body, flags=re.DOTALL))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'{GENERATOR_MARK}<meta http-equiv="Content-Security-Policy" content="{CONTENT_SECURITY_POLICY}"><title>{escape(title)}</title><style>{STYLE}</style></head>\n'
        f"<body><h1>{escape(title)}</h1>\n{body}</body></html>\n"
    )


def render_sections(sections: Iterable[Section], level: int = 2) -> Html:
    """Render sections with headings from h2 on. Empty ones are left out."""
    return join_html(
        Html(f"{tag(f'h{level}', section.title, id=section.anchor)}\n{section.body}\n{render_sections(section.children, level + 1)}")
        for section in sections
        if section.body or section.children
    )


def render_table(caption: str, heads: Sequence[str], rows: Sequence[Sequence[str]], selected: Sequence[bool] | None = None) -> Html:
    """Render a table. Its first column names the rows.

    Columns of numbers are aligned to the right. An interval, "1.2 [1.1–1.3]", is below its value.

    Args:
        caption: The caption; it may be empty.
        heads: The column titles.
        rows: The cells of each row.
        selected: Which rows are bold and marked as selected.

    Returns:
        The table; empty where there are no rows.
    """
    if not rows:
        return Html("")
    numeric = [all(_NUMBER.match(row[column]) for row in rows) for column in range(len(heads))]
    top = join_html(tag("th", head, scope="col", class_="n" if numeric[column] and column else "") for column, head in enumerate(heads))
    body = []
    for index, row in enumerate(rows):
        is_selected = bool(selected and selected[index])
        first = tag("th", f"{row[0]} ← selected" if is_selected else row[0], scope="row")
        cells = join_html(_render_cell(cell, numeric[column]) for column, cell in enumerate(row[1:], 1))
        body.append(tag("tr", Html(first + cells), class_="chosen" if is_selected else ""))
    caption_element = tag("caption", tag("span", caption)) if caption else ""
    return Html(
        f'<div class="wide" tabindex="0"><table>{caption_element}<thead><tr>{top}</tr></thead><tbody>{join_html(body)}</tbody></table></div>'
    )


def render_side_by_side(items: Iterable[Html]) -> Html:
    """Render tables side by side where there is room."""
    body = join_html(items)
    return tag("div", body, class_="tables") if body else body


def _render_cell(cell: str, numeric: bool) -> Html:
    if not numeric:
        return tag("td", cell, class_="t" if len(cell) > 30 and not isinstance(cell, Html) else "")
    value, bracket, interval = cell.partition(" [")
    small_print = f"<br><small>[{escape(interval)}</small>" if bracket else ""
    return Html(f'<td class="n">{escape(value)}{small_print}</td>')


def render_figures(figures: Iterable[tuple[str, str]]) -> Html:
    """Render non-empty plots with their captions, side by side."""
    elements = [tag("figure", Html(svg + (tag("figcaption", caption) if caption else ""))) for svg, caption in figures if svg]
    return tag("div", join_html(elements), class_="plots") if elements else Html("")


def render_facts(values: Mapping[str, str]) -> Html:
    """Render names and non-empty short values in a grid."""
    items = join_html(Html(f"<div>{tag('dt', name)}{tag('dd', value)}</div>") for name, value in values.items() if value)
    return tag("dl", items, class_="facts") if items else Html("")


def render_definitions(meanings: Mapping[str, str]) -> Html:
    """Render the definitions of terms."""
    items = join_html(join_html([tag("dt", term), tag("dd", meaning)]) for term, meaning in meanings.items())
    return tag("dl", items, class_="terms") if items else items


def render_details(summary: str, body: Html) -> Html:
    """Render a block that a click opens; it is open on paper."""
    return Html(f"<details>{tag('summary', summary)}{body}</details>") if body else Html("")


def render_json(data: object) -> Html:
    """Render counts and samples as indented JSON."""
    return tag("pre", json.dumps(data, indent=1, ensure_ascii=False))
