"""Rows -> figures: accuracy against cost, and what compression does to exits. The same rows give the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from textwrap import fill as wrapped
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from anytime.decided import example

LABEL = 40  # characters of a line of the legend
LINE, CHARACTER = 0.18, 0.07  # inches that one takes
_MARKERS = "osD^vP*Xd<>"
_LINES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 3)))
COLOURS = (*(f"C{i}" for i in (0, 1, 2, 3, 4, 5, 6, 8, 9)), "black", "gold")  # that can be told apart; C7 is grey
OTHERS = "darkgrey"
# Hollow and large what is seldom hidden by the others, small and filled what lies where it was asked for.
ARM_LOOKS: dict[str, dict[str, Any]] = {
    "kept": {"color": "C3", "marker": "v", "ms": 7, "mfc": "none", "ls": ":", "lw": 1},
    "temperature": {"color": "C4", "marker": "D", "ms": 5, "mfc": "none", "ls": "-.", "lw": 1},
    "share-matched": {"color": "C1", "marker": "s", "ms": 5, "ls": "--", "lw": 1},
    "refitted": {"color": "C0", "marker": "o", "ms": 3.5, "ls": "-", "lw": 1},
    "retrained": {"color": "C2", "marker": "^", "ms": 5, "ls": "--", "lw": 1},
}
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

    Left accuracy against MACs, then against the mean latency on each board (a policy's median is that of one of its exits). Where
    only bit operations tell rows apart these take the place of MACs: see ``_lines_of_axes``.
    Colour: backend, grey what ``_colours`` leaves; marker: network; line: what executed it, joining its exits; hollow: policies
    (refitted, no bounds); grey steps: the Pareto front of the estimates. Bars are the 95 % limits, cut at the frame.
    """
    done = rows[(rows["status"] == "done") & rows["accuracy"].notna() & rows["arm"].isin(["", "refitted"]) & ~rows["bound"]]
    done = done.assign(latency=done["latency_ms_mean"].fillna(done["latency_ms_p50"]))
    done = done.assign(network=done["model"] + done["variant"].map(lambda said: f" ({said})" if said else ""))
    lines_of_axes = list(_lines_of_axes(done))
    panels = [panel for line in lines_of_axes for panel in line]
    colours = _colours(done, [drawn for drawn, _ in panels])
    markers = {name: _MARKERS[i % len(_MARKERS)] for i, name in enumerate(done["network"].unique())}
    lines = {name: _LINES[i % len(_LINES)] for i, name in enumerate(done["execution"].unique())}
    told = {name: colour for name, colour in colours.items() if colour != OTHERS}
    told |= {f"{len(colours) - len(told)} others": OTHERS} if len(told) < len(colours) else {}
    keys = [Line2D([], [], color=colour, marker="s", ls="", label=wrapped(name, LABEL)) for name, colour in told.items()]
    keys += [Line2D([], [], color="black", marker=marker, ls="", label=wrapped(name, LABEL)) for name, marker in markers.items()]
    keys += [Line2D([], [], color="black", ls=line, label=wrapped(name or "exits", LABEL)) for name, line in lines.items()]
    keys += [Line2D([], [], color="black", marker="o", mfc="white", ls="", label="a policy")]
    keys += [Line2D([], [], color="grey", lw=3, alpha=0.4, label="Pareto front")]
    said = [str(one.get_label()).splitlines() for one in keys]
    n_lines, across = max(1, len(lines_of_axes)), max(map(len, lines_of_axes), default=1)
    height = max(3.6 * n_lines + 0.3, LINE * sum(map(len, said)) + 0.3)
    beside = max(2.2, CHARACTER * max(len(line) for label in said for line in label) + 0.6)
    drawn = Figure(figsize=(4.6 * across + beside, height), layout="constrained")
    grid = drawn.subplots(n_lines, across, squeeze=False)
    for axes, (panel, looks) in zip(grid.flat, panels, strict=bool(panels)):
        _scatter(axes, panel, (colours, markers, lines), close="xscale" in looks)
        axes.set(ylabel="accuracy (%)", **looks)
    drawn.legend(handles=keys, loc="outside right upper")
    return drawn


