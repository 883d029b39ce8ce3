"""Results as tables: on the terminal, as Markdown, and in README.md, whose figures nobody else writes.

python bench/report.py [FILE.csv ...] [--readme] [--plots FOLDER]
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

import rows
from peers import ANCHOR, COPY, IN_PLACE
from rich.console import Console
from rich.table import Table
from rows import Row

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
REFERENCE = "prodigyopt"
MARK = re.compile(r"(<!-- (\w+): written by bench/report.py -->\n).*?(\n<!-- end of \2 -->)", re.DOTALL)
Cells = dict[str, Callable[[Row, list[Row]], str]]


def _number(name: str, form: str, scale: float = 1) -> Callable[[Row, list[Row]], str]:
    return lambda row, _: "" if row[name] is None else format(row[name] * scale, form)


def _quartiles(row: Row, _: list[Row]) -> str:
    return "" if row["ms"] is None else f"{row['ms_25']:.3g} - {row['ms_75']:.3g}"


def _ratio(row: Row, measured: list[Row]) -> str:
    value = rows.ratio(row, measured, ANCHOR)
    return "" if value is None else f"{value:.2f} x"


def _share(row: Row, _: list[Row]) -> str:
    value = rows.share_of_copy(row)
    return "" if value is None else f"{value:.0%}"


STEP: Cells = {
    "ms": _number("ms", ".3f"),
    "quartiles": _quartiles,
    f"to {ANCHOR}": _ratio,
    "of copy bandwidth": _share,
    "host ms": _number("host_ms", ".3f"),
    "wall ms": _number("wall_ms", ".3f"),
    "launches": _number("launches", "d"),
    "syncs": _number("syncs", "d"),
    "state B/param": _number("state_bytes", ".1f"),
    "extra MB": _number("extra_bytes", ".1f", 1e-6),
}
TRAIN: Cells = {
    "optimizer ms": _number("ms", ".3f"),
    "quartiles": _quartiles,
    f"to {ANCHOR}": _ratio,
    "forward, backward ms": _number("train_ms", ".3f"),
    "tokens/s": _number("tokens_per_s", ",.0f"),
}


def groups(measured: list[Row]) -> list[tuple[str, Cells, list[Row]]]:
    """Title, columns and rows of each workload's table; without columns that nobody has a figure for."""

    def key(row: Row) -> tuple[str, ...]:
        return row["device"], row["workload"], row["kind"], row["dtype"]

    found = []
    for (_, workload, kind, dtype), same in groupby(measured, key):
        own = list(same)
        cells = {name: cell for name, cell in (STEP if kind == "step" else TRAIN).items()}
        used = {name: cell for name, cell in cells.items() if any(cell(row, own) for row in own)}
        sizes = next(((r["parameters"], r["tensors"]) for r in own if r["peer"] not in (COPY, IN_PLACE)), (0, 0))
        found.append((f"{workload}: {sizes[0]:,} parameters in {sizes[1]:,} tensors, {dtype}", used, own))
    return found


def name_of(row: Row) -> str:
    """A peer; in a second heat with the heat's number, because only figures of one heat compare."""
    return row["peer"] + (f" (heat {row['heat'] + 1})" if row["heat"] else "")


def print_table(measured: list[Row]) -> None:
    """Every workload's table on the terminal, then who was not measured and why."""
    console = Console()
    console = console if console.is_terminal else Console(width=150)
    for title, cells, own in groups(measured):
        sheet = Table(title=title, title_justify="left")
        sheet.add_column("optimizer")
        for column in cells:
            sheet.add_column(column, justify="right")
        for row in own:
            if row["status"] == "ok":
                style = "bold" if row["peer"].startswith("prodigy_fused") else None
                sheet.add_row(name_of(row), *(cell(row, own) for cell in cells.values()), style=style)
        console.print(sheet)
    for line in absent(measured):
        console.print(line, markup=False)


def absent(measured: list[Row]) -> list[str]:
    """Who was not measured, where and why: a line per reason."""
    where: dict[tuple[str, str, str], list[str]] = {}
    for row in measured:
        if row["status"] != "ok":
            where.setdefault((row["peer"], row["status"], row["reason"]), []).append(row["workload"])
    return [
        f"{peer}: {reason if status == 'not run' else f'{status}: {reason}'} ({'; '.join(dict.fromkeys(workloads))})"
        for (peer, status, reason), workloads in where.items()
    ]


