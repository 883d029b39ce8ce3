"""Plots of the results: time against size with the roofline, ratios per workload, the parts of a training step."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import rows
from memory import bars
from peers import ANCHOR, COPY, IN_PLACE
from rows import Row
from shared import palette

WIDTH = 0.8  # of a bar


def colour(peer: str) -> str:
    """Returns the colour of a peer in all plots."""
    if peer.startswith("prodigy_fused("):
        return palette.OURS
    return palette.REFERENCE if peer == "prodigyopt" else palette.OTHER


def _finish(figure: plt.Figure, path: Path) -> Path:
    for axes in figure.axes:
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def sizes(measured: list[Row], path: Path) -> Path:
    """Plots the time of a step against the number of parameters, and the time that its bytes take at least."""
    figure, axes = plt.subplots(figsize=(8, 5.5), layout="constrained")
    scan = [row for row in measured if row["workload"].startswith("scan")]
    for peer in dict.fromkeys(row["peer"] for row in scan if row["peer"] not in (COPY, IN_PLACE)):
        own = sorted((row for row in scan if row["peer"] == peer), key=lambda row: row["parameters"])
        x, y = [row["parameters"] for row in own], [row["ms"] for row in own]
        low, high = ([abs(row[q] - row["ms"]) for row in own] for q in ("ms_25", "ms_75"))
        axes.errorbar(x, y, [low, high], marker="o", capsize=3, color=colour(peer), label=peer)
        if own[0]["bytes"] and own[0]["copy_gb_s"]:
            ideal = [row["parameters"] * row["bytes"] / rows.limit_gb_s(row) / 1e6 for row in own]
            label = f"{own[0]['bytes']:g} bytes per parameter at the bandwidth of the same race"
            axes.plot(x, ideal, linestyle="--", color=colour(peer), alpha=0.7, label=label)
    axes.set(xscale="log", yscale="log", xlabel="parameters, in tensors of 1 Mi", ylabel="ms per step")
    axes.set_title(f"Time of a step, {_machine(scan)}")
    axes.legend(fontsize=8)
    return _finish(figure, path)


def ratios(measured: list[Row], path: Path) -> Path:
    """Plots, in a panel per workload, the time of every peer's step relative to AdamW(fused)'s in the same race."""
    steps = [row for row in measured if _compared(row, measured)]
    workloads = list(dict.fromkeys(row["workload"] for row in steps))
    columns = min(3, len(workloads))
    lines = math.ceil(len(workloads) / columns)
    figure, panels = plt.subplots(lines, columns, figsize=(5.3 * columns, 3.6 * lines), layout="constrained")
    panels = [panels] if len(workloads) == 1 else list(panels.flat)
    for axes, workload in zip(panels, workloads, strict=False):
        own = [row for row in steps if row["workload"] == workload]
        values = {row["peer"]: rows.ratio(row, measured, ANCHOR) for row in own}
        names, lengths = zip(*sorted(values.items(), key=lambda pair: -pair[1]), strict=True)
        bars = axes.barh(names, lengths, WIDTH, color=[colour(name) for name in names])
        axes.bar_label(bars, fmt=" %.2f x", fontsize=8)
        axes.margins(x=0.15)  # room for the labels
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set(title=workload, xlabel=f"time to {ANCHOR}")
        axes.tick_params(axis="y", labelsize=8)
    for axes in panels[len(workloads) :]:
        axes.remove()
    figure.suptitle(_machine(steps))
    return _finish(figure, path)


def training(measured: list[Row], path: Path) -> Path:
    """Plots the time of a training step of the demo's GPT: forward and backward, and the optimizer."""
    own = sorted((row for row in measured if row["kind"] == "train"), key=lambda row: -row["ms"])
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    names, times = [row["peer"] for row in own], [row["train_ms"] for row in own]
    axes.barh(names, times, WIDTH, color="#dddddd", label="forward and backward")
    axes.barh(names, [r["ms"] for r in own], WIDTH, left=times, color=[colour(name) for name in names])
    for place, row in enumerate(own):
        text = f" {row['tokens_per_s']:,.0f} tokens/s"
        axes.text(row["train_ms"] + row["ms"], place, text, va="center", fontsize=8)
    axes.set(
        xlabel="ms per step; coloured: the optimizer", title=f"Training a GPT of {own[0]['parameters']:,} parameters"
    )
    axes.set_xlim(right=1.15 * max(row["train_ms"] + row["ms"] for row in own))
    return _finish(figure, path)


def memory(results: dict[str, Any], path: Path) -> Path:
    """Plots the bytes per parameter of a training step, in a panel per dtype: parameters, state, gradients."""
    found = bars(results)
    dtypes = list(dict.fromkeys(bar["dtype"] for bar in found))
    heights = [sum(bar["dtype"] == dtype for bar in found) for dtype in dtypes]
    figure, panels = plt.subplots(
        len(dtypes), 1, figsize=(9, 1.6 + 0.3 * len(found)), height_ratios=heights, sharex=True, layout="constrained"
    )
    for axes, dtype in zip(panels, dtypes, strict=True):
        own = [bar for bar in found if bar["dtype"] == dtype][::-1]
        names = [bar["optimizer"] for bar in own]
        kept = [bar["parameters"] for bar in own]
        axes.barh(names, kept, WIDTH, color="#dddddd", label="parameters")
        state = [bar["state"] for bar in own]
        colours = [palette.OTHER if name == ANCHOR else palette.OURS for name in names]
        axes.barh(names, state, WIDTH, left=kept, color=colours, label="state")
        left = [a + b for a, b in zip(kept, state, strict=True)]
        for what, alpha, label in (
            ("gradients", 0.3, "gradients, all at once"),
            ("released", 1.0, "gradients, released"),
        ):
            sizes = [bar[what] or 0 for bar in own]
            axes.barh(names, sizes, WIDTH, left=left, color=palette.REFERENCE, alpha=alpha, label=label)
        axes.set_title(f"{dtype} parameters")
        axes.tick_params(axis="y", labelsize=8)
    panels[0].legend(fontsize=8, loc="lower right")
    panels[-1].set_xlabel("bytes per parameter at the peak of a training step, without activations")
    return _finish(figure, path)


def _compared(row: Row, measured: list[Row]) -> bool:
    """Returns whether a row belongs in the plot of ratios."""
    optimizer = row["kind"] == "step" and row["peer"] not in (COPY, IN_PLACE, ANCHOR)
    return optimizer and not row["workload"].startswith("scan") and rows.ratio(row, measured, ANCHOR) is not None


def _machine(measured: list[Row]) -> str:
    row = measured[0]
    threads = "" if row["cuda"] else f", {row['threads']} threads"
    return f"{row['device']}{threads}, {row['dtype']}"


def draw(measured: list[Row], folder: Path) -> list[Path]:
    """Draws all plots for which there are rows, per device and dtype; returns their files."""
    found = []
    good = [row for row in measured if row["status"] == "ok"]
    for device, dtype in dict.fromkeys((row["device"], row["dtype"]) for row in good):
        own = [row for row in good if (row["device"], row["dtype"]) == (device, dtype)]
        kinds = {
            sizes: any(row["workload"].startswith("scan") for row in own),
            ratios: any(_compared(row, own) for row in own),
            training: any(row["kind"] == "train" for row in own),
        }
        found += [
            draw_one(own, folder / f"{rows.plot_stem(own[0])}-{draw_one.__name__}.png")
            for draw_one, has in kinds.items()
            if has
        ]
    return found
