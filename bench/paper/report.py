"""Rows as tables, verdicts and figures: on the terminal, as files, and in docs/paper.md, whose figures it writes."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image
from rich.console import Console
from rich.table import Table
from shared import RESULTS, ROOT

from paper import experiments
from paper.store import Row, Store, seconds_of

COMMITTED = RESULTS / "paper"
PAGE = ROOT / "docs" / "paper.md"
MARK = re.compile(r"(<!-- (\w+): written by bench/paper/report.py -->\n).*?(<!-- end of \2 -->)", re.DOTALL)


class Verdict(NamedTuple):
    """What became of a claim."""

    claim: str  # as the paper makes it, in a few words
    seen: str  # the figures that decide, made from rows
    holds: bool | None  # None: partly, or not to be decided by these rows


WORDS = {True: "yes", False: "**no**", None: "in part"}


def store_of(name: str, folder: Path) -> Store:
    """Returns the rows of an experiment in a folder; see `Store` for errors."""
    module = experiments.load(name)
    return Store(folder / f"{name}.csv", module.KEYS, module.NUMBERS)


def show(name: str, rows: list[Row]) -> None:
    """Prints an experiment's tables and verdicts."""
    console, module = Console(), experiments.load(name)
    console = console if console.is_terminal else Console(width=150)
    claims = [[verdict.claim, verdict.seen, WORDS[verdict.holds]] for verdict in module.verdicts(rows)]
    sheets = {**module.tables(rows), f"{name}: the claims": [["claim", "seen", "holds"], *claims]}
    for title, (header, *lines) in sheets.items():
        console.print(f"\n{title}", markup=False)
        sheet = Table(*header)
        for line in lines:
            sheet.add_row(*line)
        console.print(sheet)


def draw(name: str, rows: list[Row], folder: Path) -> list[Path]:
    """Draws an experiment's figures into files NAME.png, NAME-....png; returns them."""
    paths = []
    for end, figure in experiments.load(name).plot(rows).items():
        paths.append(folder / f"{name}{end}.png")
        drawn = io.BytesIO()
        figure.savefig(drawn, dpi=100)
        plt.close(figure)
        # A palette, for a third of the bytes.
        Image.open(drawn).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(paths[-1], optimize=True)
    return paths


def markdown(header: list[str], lines: list[list[str]]) -> list[str]:
    """Returns the lines of a table."""
    rule = "| --- |" + " ---: |" * (len(header) - 1)
    return ["| " + " | ".join(header) + " |", rule, *("| " + " | ".join(line) + " |" for line in lines)]


def block(name: str, rows: list[Row]) -> str:
    """Returns what docs/paper.md has of an experiment: verdicts, figures, tables, and where it was run."""
    module = experiments.load(name)
    text = ["| claim | seen | holds |", "| --- | --- | --- |"]
    text += [f"| {each.claim} | {each.seen} | {WORDS[each.holds]} |" for each in module.verdicts(rows)]
    for path in (*sorted(COMMITTED.glob(f"{name}.png")), *sorted(COMMITTED.glob(f"{name}-*.png"))):
        text += ["", f"![{module.__doc__.splitlines()[0]}](../{path.relative_to(ROOT)})"]
    for title, (header, *lines) in module.tables(rows).items():
        text += ["", f"{title}:", "", *markdown(header, lines)]
    return "\n".join([*text, "", where_line(name, rows)])


def where_line(name: str, rows: list[Row]) -> str:
    """Returns the number, cost and origin of the rows in a line."""

    def each(column: str) -> str:
        return ", ".join(dict.fromkeys(str(row[column]) for row in rows))

    seeds = sorted({row["seed"] for row in rows}) if "seed" in rows[0] else []
    return (
        f"[{len(rows):,} runs](../bench/results/paper/{name}.csv)"
        + (f", seeds {seeds[0]} to {seeds[-1]}" if seeds else "")
        + f", {seconds_of(rows) / 60:.1f} CPU minutes on {each('machine')}, torch {each('torch')}, "
        f"commit {each('commit')}, {each('date')}."
    )


def with_figures(text: str) -> str:
    """Returns the text of docs/paper.md with everything between the marks rewritten from the committed rows."""

    def written(found: re.Match[str]) -> str:
        return found[1] + block(found[2], store_of(found[2], COMMITTED).rows) + "\n" + found[3]

    return MARK.sub(written, text)


def write_all() -> None:
    """Draws the figures of all committed rows, and writes docs/paper.md."""
    for name in experiments.names():
        rows = store_of(name, COMMITTED).rows
        if rows:
            draw(name, rows, COMMITTED)
    PAGE.write_text(with_figures(PAGE.read_text()))
