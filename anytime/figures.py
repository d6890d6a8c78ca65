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
    """Write ``figure(rows)`` to ``path``, an SVG or by its suffix a PNG."""
    with matplotlib.rc_context(_STYLE):
        figure(rows).savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else {"Software": None})


def figure(rows: pd.DataFrame) -> Figure:
    """Draw rows of ``rows.rows``: a line of axes per data set.

    Left accuracy against MACs, then against the mean latency on each board (a policy's median is that of one of its exits).
    Colour: backend; marker: network; line: what executed it, joining its exits; hollow: policies (refitted); grey steps: the
    Pareto front of the estimates. Bars are the 95 % limits, cut where they leave the frame.
    """
    done = rows[(rows["status"] == "done") & rows["accuracy"].notna() & (rows["arm"] != "kept")]
    done = done.assign(latency=done["latency_ms_mean"].fillna(done["latency_ms_p50"]))
    done = done.assign(network=done["model"] + done["variant"].map(lambda said: f" ({said})" if said else ""))
    datasets = list(done["dataset"].unique())
    boards = list(done["board"][done["latency"].notna()].unique())
    colours = {name: f"C{i % 10}" for i, name in enumerate(done["column"].unique())}
    markers = {name: _MARKERS[i % len(_MARKERS)] for i, name in enumerate(done["network"].unique())}
    lines = {name: _LINES[i % len(_LINES)] for i, name in enumerate(done["execution"].unique())}
    height = 3.6 * max(1, len(datasets)) + 0.3
    drawn = Figure(figsize=(4.6 * (1 + len(boards)) + 2.2, height), layout="constrained")
    grid = drawn.subplots(max(1, len(datasets)), 1 + len(boards), squeeze=False)
    for i, dataset in enumerate(datasets):
        own = done[done["dataset"] == dataset]
        # One point per network and exit or policy: boards repeat its accuracy.
        once = own.drop_duplicates(["network", "backend", "policy", "budget", "cell"])
        _scatter(grid[i, 0], once, "macs", 1e-6, (colours, markers, lines))
        grid[i, 0].set(title=dataset, xlabel="MACs a sample (M)", ylabel="accuracy (%)")
        for axes, board in zip(grid[i, 1:], boards, strict=True):
            _scatter(axes, own[own["board"] == board], "latency", 1.0, (colours, markers, lines))
            axes.set(title=f"{dataset}, {board}", xlabel="mean latency, batch 1 (ms)", ylabel="accuracy (%)")
    keys = [Line2D([], [], color=colour, marker="s", ls="", label=name) for name, colour in colours.items()]
    keys += [Line2D([], [], color="black", marker=marker, ls="", label=name) for name, marker in markers.items()]
    keys += [Line2D([], [], color="black", ls=line, label=name or "exits") for name, line in lines.items()]
    keys += [Line2D([], [], color="black", marker="o", mfc="white", ls="", label="a policy")]
    keys += [Line2D([], [], color="grey", lw=3, alpha=0.4, label="Pareto front")]
    drawn.legend(handles=keys, loc="outside right upper")
    return drawn


def _scatter(axes: Axes, rows: pd.DataFrame, cost: str, scale: float, looks: tuple[dict[str, str], ...]) -> None:
    rows = rows[rows[cost].notna()].sort_values([cost, "accuracy", "cell", "policy"], ascending=[True, False, True, True])
    if rows.empty:
        return
    colours, markers, lines = looks
    x, y = rows[cost] * scale, 100 * rows["accuracy"]
    front = y > y.cummax().shift(fill_value=-1.0)
    axes.step([*x[front], x.max()], [*y[front], y.max()], where="post", color="grey", lw=3, alpha=0.4, zorder=1)
    for (network, column, execution, _), alike in rows.groupby(["network", "column", "execution", "backend"], sort=False):
        colour, marker, is_exit = colours[str(column)], markers[str(network)], alike["exit"].notna()
        for part, line, fill in ((alike[is_exit], lines[str(execution)], colour), (alike[~is_exit], "", "white")):
            top, lo, hi = (100 * part[name] for name in ("accuracy", "accuracy_lo", "accuracy_hi"))
            at, bars = part[cost] * scale, ((top - lo).clip(lower=0), (hi - top).clip(lower=0))
            axes.errorbar(at, top, bars, color=colour, ecolor=(colour, 0.3), marker=marker, mfc=fill, ms=5, ls=line, lw=1)
    margin = max(1.0, 0.3 * (y.max() - y.min()))
    axes.set_ylim(y.min() - margin, min(100.2, y.max() + margin))