def _sheet(header: list[str], lines: list[list[str]]) -> list[str]:
    rule = "| --- |" + " ---: |" * (len(header) - 1)
    return ["| " + " | ".join(header) + " |", rule, *("| " + " | ".join(line) + " |" for line in lines)]


def where_line(row: Row) -> str:
    """Machine and versions of a row, in a sentence."""
    threads = f", {row['threads']} threads" if not row["cuda"] else f", CUDA {row['cuda']}, driver {row['driver']}"
    code = f"commit {row['commit']}, {row['date']}"
    return f"{row['device']}{threads}, torch {row['torch']}, Python {row['python']}, {code}"


def markdown(measured: list[Row]) -> str:
    """All tables as Markdown, for a summary next to the rows."""
    lines = []
    for title, cells, own in groups(measured):
        body = [[name_of(r), *(c(r, own) for c in cells.values())] for r in own if r["status"] == "ok"]
        lines += [f"### {title}", "", where_line(own[0]) + ".", "", *_sheet(["optimizer", *cells], body), ""]
    return "\n".join([*lines, *(f"- {line}" for line in absent(measured))]) + "\n"


def _best(row: Row) -> bool:
    """Our one-pass optimizer with slice_p=1, the one a user gets."""
    compiled = row["peer"].startswith("prodigy_fused(") and "foreach" not in row["peer"]
    return compiled and row["slice_p"] == 1


def cost(measured: list[Row]) -> str:
    """README's table: our step beside AdamW(fused) and prodigyopt on every workload that has all three."""
    header = ["parameters", "prodigy-fused", "torch AdamW(fused=True)", "prodigyopt", "to AdamW", "to prodigyopt"]
    lines, last = [], None
    for _, _, own in groups([row for row in measured if row["kind"] == "step" and row["status"] == "ok"]):
        mine = next((row for row in own if _best(row) and not row["workload"].startswith("scan")), None)
        if mine is None:
            continue
        others = {name: _in_heat_of(mine, own, name) for name in (ANCHOR, REFERENCE)}
        ratios = [_times(rows.ratio(mine, own, ANCHOR)), _faster(own, mine)]
        times = ["-" if row is None else f"{row['ms']:.3g} ms" for row in (mine, *others.values())]
        title = mine["workload"] + (f" ({mine['device']})" if mine["cuda"] else "")
        lines.append([title, *times, *ratios])
        last = mine
    if last is None:
        return "Not measured yet."
    source = f"Medians of the last full run: {where_line(last)}."
    return "\n".join([*_sheet(header, lines), "", source])


def _in_heat_of(mine: Row, own: list[Row], name: str) -> Row | None:
    """A peer's row, of our own heat if it was in it."""
    found = [row for row in own if row["peer"] == name]
    return next((row for row in found if row["heat"] == mine["heat"]), found[0] if found else None)


def _faster(own: list[Row], mine: Row) -> str:
    """How many times faster we are than prodigyopt; through AdamW where the two ran in different heats."""
    reference = _in_heat_of(mine, own, REFERENCE)
    ratios = [rows.ratio(row, own, ANCHOR) if row else None for row in (reference, mine)]
    return f"{ratios[0] / ratios[1]:.1f} x faster" if ratios[0] and ratios[1] else "-"


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} x"


def for_the_record(files: list[Path] | None = None) -> list[Row]:
    """The last full run of each workload, of the committed files: the CPU's and every GPU's."""
    files = files or [RESULTS / "bench.csv", *sorted(RESULTS.glob("*/*/bench.csv"))]
    everything = [row for file in files if file.exists() for row in rows.read(file)]
    return rows.latest([row for row in everything if row["mode"] == "full"])


def with_figures(readme: str, measured: list[Row]) -> str:
    """README's text with everything between the marks written anew."""
    blocks = {"cost": cost}
    return MARK.sub(lambda found: found[1] + blocks[found[2]](measured) + found[3], readme)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="*", help="default: all committed ones")
    parser.add_argument("--readme", action="store_true", help="write README.md's figures anew")
    parser.add_argument("--plots", type=Path, help="write the plots to this folder")
    args = parser.parse_args()
    measured = for_the_record(args.files)
    if args.readme:
        path = ROOT / "README.md"
        path.write_text(with_figures(path.read_text(), measured))
    if args.plots:
        import plots

        for path in plots.draw(measured, args.plots):
            print(path)
    if not (args.readme or args.plots):
        print(markdown(measured))


if __name__ == "__main__":
    main()
