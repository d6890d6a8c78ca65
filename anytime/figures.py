"""Rows -> figures: accuracy against MACs and against measured latency. The same rows give the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

_MARKERS = "osD^vP*Xd<>"
_LINES = ("-", "--", ":", "-.")
_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "anytime",
    "font.size": 9.0,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
}


def draw(rows: pd.DataFrame, path: Path) -> None:
    """Draw rows of ``report.rows`` to ``path``, an SVG or by its suffix a PNG: a line of axes per data set.

    Left accuracy against MACs, then against the median latency on each board. Colour: backend; marker: network; line: what
    executed it, joining its exits; hollow: policies (refitted); grey steps: the Pareto front of the estimates. Bars are the
    95 % limits.
    """
    done = rows[(rows["status"] == "done") & rows["accuracy"].notna() & (rows["arm"] != "kept")]
    done = done.assign(network=done["model"] + done["variant"].map(lambda said: f" ({said})" if said else ""))
    datasets = list(done["dataset"].unique())
    boards = list(done["board"][done["latency_ms_p50"].notna()].unique())
    colours = {name: f"C{i % 10}" for i, name in enumerate(done["column"].unique())}
    markers = {name: _MARKERS[i % len(_MARKERS)] for i, name in enumerate(done["network"].unique())}
    lines = {name: _LINES[i % len(_LINES)] for i, name in enumerate(done["execution"].unique())}
    with matplotlib.rc_context(_STYLE):
        height = 3.6 * max(1, len(datasets)) + 0.3
        figure = Figure(figsize=(4.6 * (1 + len(boards)) + 2.2, height), layout="constrained")
        grid = figure.subplots(max(1, len(datasets)), 1 + len(boards), squeeze=False)
        for i, dataset in enumerate(datasets):
            own = done[done["dataset"] == dataset]
            # One point per network and exit or policy: boards repeat its accuracy.
            once = own.drop_duplicates(["network", "backend", "policy", "budget", "cell"])
            _scatter(grid[i, 0], once, "macs", 1e-6, colours, markers, lines)
            grid[i, 0].set(title=dataset, xlabel="MACs a sample (M)", ylabel="accuracy (%)")
            for axes, board in zip(grid[i, 1:], boards, strict=True):
                _scatter(axes, own[own["board"] == board], "latency_ms_p50", 1.0, colours, markers, lines)
                axes.set(title=f"{dataset}, {board}", xlabel="median latency, batch 1 (ms)", ylabel="accuracy (%)")
        keys = [Line2D([], [], color=colour, marker="s", ls="", label=name) for name, colour in colours.items()]
        keys += [Line2D([], [], color="black", marker=marker, ls="", label=name) for name, marker in markers.items()]
        keys += [Line2D([], [], color="black", ls=line, label=name or "exits") for name, line in lines.items()]
        keys += [Line2D([], [], color="black", marker="o", mfc="white", ls="", label="a policy")]
        keys += [Line2D([], [], color="grey", lw=3, alpha=0.4, label="Pareto front")]
        figure.legend(handles=keys, loc="outside right upper")
        kind = path.suffix.lstrip(".")
        figure.savefig(path, dpi=150, metadata={"Date": None} if kind == "svg" else {"Software": None})


def _scatter(
    axes: Axes,
    rows: pd.DataFrame,
    cost: str,
    scale: float,
    colours: dict[str, str],
    markers: dict[str, str],
    lines: dict[str, str],
) -> None:
    rows = rows[rows[cost].notna()].sort_values([cost, "accuracy", "cell", "policy"], ascending=[True, False, True, True])
    x, y = rows[cost] * scale, 100 * rows["accuracy"]
    best = y.cummax()
    front = y > best.shift(fill_value=float("-inf"))
    if len(rows):
        ends = x[front].tolist() + [x.max()]
        axes.step(ends, [*y[front], y.max()], where="post", color="grey", lw=3, alpha=0.4, zorder=1)
    for (network, column, execution, _), alike in rows.groupby(["network", "column", "execution", "backend"], sort=False):
        colour, marker, is_exit = colours[str(column)], markers[str(network)], alike["exit"].notna()
        for part, line, fill in ((alike[is_exit], lines[str(execution)], colour), (alike[~is_exit], "", "white")):
            at, top = part[cost] * scale, 100 * part["accuracy"]
            bars = (top - 100 * part["accuracy_lo"]).clip(lower=0), (100 * part["accuracy_hi"] - top).clip(lower=0)
            axes.errorbar(at, top, bars, color=colour, marker=marker, mfc=fill, ms=5, ls=line, lw=1, elinewidth=0.6, zorder=2)
