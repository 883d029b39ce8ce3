"""Results as tables: on the terminal, as Markdown, and in README.md and docs/, all of whose figures are written here.

python bench/report.py [FILE.csv ...] [--write]
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import goals
import memory
import roofline
import rows
import slice_p
from peers import ANCHOR, COPY, IN_PLACE
from rich.console import Console
from rich.table import Table
from rows import Row
from shared import RESULTS, ROOT

REFERENCE = "prodigyopt"
MARK = re.compile(r"(<!-- (\w+): written by bench/report.py -->\n).*?(<!-- end of \2 -->)", re.DOTALL)
HEAD = "# Measurements\n\nWritten by `make figures` from the rows of the CSV files in this folder.\n"
Cells = dict[str, Callable[[Row, list[Row]], str]]
WRITTEN = (ROOT / "README.md", *(ROOT / "docs" / f"{page}.md" for page in ("benchmarks", "distributed", "memory")))


def _number(name: str, form: str, scale: float = 1) -> Callable[[Row, list[Row]], str]:
    return lambda row, _: "" if row[name] is None else format(row[name] * scale, form)


def _quartiles(row: Row, _: list[Row]) -> str:
    return "" if row["ms"] is None else f"{row['ms_25']:.3g} - {row['ms_75']:.3g}"


def _ratio(row: Row, measured: list[Row]) -> str:
    value = rows.ratio(row, measured, ANCHOR)
    return "" if value is None else f"{value:.2f} x"


def _share(bandwidth: Callable[[Row], float | None]) -> Callable[[Row, list[Row]], str]:
    def cell(row: Row, _: list[Row]) -> str:
        value = rows.share(row, bandwidth(row))
        return "" if value is None else f"{value:.0%}"

    return cell


STEP: Cells = {
    "ms": _number("ms", ".3f"),
    "quartiles": _quartiles,
    f"to {ANCHOR}": _ratio,
    "of copy": _share(itemgetter("copy_gb_s")),
    "of best bandwidth": _share(rows.limit_gb_s),
    "host ms": _number("host_ms", ".3f"),
    "wall ms": _number("wall_ms", ".3f"),
    "launches": _number("launches", "d"),
    "syncs": _number("syncs", "d"),
    "state B/param": _number("state_bytes", ".1f"),
    "extra MB": _number("extra_bytes", ".1f", 1e-6),
    "longest kernel us": _number("kernel_us", ".1f"),
    "d moved in turns": lambda row, _: str(row["moves"] or ""),
}
TRAIN: Cells = {
    "optimizer ms": _number("ms", ".3f"),
    "quartiles": _quartiles,
    f"to {ANCHOR}": _ratio,
    "forward, backward ms": _number("train_ms", ".3f"),
    "tokens/s": _number("tokens_per_s", ",.0f"),
}


def groups(measured: list[Row]) -> list[tuple[str, Cells, list[Row]]]:
    """Returns title, columns and rows of each workload's table, without columns that have no figure."""

    def key(row: Row) -> tuple[str, ...]:
        return row["device"], row["workload"], row["kind"], row["dtype"]

    found = []
    for (_, workload, kind, dtype), same in groupby(measured, key):
        own = list(same)
        cells = STEP if kind == "step" else TRAIN
        used = {name: cell for name, cell in cells.items() if any(cell(row, own) for row in own)}
        sizes = next(((r["parameters"], r["tensors"]) for r in own if r["peer"] not in (COPY, IN_PLACE)), (0, 0))
        found.append((f"{workload}: {sizes[0]:,} parameters in {sizes[1]:,} tensors, {dtype}", used, own))
    return found


def name_of(row: Row) -> str:
    """Returns the name of a row's peer; in a second heat with the heat's number: only figures of one heat compare."""
    return row["peer"] + (f" (heat {row['heat'] + 1})" if row["heat"] else "")


