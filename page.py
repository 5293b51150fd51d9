"""One HTML page that is complete in itself: its parts, its tables, its figures as drawings within it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import figures
from methods import BLANK

NAMES_IN_DIGITS = ("arm", "against", "patient")  # which are no numbers
BLANK_CELL = ' class="blank"'


class Page:
    """What the page holds, part after part, its figures and tables counted. folder: of the figures."""

    def __init__(self, folder: Path):
        self.folder, self.drawn, self.tables = Path(folder), [], 0

    def figure(self, name: str, figure: Any, caption: str) -> str:
        """Write a figure and show it. caption: plain text."""
        drawing = figures.save(self.folder, name, figure)
        self.drawn.append(name)
        label = f"Figure {len(self.drawn)}"
        return (
            f'<figure id="{escape(name)}">{inline(drawing, name, f"{label}. {caption}")}'
            f"<figcaption><b>{label}.</b> {escape(caption)}</figcaption></figure>\n"
        )

    def table(self, caption: str, columns: dict[str, Callable[[dict], Any]], rows: Sequence[dict]) -> str:
        """columns: heading -> what it shows of a row, plain text; what looks like a number stands right."""
        if not rows:
            return ""
        self.tables += 1
        cells = [[str(make(row)) for make in columns.values()] for row in rows]
        kinds = [
            ' class="n"' if name not in NAMES_IN_DIGITS and _numeric(column) else ""
            for name, column in zip(columns, zip(*cells, strict=True), strict=True)
        ]
        head = "".join(f"<th{kind}>{escape(name)}</th>" for kind, name in zip(kinds, columns, strict=True))
        body = "".join(f"<tr>{''.join(map(_cell, kinds, line))}</tr>\n" for line in cells)
        return (
            f'<div class="scroll"><table><caption><b>Table {self.tables}.</b> {escape(caption)}</caption>'
            f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>\n"
        )


def _cell(kind: str, text: str) -> str:
    return f"<td{BLANK_CELL if text == BLANK else kind}>{escape(text)}</td>"


def _numeric(texts: Sequence[str]) -> bool:
    numbers = all(re.fullmatch(r"(n/a|none|to|[-+<\d.%→±() ])*", text) for text in texts)
    return numbers and any(re.search(r"\d", text) for text in texts)


def inline(drawing: str, name: str, words: str) -> str:
    """An SVG file as part of a page: as wide as the page, its ink and grid the page's, its ids its own."""
    svg = drawing[drawing.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s(width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r'\sxmlns(:xlink)?="[^"]*"', "", svg)
    svg = svg.replace("xlink:href=", "href=")
    svg = re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = svg.replace(figures.INK, "var(--ink)").replace(figures.FAINT, "var(--faint)")
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(words)}"', 1)


def section(title: str, *parts: str) -> tuple[str, str]:
    return title, "".join(parts)


def paragraph(text: str, kind: str = "text") -> str:
    return f'<p class="{kind}">{escape(text)}</p>\n'
