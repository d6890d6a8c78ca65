"""Rows -> figures: accuracy against cost, and what compression does to exits. The same rows give the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from textwrap import fill as wrapped
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from anytime.decided import example

LABEL = 40  # characters of a line of the legend
LINE, CHARACTER = 0.18, 0.07  # inches that one takes
_MARKERS = "osD^vP*Xd<>"
_LINES = ("-", "--", ":", "-.")
_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "anytime",
    "font.size": 9.0,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
}


def pictures(rows: pd.DataFrame) -> dict[str, Callable[[pd.DataFrame], Figure]]:
    """Suffix of the file name -> the figure; those of arms where an experiment has more than refitted and kept."""
    if (rows["status"] == "done").any() and not rows["accuracy"].notna().any():
        return {}  # of networks that nobody trained there are no accuracies to draw
    own: dict[str, Callable[[pd.DataFrame], Figure]] = {"": figure}
    return own if rows["arm"].isin(["", "refitted", "kept"]).all() else own | {"_shares": shares, "_arms": arms}


def draw(rows: pd.DataFrame, path: Path, picture: Callable[[pd.DataFrame], Figure] | None = None) -> None:
    """Write ``picture(rows)``, by default ``figure``, to ``path``, an SVG or by its suffix a PNG."""
    with matplotlib.rc_context(_STYLE):
        drawn = (picture or figure)(rows)
        drawn.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else {"Software": None})


def figure(rows: pd.DataFrame) -> Figure:
    """Draw rows of ``rows.rows``: a line of axes per data set.

    Left accuracy against MACs (bit operations, where all points have the same MACs), then against the mean latency on each
    board (a policy's median is that of one of its exits).
    Colour: backend; marker: network; line: what executed it, joining its exits; hollow: policies (refitted, no bounds); grey
    steps: the Pareto front of the estimates. Bars are the 95 % limits, cut where they leave the frame.
    """
    done = rows[(rows["status"] == "done") & rows["accuracy"].notna() & rows["arm"].isin(["", "refitted"]) & ~rows["bound"]]
    done = done.assign(latency=done["latency_ms_mean"].fillna(done["latency_ms_p50"]))
    done = done.assign(network=done["model"] + done["variant"].map(lambda said: f" ({said})" if said else ""))
    datasets = list(done["dataset"].unique())
    boards = list(done["board"][done["latency"].notna()].unique())
    columns = done["column"].unique()
    colours = dict(zip(columns, _colours(len(columns)), strict=True))
    markers = {name: _MARKERS[i % len(_MARKERS)] for i, name in enumerate(done["network"].unique())}
    lines = {name: _LINES[i % len(_LINES)] for i, name in enumerate(done["execution"].unique())}
    keys = [Line2D([], [], color=colour, marker="s", ls="", label=wrapped(name, LABEL)) for name, colour in colours.items()]
    keys += [Line2D([], [], color="black", marker=marker, ls="", label=wrapped(name, LABEL)) for name, marker in markers.items()]
    keys += [Line2D([], [], color="black", ls=line, label=wrapped(name or "exits", LABEL)) for name, line in lines.items()]
    keys += [Line2D([], [], color="black", marker="o", mfc="white", ls="", label="a policy")]
    keys += [Line2D([], [], color="grey", lw=3, alpha=0.4, label="Pareto front")]
    said = [str(one.get_label()).splitlines() for one in keys]
    height = max(3.6 * max(1, len(datasets)) + 0.3, LINE * sum(map(len, said)) + 0.3)
    beside = max(2.2, CHARACTER * max(len(line) for label in said for line in label) + 0.6)
    drawn = Figure(figsize=(4.6 * (1 + len(boards)) + beside, height), layout="constrained")
    grid = drawn.subplots(max(1, len(datasets)), 1 + len(boards), squeeze=False)
    for i, dataset in enumerate(datasets):
        own = done[done["dataset"] == dataset]
        # One point per network and exit or policy: boards repeat its accuracy.
        once = own.drop_duplicates(["network", "backend", "policy", "budget", "cell"])
        bits = once["macs"].nunique() == 1 < once["bops"].nunique()  # one network at its full depth, in several arithmetics
        cost, scale, said_of = ("bops", 1e-9, "bit operations a sample (G)") if bits else ("macs", 1e-6, "MACs a sample (M)")
        _scatter(grid[i, 0], once, cost, scale, (colours, markers, lines))
        grid[i, 0].set(title=dataset, xlabel=said_of, ylabel="accuracy (%)", xscale="log" if bits else "linear")
        for axes, board in zip(grid[i, 1:], boards, strict=True):
            _scatter(axes, own[own["board"] == board], "latency", 1.0, (colours, markers, lines))
            axes.set(title=f"{dataset}, {board}", xlabel="mean latency, batch 1 (ms)", ylabel="accuracy (%)")
    drawn.legend(handles=keys, loc="outside right upper")
    return drawn


def _colours(n: int) -> list[Any]:
    """As many that can be told apart: matplotlib has 10, and 20 in pairs; beyond that along a map."""
    if n <= 10:
        return [f"C{i}" for i in range(n)]
    if n <= 20:
        return list(matplotlib.colormaps["tab20"](np.arange(n)))
    return list(matplotlib.colormaps["turbo"](np.linspace(0, 1, n)))


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
    # A few poor exits shall not press all that one may want into a line.
    low = max(y.min(), y.max() - max(3.0, 4 * (y.max() - y.median())))
    margin = max(1.0, 0.3 * (y.max() - low))
    axes.set_ylim(low - margin, min(100.2, y.max() + margin))
    if below := int((y < low - margin).sum()):
        axes.text(0.99, 0.01, f"{below} points lie below", transform=axes.transAxes, ha="right", va="bottom", fontsize=7)


def _decided(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per decision, whichever boards executed it, of the policy that stands for all."""
    done = rows[(rows["status"] == "done") & rows["exit_shares"].ne("") & rows["spent"].notna() & ~rows["bound"]]
    done = done.drop_duplicates(["cell", "policy", "budget", "arm"])
    done = done.assign(network=done["dataset"] + ", " + done["model"] + done["variant"].map(lambda v: f" ({v})" if v else ""))
    judged = done[done["arm"] == "share-matched"]["policy"].drop_duplicates()
    return done[done["policy"].isin(example(list(judged)))]


def shares(rows: pd.DataFrame) -> Figure:
    """Draw what share of the test samples leaves at each exit: a bar per backend with FP32's thresholds kept.

    A line of axes per network, a column per budget, empty where it cannot be met; FP32 itself stands first. One policy: see
    ``_decided``.
    """
    done = _decided(rows)
    done = done[(done["arm"] == "kept") | (done["reference"] & (done["arm"] == "refitted"))]
    networks, budgets = list(done["network"].unique()), sorted(done["budget"].unique())
    drawn = Figure(figsize=(2.6 * max(1, len(budgets)) + 1.6, 2.4 * max(1, len(networks)) + 0.4), layout="constrained")
    grid = drawn.subplots(max(1, len(networks)), max(1, len(budgets)), squeeze=False, sharey=True)
    drawn.suptitle(f"{', '.join(done['policy'].unique())}, thresholds kept from FP32", fontsize=9)
    most = 0
    for i, network in enumerate(networks):
        for axes, budget in zip(grid[i], budgets, strict=True):
            own = done[(done["network"] == network) & (done["budget"] == budget)]
            axes.grid(False)
            axes.set_title(f"budget {budget:g}" + (", which it cannot meet" if own.empty else ""), fontsize=7)
            names = [f"{column}\n{execution}" for column, execution in zip(own["column"], own["execution"], strict=True)]
            taken = [[float(share) for share in text.split("/")] for text in own["exit_shares"]]
            for at, bar in enumerate(taken):
                for k, share in enumerate(bar):
                    axes.bar(at, 100 * share, bottom=100 * sum(bar[:k]), color=f"C{k % 10}", width=0.8)
                most = max(most, len(bar))
            axes.set_xticks(range(len(names)), names, rotation=90, fontsize=6)
        grid[i, 0].set_ylabel(f"{network}\nleave at exit (%)", fontsize=7)
    keys = [Line2D([], [], color=f"C{k % 10}", marker="s", ls="", label=f"exit {k + 1}") for k in range(most)]
    drawn.legend(handles=keys, loc="outside right upper")
    return drawn


def arms(rows: pd.DataFrame) -> Figure:
    """Draw accuracy against what was spent, with kept, share-matched and refitted thresholds: a line of axes per network.

    A column of axes per compressed backend; grey: FP32. The points of an arm are its budgets, which dotted lines show: what lies
    to the right of its own has spent too much. One policy: see ``_decided``.
    """
    done = _decided(rows)
    looks = {"kept": ("C3", "v", ":"), "share-matched": ("C1", "s", "--"), "refitted": ("C0", "o", "-")}
    fp32 = done[done["reference"] & (done["arm"] == "refitted")]
    others = done[~done["reference"] & done["arm"].isin(list(looks))]
    networks, backends = list(done["network"].unique()), list(others["backend"].unique())
    drawn = Figure(figsize=(3.0 * max(1, len(backends)) + 1.6, 2.6 * max(1, len(networks)) + 0.4), layout="constrained")
    grid = drawn.subplots(max(1, len(networks)), max(1, len(backends)), squeeze=False, sharex="row", sharey="row")
    drawn.suptitle(", ".join(done["policy"].unique()), fontsize=9)
    for i, network in enumerate(networks):
        for axes, backend in zip(grid[i], backends, strict=True):
            own = others[(others["network"] == network) & (others["backend"] == backend)]
            base = fp32[fp32["network"] == network].sort_values("spent")
            for budget in base["budget"]:
                axes.axvline(budget, color="grey", ls=":", lw=0.8, alpha=0.6)
            axes.plot(base["spent"], 100 * base["accuracy"], color="grey", marker=".", lw=1)
            for arm, (colour, marker, line) in looks.items():
                points = own[own["arm"] == arm].sort_values("spent")
                axes.plot(points["spent"], 100 * points["accuracy"], color=colour, marker=marker, ls=line, ms=4, lw=1)
            said = ", ".join(dict.fromkeys([*own["column"], *own["execution"]]))
            axes.set_title(said, fontsize=7)
            axes.set_xlabel("spent (share of the reference)")
            axes.locator_params(axis="x", nbins=4)
        low, high = grid[i, 0].get_ylim()
        middle, half = (low + high) / 2, max(high - low, 1.0) / 2  # a hundredth of a point is no slope
        grid[i, 0].set_ylim(middle - half, min(100.2, middle + half))
        grid[i, 0].set_ylabel(f"{network}\naccuracy (%)", fontsize=7)
    keys = [Line2D([], [], color=c, marker=m, ls=line, label=arm) for arm, (c, m, line) in looks.items()]
    drawn.legend(handles=[*keys, Line2D([], [], color="grey", marker=".", label="FP32")], loc="outside right upper")
    return drawn