def _lines_of_axes(done: pd.DataFrame) -> Iterator[list[tuple[pd.DataFrame, dict[str, str]]]]:
    """Of each line the points of its axes, and what is written about them.

    Against bit operations where all points have the same MACs; also, with a line per model, where nothing was timed and every exit
    has the same MACs in more than two arithmetics: these are what differs, and no time tells what they save.
    """
    boards = list(done["board"][done["latency"].notna()].unique())
    for dataset in done["dataset"].unique():
        of_data = done[done["dataset"] == dataset]
        exits = of_data.groupby(["network", "exit"])[["macs", "bops"]].nunique().max()
        apart = of_data["latency"].isna().all() and exits["macs"] == 1 and exits["bops"] > 2
        models = list(of_data["model"].unique()) if apart else [""]
        for model in models:
            own = of_data[of_data["model"] == model] if apart else of_data
            title = f"{dataset}, {model}" if len(models) > 1 else dataset
            # One point per network and exit or policy: boards repeat its accuracy.
            once = own.drop_duplicates(["network", "backend", "policy", "budget", "cell"])
            if apart or once["macs"].nunique() == 1 < once["bops"].nunique():
                looks = {"title": title, "xlabel": "bit operations a sample (G)", "xscale": "log"}
                line = [(_points(once, "bops", 1e-9), looks)]
            else:
                line = [(_points(once, "macs", 1e-6), {"title": title, "xlabel": "MACs a sample (M)"})]
            for board in boards:
                looks = {"title": f"{title}, {board}", "xlabel": "mean latency, batch 1 (ms)"}
                line.append((_points(own[own["board"] == board], "latency", 1.0), looks))
            yield line


def _points(rows: pd.DataFrame, cost: str, scale: float) -> pd.DataFrame:
    """Rows in the order of their cost, with x, y, and whether they are on the Pareto front of the estimates."""
    rows = rows[rows[cost].notna()].sort_values([cost, "accuracy", "cell", "policy"], ascending=[True, False, True, True])
    rows = rows.assign(x=rows[cost] * scale, y=100 * rows["accuracy"])
    return rows.assign(best=rows["y"] > rows["y"].cummax().shift(fill_value=-1.0))


def _colours(done: pd.DataFrame, panels: Sequence[pd.DataFrame]) -> dict[str, str]:
    """One for each column; of more than can be told apart, for the reference's and for those most often on a front."""
    columns = list(done["column"].unique())
    if len(columns) > len(COLOURS):
        times = pd.concat([panel["column"][panel["best"]] for panel in panels]).value_counts()
        first = done["column"][done["reference"]].unique()
        chosen = sorted({*first, *times.index}, key=lambda name: (name not in first, -times.get(name, 0), columns.index(name)))
        columns = [name for name in columns if name in chosen[: len(COLOURS)]]
    return dict.fromkeys(done["column"].unique(), OTHERS) | dict(zip(columns, COLOURS, strict=False))


def _scatter(axes: Axes, rows: pd.DataFrame, looks: tuple[dict[str, Any], ...], close: bool) -> None:
    if rows.empty:
        return
    colours, markers, lines = looks
    x, y, front = rows["x"], rows["y"], rows["best"]
    axes.step([*x[front], x.max()], [*y[front], y.max()], where="post", color="grey", lw=3, alpha=0.4, zorder=1)
    for (network, column, execution, _), alike in rows.groupby(["network", "column", "execution", "backend"], sort=False):
        colour, marker, is_exit = colours[str(column)], markers[str(network)], alike["exit"].notna()
        for part, line, fill in ((alike[is_exit], lines[str(execution)], colour), (alike[~is_exit], "", "white")):
            top, lo, hi = (100 * part[name] for name in ("accuracy", "accuracy_lo", "accuracy_hi"))
            bars = (top - lo).clip(lower=0), (hi - top).clip(lower=0)
            said = {"ecolor": (colour, 0.3), "marker": marker, "mfc": fill, "ms": 5, "ls": line, "lw": 1}
            said |= {"zorder": 1.5} if colour == OTHERS else {}  # behind the others
            axes.errorbar(part["x"], top, bars, color=colour, **said)
    # A few poor exits shall not press all that one may want into a line; of one network's arithmetics that is tenths of a point.
    low = max(y.min(), y.max() - max(3.0, (3 if close else 4) * (y.max() - y.median())))
    margin = max(1.0, (0.1 if close else 0.3) * (y.max() - low))
    axes.set_ylim(low - margin, min(100.2, y.max() + margin))
    if below := int((y < low - margin).sum()):
        axes.text(0.99, 0.01, f"{below} points lie below", transform=axes.transAxes, ha="right", va="bottom", fontsize=7)


