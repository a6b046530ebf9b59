"""Pieces of the page; every text from outside goes through ``escape``."""

from collections.abc import Mapping, Sequence
from html import escape
from string import Template
from typing import Any

from npo_fast.report.runs import Answer
from npo_fast.report.table import text

MARK = "<!-- made by npo-fast report -->"
PAGE = Template("""<!doctype html>
$mark
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --page: #fff; --ink: #1d2025; --soft: #5d636d;
  --line: #d9dce1; --box: #f5f6f8; }
@media (prefers-color-scheme: dark) { :root { --page: #15171b; --ink: #e4e6ea; --soft: #9aa1ac;
  --line: #34383f; --box: #1e2126; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; background: var(--page);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.25rem; margin: 2.2rem 0 .6rem; }
p { max-width: 46rem; } .soft, .missing { color: var(--soft); }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; width: max-content; min-width: 100%;
  font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .7rem; text-align: left; border-bottom: 1px solid var(--line);
  max-width: 18rem; overflow-wrap: break-word; }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--page); }
tr:last-child td { border-bottom: 0; }
th, th:first-child { background: var(--box); font-weight: 600; }
@media (max-width: 40rem) { th:first-child, td:first-child { max-width: 8rem; } }
figure { margin: 0; } figcaption { font-size: .9rem; color: var(--soft); }
.figure { display: block; width: 100%; max-width: 42rem; height: auto;
  font-family: inherit; stroke-linejoin: round; }
.grid { display: grid; gap: 1rem; margin-bottom: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); }
article { border: 1px solid var(--line); border-radius: 6px; margin: .8rem 0; overflow: hidden; }
article h3 { margin: 0; padding: .5rem .8rem; background: var(--box); font-size: .95rem;
  white-space: pre-wrap; overflow-wrap: anywhere; }
dl { display: grid; margin: 0; grid-template-columns:
  repeat(auto-fit, minmax(min(100%, 13rem), 1fr)); }
dl > div { padding: .5rem .8rem; border-top: 1px solid var(--line); font-size: .9rem; }
dt { color: var(--soft); font-size: .8rem; } dd { margin: 0; white-space: pre-wrap;
  overflow-wrap: anywhere; }
code { font-size: .85em; background: var(--box); padding: .1em .3em; border-radius: 3px;
  overflow-wrap: anywhere; }
li { margin: .5rem 0; }
@media print {
  :root { color-scheme: light; --page: #fff; --ink: #000; --soft: #444; --line: #bbb;
    --box: #f2f2f2; }
  body { max-width: none; font-size: 11px; } .scroll { overflow: visible; border: 0; }
  table { width: 100%; font-size: .5rem; } th, td { padding: .15rem .2rem; }
  .figure { max-width: 13cm; } .grid { grid-template-columns: 1fr 1fr; }
  article, figure, tr { break-inside: avoid; } h2 { break-after: avoid; }
}
</style>
</head>
<body>
<h1>$title</h1>
$sections
<p class="soft">npo-fast $version</p>
</body>
</html>
""")


def html_table(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{escape(text(row.get(name)))}</td>" for name in columns) + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0"><table>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table></div>"
    )


def side_by_side(asked: Answer, columns: Mapping[str, Sequence[Answer]]) -> str:
    """One question: the truth, then each column's answer to it, where it has one."""
    cells = {"truth": asked.truth}
    for name, answers in columns.items():
        found = (one.text for one in answers if one.answers(asked.question, asked.truth))
        if (answer := next(found, None)) is not None:
            cells[name] = answer
    return card(asked.question, cells)


def card(title: str, cells: Mapping[str, str]) -> str:
    """A box with named texts side by side."""
    body = "\n".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(content) or '(nothing)'}</dd></div>"
        for name, content in cells.items()
    )
    return f"<article>\n<h3>{escape(title)}</h3>\n<dl>\n{body}\n</dl>\n</article>"


def note(sentence: str) -> str:
    return f'<p class="missing">{escape(sentence)}</p>'


def code(sentence: str) -> str:
    """HTML of a text in which backticks set off commands."""
    parts = enumerate(escape(sentence).split("`"))
    return "".join(f"<code>{part}</code>" if i % 2 else part for i, part in parts)
