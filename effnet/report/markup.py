"""How is a page written so that nothing in the data can break it? Markup is a type of its own, and text is not markup.

`tag` builds elements; every child and attribute that is not `Html` is escaped, so a class named `<script>` is six
letters in a pair of brackets. `page` adds the style sheet, which is part of the file, and a policy that forbids the
browser to load or run anything else. The style is one calm column: system fonts, one accent colour, light or dark by
the reader's own setting, tables with aligned digits, and a version for paper.
"""

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, final


@final
class Html(str):
    """Text that is markup already. Made by the functions here."""

    __slots__ = ()


Child = str | int | Html | None  # None is left out

VOID = ("meta", "img", "br", "hr")


def tag(element: str, /, *children: Child, **attributes: Any) -> Html:
    """An element. `class_` is written `class`, `aria_label` `aria-label`; what is None or False is left out.

    >>> tag("td", "<script>", class_="name", title='"quoted"', hidden=True, id=None)
    '<td class="name" title="&quot;quoted&quot;" hidden>&lt;script&gt;</td>'
    """
    words = [element]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        words.append(key if value is True else f'{key}="{html.escape(str(value))}"')
    opening = f"<{' '.join(words)}>"
    return Html(opening if element in VOID else f"{opening}{join(children)}</{element}>")


def join(children: Iterable[Child]) -> Html:
    """The children one after another, text escaped."""
    return Html("".join(c if isinstance(c, Html) else html.escape(str(c)) for c in children if c is not None))


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page with a heading, reached as `#name`."""

    name: str
    title: str
    body: Html

    @property
    def markup(self) -> Html:
        """The section itself."""
        heading = tag("h2", self.title, id=f"{self.name}-title")
        return tag("section", heading, self.body, id=self.name, aria_labelledby=f"{self.name}-title")

    @property
    def link(self) -> Html:
        """The way to it."""
        return tag("a", self.title, href=f"#{self.name}")


def section(name: str, title: str, *children: Child) -> Section:
    """A `Section` of these children, one after another."""
    return Section(name=name, title=title, body=join(children))


def table(
    columns: Sequence[Child],
    rows: Iterable[Sequence[Child]],
    *,
    caption: str,
    words: Iterable[int] = (),
    mark: int = -1,
) -> Html:
    """A table whose first column names the row. Columns are numbers, right-aligned, but for the first and `words`.

    `mark`: the row to set off from the others. On a narrow screen the table scrolls inside its own frame, which the
    keyboard reaches.
    """
    left = {0, *words}
    align = [None if index in left else "number" for index in range(len(columns))]
    head = [tag("th", text, scope="col", class_=kind) for text, kind in zip(columns, align, strict=True)]
    body = []
    for at, (first, *others) in enumerate(rows):
        cells = [tag("td", text, class_=kind) for text, kind in zip(others, align[1:], strict=True)]
        body.append(tag("tr", tag("th", first, scope="row"), *cells, class_="mark" if at == mark else None))
    content = tag("table", tag("thead", tag("tr", *head)), tag("tbody", *body))
    return titled(content, caption)


def titled(content: Html, caption: str) -> Html:
    """A table under its caption, in a frame of its own: when it is wider than the screen, the page does not scroll."""
    frame = tag("div", content, class_="scroll", tabindex=0, role="region", aria_label=caption)
    return tag("figure", tag("figcaption", caption), frame, class_="table")


def facts(pairs: Iterable[tuple[Child, Child]]) -> Html:
    """Terms and what they are, in two columns."""
    return tag("dl", *(tag("div", tag("dt", term), tag("dd", value)) for term, value in pairs), class_="facts")


def listed(names: Sequence[str], most: int = 40) -> str:
    """Names with commas, the first `most` of them.

    >>> listed(["a", "b", "c"], 2)
    'a, b and 1 more'
    """
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def folded(summary: Child, *children: Child) -> Html:
    """Details that open on demand, without a script."""
    return tag("details", tag("summary", summary), *children)


def figure(picture: Child, caption: Child = None) -> Html:
    """A picture with its caption."""
    return tag("figure", picture, None if caption is None else tag("figcaption", caption))


def page(title: str, *children: Child, language: str = "en") -> str:
    """A complete document that needs no other file."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("title", title),
        tag("style", Html(STYLE)),
    )
    return f"<!DOCTYPE html>\n{tag('html', head, tag('body', *children), lang=language)}\n"


POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fcfcfb; --panel: #f4f4f2; --ink: #1c2127; --soft: #5a626d; --line: #dcdedf; --accent: #0b63a5;
}
@media (prefers-color-scheme: dark) {
  :root { --paper: #15181c; --panel: #1e2227; --ink: #e6e8ea; --soft: #a0a8b2; --line: #343a42; --accent: #72b7ee; }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body {
  margin: 0 auto; max-width: 1000px; padding: 3rem clamp(1rem, 4vw, 2.5rem) 4rem; background: var(--paper);
  color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
  overflow-wrap: break-word;
}
a { color: var(--accent); text-underline-offset: .15em; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; border-radius: 2px; }
p { margin: 0 0 .9rem; max-width: 72ch; }
h1 { margin: 0 0 .5rem; font-size: clamp(1.6rem, 5vw, 2.3rem); font-weight: 650; line-height: 1.15;
  letter-spacing: -.02em; text-wrap: balance; }
h2 { margin: 0 0 1rem; font-size: 1.3rem; font-weight: 650; line-height: 1.25; letter-spacing: -.01em; }
h3 { margin: 1.8rem 0 .7rem; font-size: 1rem; font-weight: 650; }
section { margin-top: 3.2rem; scroll-margin-top: 1rem; }
.kicker { margin: 0 0 .6rem; color: var(--accent); font-size: .8rem; font-weight: 650; letter-spacing: .06em; }
.lead { max-width: none; color: var(--soft); }
.nowrap { display: inline-block; margin-right: .5ch; white-space: nowrap; }
.note, figcaption { color: var(--soft); font-size: .875rem; line-height: 1.45; }
code, pre { font: .875em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { margin: 0 0 .9rem; padding: .9rem 1.1rem; background: var(--panel); border-radius: 6px; overflow-x: auto; }
nav ul { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin: 1.6rem 0 0; padding: .75rem 0; list-style: none;
  border: solid var(--line); border-width: 1px 0; font-size: .9rem; }
nav a { display: inline-block; padding: .15rem 0; text-decoration: none; }
nav a:hover { text-decoration: underline; }
.callout { margin: 1.4rem 0; padding: .9rem 1.1rem; background: var(--panel); border-left: 3px solid var(--accent);
  border-radius: 0 6px 6px 0; }
.callout > :last-child { margin-bottom: 0; }

.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 9.5rem), 1fr)); gap: 1.4rem 1.8rem;
  margin: 2rem 0 0; }
.tiles > div { display: flex; flex-direction: column; padding-top: .7rem; border-top: 1px solid var(--line); }
.tiles > div:first-child { border-top: 2px solid var(--accent); padding-top: calc(.7rem - 1px); }
.tiles dt { color: var(--soft); font-size: .875rem; }
.tiles dd { margin: 0; }
.tiles .value { font-size: 2rem; font-weight: 600; line-height: 1.2; letter-spacing: -.02em; }
.tiles div:first-child .value { color: var(--accent); }
.value, .number, .facts dd, .tiles dd, table { font-variant-numeric: tabular-nums lining-nums; }

.scroll { margin: 0 0 1rem; overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-size: .9rem; line-height: 1.4; }
th, td { padding: .42rem .6rem; text-align: left; vertical-align: baseline; border-bottom: 1px solid var(--line); }
th:first-child { padding-left: 0; }
td:last-child, thead th:last-child { padding-right: 0; }
thead th { color: var(--soft); font-size: .8rem; font-weight: 500; vertical-align: bottom; }
tbody th { min-width: 7rem; font-weight: 500; overflow-wrap: anywhere; }
tbody th small { display: block; max-width: 60ch; color: var(--soft); font-size: .8rem; font-weight: 400; }
th.number, td.number { text-align: right; white-space: nowrap; }
tr.mark > * { background: color-mix(in srgb, var(--accent) 9%, transparent); }
tr.mark > th, tr.mark > .number { font-weight: 650; }
tr.mark > :first-child { padding-left: .6rem; box-shadow: inset 3px 0 var(--accent); }
data { white-space: nowrap; }
.range { position: relative; display: inline-block; width: clamp(5rem, 22vw, 14rem); height: .75rem;
  border-bottom: 1px solid var(--line); }