def _decided(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per decision, whichever boards executed it, of the policy that stands for all."""
    done = rows[(rows["status"] == "done") & rows["exit_shares"].ne("") & rows["spent"].notna() & ~rows["bound"]]
    done = done.drop_duplicates(["cell", "policy", "budget", "arm"])
    done = done.assign(network=done["dataset"] + ", " + done["model"] + done["variant"].map(lambda v: f" ({v})" if v else ""))
    return done[done["policy"].isin(example(zip(done["policy"], done["gain"].notna(), strict=True)))]


def shares(rows: pd.DataFrame) -> Figure:
    """Draw what share of the test samples leaves at each exit: a bar per backend with FP32's thresholds kept, and per floor.

    A line of axes per network, a column per budget, empty where it cannot be met; FP32 itself stands first. One policy: see
    ``_decided``.
    """
    done = _decided(rows)
    done = done[(done["arm"] == "kept") | (done["reference"] & done["arm"].isin(["refitted", "retrained"]))]
    how = done["column"] + ", " + done["execution"]
    done = done.assign(who=how.where(done["arm"] != "retrained", done["column"] + ", kept from another training"))
    networks, budgets = list(done["network"].unique()), sorted(done["budget"].unique())
    forms = {network: list(done["who"][done["network"] == network].unique())[::-1] for network in networks}
    heights = [len(names) + 1.8 for names in forms.values()] or [4.0]
    drawn = Figure(figsize=(2.3 * max(1, len(budgets)) + 3.2, 0.2 * sum(heights) + 0.6), layout="constrained")
    size = max(1, len(networks)), max(1, len(budgets))
    grid = drawn.subplots(*size, squeeze=False, sharex=True, sharey="row", height_ratios=heights)
    policy = ", ".join(done["policy"].unique())
    drawn.suptitle(f"{policy}, thresholds kept from FP32: test samples that leave at each exit (%)")
    most = max((text.count("/") + 1 for text in done["exit_shares"]), default=0)
    shades = [matplotlib.colormaps["viridis"](k / max(1, most - 1)) for k in range(most)]
    for i, network in enumerate(networks):
        for axes, budget in zip(grid[i], budgets, strict=True):
            own = done[(done["network"] == network) & (done["budget"] == budget)]
            axes.grid(False)
            axes.set_title(f"budget {budget:g}" + (", which it cannot meet" if own.empty else ""), fontsize=8)
            for who, text in zip(own["who"], own["exit_shares"], strict=True):
                left = 0.0
                for shade, share in zip(shades, text.split("/"), strict=False):
                    axes.barh(forms[network].index(who), 100 * float(share), left=left, color=shade, edgecolor="white", lw=0.5)
                    left += 100 * float(share)
            axes.set_yticks(range(len(forms[network])), forms[network], fontsize=8)
            axes.set_xlim(0, 100)
        grid[i, 0].set_ylabel(network.replace(", ", "\n"), fontsize=8)
    keys = [Line2D([], [], color=shade, marker="s", ls="", label=f"exit {k + 1}") for k, shade in enumerate(shades)]
    drawn.legend(handles=keys, loc="outside right upper")
    return drawn


def arms(rows: pd.DataFrame) -> Figure:
    """Draw accuracy against what was spent, a mark for each arm: a line of axes per network.

    A column of axes per compressed backend, and per floor; grey: FP32. The points of an arm are its budgets, which dotted lines
    show: what lies to the right of its own has spent too much. One policy: see ``_decided``.
    """
    done = _decided(rows)
    looks = {name: look for name, look in ARM_LOOKS.items() if name in set(done["arm"])}
    plain = done["reference"] & (done["arm"] == "refitted")
    fp32, others = done[plain], done[~plain & done["arm"].isin(list(looks))]
    networks, backends = list(done["network"].unique()), list(others["backend"].unique())
    drawn = Figure(figsize=(3.0 * max(1, len(backends)) + 0.4, 2.6 * max(1, len(networks)) + 0.8), layout="constrained")
    grid = drawn.subplots(max(1, len(networks)), max(1, len(backends)), squeeze=False, sharex="row", sharey="row")
    for i, network in enumerate(networks):
        for axes, backend in zip(grid[i], backends, strict=True):
            own = others[(others["network"] == network) & (others["backend"] == backend)]
            base = fp32[fp32["network"] == network].sort_values("spent")
            for budget in base["budget"]:
                axes.axvline(budget, color="grey", ls=":", lw=0.8, alpha=0.6)
            axes.plot(base["spent"], 100 * base["accuracy"], color="grey", marker=".", lw=1)
            for arm, look in looks.items():
                points = own[own["arm"] == arm].sort_values("spent")
                axes.plot(points["spent"], 100 * points["accuracy"], **look)
            said = ", ".join(dict.fromkeys([*own["column"], *own["execution"]]))
            axes.set_title(said, fontsize=8)
            axes.set_xlabel("spent (share of the reference)", fontsize=8)
            axes.locator_params(axis="x", nbins=5)
        low, high = (100 * done["accuracy"][done["network"] == network].agg(end) for end in ("min", "max"))
        middle, half = (low + high) / 2, max(1.1 * (high - low), 1.0) / 2  # a hundredth of a point is no slope
        grid[i, 0].set_ylim(middle - half, min(100.2, middle + half))
        grid[i, 0].set_ylabel(f"{network}\naccuracy (%)", fontsize=8)
    keys = [Line2D([], [], color="grey", marker=".", label="FP32")]
    keys += [Line2D([], [], label=arm, **look) for arm, look in looks.items()]
    title = f"{', '.join(done['policy'].unique())}, thresholds"
    drawn.legend(handles=keys, loc="outside upper center", ncols=len(keys), title=title)
    return drawn