def print_table(measured: list[Row]) -> None:
    """Prints every workload's table, then which peers were not measured and why."""
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
    """Returns a line per reason for which a peer was not measured, or not completely: the peer, why and where."""
    where: dict[tuple[str, str, str], list[str]] = {}
    for row in measured:
        if row["reason"]:
            where.setdefault((row["peer"], row["status"], row["reason"]), []).append(row["workload"])
    return [
        f"{peer}: {status}: {reason} ({'; '.join(dict.fromkeys(workloads))})"
        for (peer, status, reason), workloads in where.items()
    ]


def _sheet(header: list[str], lines: list[list[str]]) -> list[str]:
    rule = "| --- |" + " ---: |" * (len(header) - 1)
    return ["| " + " | ".join(header) + " |", rule, *("| " + " | ".join(line) + " |" for line in lines)]


def where_line(row: Row) -> str:
    """Returns the machine and versions of a row in one line."""
    threads = f", {row['threads']} threads" if not row["cuda"] else f", CUDA {row['cuda']}, driver {row['driver']}"
    code = f"commit {row['commit']}, {row['date']}"
    return f"{row['device']}{threads}, torch {row['torch']}, Python {row['python']}, {code}"


def markdown(measured: list[Row]) -> str:
    """Returns all tables as Markdown, for the summary next to the rows."""
    lines = []
    for title, cells, own in groups(measured):
        body = [[name_of(r), *(c(r, own) for c in cells.values())] for r in own if r["status"] == "ok"]
        lines += [f"### {title}", "", where_line(own[0]) + ".", "", *_sheet(["optimizer", *cells], body), ""]
    return "\n".join([*lines, *(f"- {line}" for line in absent(measured))]) + "\n"


def _best(row: Row) -> bool:
    """Returns whether a row is of our one-pass optimizer with default options, the one that users get."""
    return re.fullmatch(r"prodigy_fused\((?!foreach)\w+\)", row["peer"]) is not None


def cost(measured: list[Row]) -> str:
    """Returns the table of costs: our step, AdamW(fused)'s and prodigyopt's, on every workload outside the scan."""
    steps = [row for row in measured if row["kind"] == "step" and row["status"] == "ok" and row["dtype"] == "float32"]
    text = []
    for device in dict.fromkeys(row["device"] for row in steps):
        here = [row for row in steps if row["device"] == device and not row["workload"].startswith("scan")]
        lines = [line for _, _, own in groups(here) if (line := _cost_line(own))]
        header = ["parameters", "prodigy-fused", "AdamW(fused)", "prodigyopt", "to AdamW", "faster than prodigyopt"]
        text += [*_sheet(header, lines), "", f"Medians; {where_line(here[-1])}.", ""]
        picture = rows.plot_stem(here[-1]) + "-ratios.png"
        if (RESULTS / picture).exists():
            text += [f"![Time of a step to AdamW(fused)'s](bench/results/{picture})", ""]
    return "\n".join(text).strip()


def _cost_line(own: list[Row]) -> list[str] | None:
    mine = next((row for row in own if _best(row)), None)
    if mine is None:
        return None
    anchor, reference = (_in_heat_of(mine, own, name) for name in (ANCHOR, REFERENCE))
    times = ["-" if row is None else f"{row['ms']:.3g} ms" for row in (mine, anchor, reference)]
    to_anchor = rows.ratio(mine, own, ANCHOR)
    times_faster = goals.faster_than(REFERENCE)(mine, own)
    faster = f"{times_faster:.1f} x" if times_faster else "-"
    return [mine["workload"], *times, f"{to_anchor:.2f} x" if to_anchor else "-", faster]


def gpu(measured: list[Row]) -> str:
    """Returns the tables of targets on a GPU, for docs/benchmarks.md."""
    here = goals.on_last_gpu(measured)
    text = [*_sheet(["on a GPU, float32", "parameters", "goal", "measured"], goals.table(measured)), ""]
    text += _policies(here, "cuda", ["share of a copy", "to AdamW(fused)", "Triton to CUDA, speed"])
    return "\n".join([*text, f"{where_line(here[-1])}." if here else "No GPU measured yet."])