.range i { position: absolute; bottom: 1px; left: var(--low); width: calc(var(--high) - var(--low)); height: 3px;
  background: color-mix(in srgb, currentColor 45%, transparent); }
.range b { position: absolute; bottom: -2px; left: calc(var(--at) - 4.5px); width: 9px; height: 9px; border-radius: 50%;
  background: currentColor; }
.mark .range { color: var(--accent); }
.bar { display: inline-block; width: 4.5rem; height: .55rem; margin-left: .6rem; background:
  linear-gradient(90deg, var(--accent) var(--share), color-mix(in srgb, var(--soft) 18%, transparent) var(--share)); }
.mark .bar { visibility: hidden; }

.confusion { width: auto; max-width: 100%; }
.confusion td { min-width: 4.1rem; padding: .7rem .4rem; text-align: center; vertical-align: middle;
  border: 2px solid var(--paper); background: color-mix(in srgb, var(--accent) var(--share), var(--panel)); }
.confusion td small { display: block; font-size: .75rem; }
.confusion th { max-width: 9rem; border: 0; padding-left: 0; vertical-align: middle; }
.confusion thead th { max-width: 5.5rem; padding: .42rem .2rem; text-align: center; vertical-align: bottom;
  overflow-wrap: anywhere; }
.confusion thead td { min-width: 0; background: none; }

.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr));
  gap: 0 2.5rem; margin: 0; }
.facts > div { display: grid; grid-template-columns: minmax(7rem, 11rem) 1fr; gap: 1rem; padding: .42rem 0;
  border-bottom: 1px solid var(--line); font-size: .9rem; }
.facts dt { color: var(--soft); }
.facts dd { margin: 0; overflow-wrap: anywhere; }

figure { margin: 0; }
figcaption { margin-top: .4rem; max-width: 65ch; }
figure.table figcaption { margin: 0 0 .4rem; }
svg { display: block; width: 100%; height: auto; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
svg text { font-family: inherit; }
.multiples { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr));
  gap: 2rem 2.5rem; margin: 0 0 1.4rem; }
.side { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 1.5rem 2.5rem;
  align-items: start; }
.examples { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17.5rem), 1fr));
  gap: 1.6rem 1.8rem; margin: 0; padding: 0; list-style: none; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 3px; }
.pair img { display: block; width: 100%; height: auto; aspect-ratio: 1; object-fit: cover; background: var(--panel); }
figcaption b { color: var(--ink); font-weight: 650; }
.matrix { display: block; width: min(100%, 32rem); image-rendering: pixelated; }
details { margin: 0 0 1rem; }
summary { padding: .3rem 0; color: var(--accent); font-size: .9rem; cursor: pointer; }
details[open] > summary { margin-bottom: .6rem; }
footer { margin-top: 4rem; padding-top: 1rem; border-top: 1px solid var(--line); color: var(--soft);
  font-size: .85rem; }

@media (max-width: 480px) { .facts > div { grid-template-columns: 1fr; gap: 0; } }
@media (prefers-reduced-motion: reduce) { html { scroll-behavior: auto; } }
@media print {
  :root { --paper: #fff; --panel: #f4f4f2; --ink: #000; --soft: #444; --line: #ccc; --accent: #0b5590; }
  @page { margin: 16mm 14mm; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  nav { display: none; }
  section { margin-top: 1.8rem; }
  h2, h3, .table figcaption { break-after: avoid; }
  figure, tr, .tiles, .callout, .examples li { break-inside: avoid; }
  .scroll, pre { overflow: visible; }
  pre { white-space: pre-wrap; }
  .bar, .range *, .confusion td, tr.mark > *, .callout, pre { print-color-adjust: exact; }
  details::details-content { content-visibility: visible; }
  a { color: inherit; text-decoration: none; }
}
"""