def policies(measured: list[Row]) -> str:
    """Returns the table of the ways to store and to sample on a CPU, for docs/benchmarks.md."""
    here = [row for row in measured if row["workload"] in goals.POLICY_WORKLOADS["cpu"] and not row["cuda"]]
    lines = _policies(here, "cpu", ["to AdamW(fused)"])
    return "\n".join([*lines, f"{where_line(here[-1])}." if here else "Not measured yet."])


def _policies(measured: list[Row], device: str, columns: list[str]) -> list[str]:
    workload, lines = goals.policies(measured, device)
    return [*_sheet([f"{workload}: parameters, options", "bytes", *columns], lines), ""]


def demo(_: list[Row]) -> str:
    """Returns README's sentence about the plot of the demo."""
    figures = json.loads((RESULTS / "demo.json").read_text())
    racers = figures["optimizers"].values()
    losses, times = (", ".join(f"{r[key]:.{n}f}" for r in racers) for key, n in (("val_loss", 3), ("optimizer_ms", 2)))
    return (
        f"The picture above is of `make demo`, {figures['options']['steps']:,} steps on {figures['machine']['cpu']}, "
        f"{figures['machine']['threads']} threads.\nFor {', '.join(r['label'] for r in racers)} the validation "
        f"losses are {losses}, and a step of the optimizer took {times} ms ([figures](bench/results/demo.json))."
    )


def _in_heat_of(mine: Row, own: list[Row], name: str) -> Row | None:
    """Returns a peer's row, of the heat of `mine` if it was in it; None if it was in none."""
    found = [row for row in own if row["peer"] == name]
    return next((row for row in found if row["heat"] == mine["heat"]), found[0] if found else None)


def for_the_record(files: list[Path] | None = None) -> list[Row]:
    """Returns the last run of each workload in the files; without files, the last full run in the committed ones."""
    if files:
        return rows.latest([row for file in files for row in rows.read(file)])
    committed = [file for file in (RESULTS / "bench.csv", *sorted(RESULTS.glob("*/*/bench.csv"))) if file.exists()]
    return rows.latest([row for file in committed for row in rows.read(file) if row["mode"] == "full"])


def with_figures(file: Path, measured: list[Row]) -> str:
    """Returns the text of one of the files WRITTEN, with everything between the marks rewritten."""
    root = "../" * (len(file.relative_to(ROOT).parts) - 1)
    tables = {"model": roofline.table, "memory": memory.table, "samples": slice_p.table}
    blocks = {"cost": cost, "gpu": gpu, "policies": policies, "demo": demo}
    blocks |= {name: lambda _, table=table: table() for name, table in tables.items()}

    def written(found: re.Match[str]) -> str:
        return found[1] + blocks[found[2]](measured).replace("](bench/", f"]({root}bench/") + "\n" + found[3]

    return MARK.sub(written, file.read_text())


def main() -> None:
    """Prints the tables as Markdown, or writes all figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=rows.file, nargs="*", help="default: all committed ones")
    parser.add_argument(
        "--write", action="store_true", help="rewrite plots, summary.md, figures in README.md and docs/"
    )
    args = parser.parse_args()
    measured = for_the_record(args.files)
    if not args.write:
        print(markdown(measured))
        return
    import plots

    plots.draw(measured, RESULTS)
    plots.memory(json.loads(memory.FILE.read_text()), RESULTS / "memory.png")
    model = ["## The cost model against the measurements", "", roofline.report(measured), "", roofline.table()]
    (RESULTS / "summary.md").write_text("\n".join([HEAD, markdown(measured), *model, ""]))
    for file in WRITTEN:
        file.write_text(with_figures(file, measured))


if __name__ == "__main__":
    main()
