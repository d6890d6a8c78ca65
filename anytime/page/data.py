"""What the page shows and a table of rows does not: operating points, exits taken image by image, layers, facts."""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from anytime.decided import example
from anytime.gather import Asked, Network, Row
from anytime.metrics import Ints
from anytime.paired import unpacked
from anytime.record import Record
from anytime.rows import absent
from anytime.tables import budget_said

SHOWN = 12  # images that leave first, and as many that leave last
_INLINE = 200  # characters: longer facts are written once
_UNREADABLE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)


class Group(NamedTuple):
    """The forms of one network: everything that was compressed from the same model under the same recipe, the reference first."""

    dataset: str
    network: str
    forms: list[Network]

    @property
    def reference(self) -> Network | None:
        """What its decisions are held against."""
        return self.forms[0] if self.forms[0].facts.get("reference") else None


def groups(networks: Sequence[Network]) -> list[Group]:
    """In the order of the experiment."""
    found: dict[tuple[str, str], list[Network]] = defaultdict(list)
    for network in networks:
        found[network.family, network.model].append(network)
    ordered = [sorted(forms, key=lambda n: not n.facts.get("reference")) for forms in found.values()]
    return [Group(forms[0].label("dataset"), named(forms[0]), forms) for forms in ordered]


def named(network: Network) -> str:
    """Its model, and what tells it from others of that name."""
    return network.label("model") + (f" ({network.variant})" if network.variant else "")


def form(network: Network) -> str:
    """What was made of it, and what executed it."""
    return ", ".join(filter(None, (network.label("column"), network.label("execution"))))


# Operating points ------------------------------------------------------------------------------------------------


def charts(rows: pd.DataFrame, networks: Sequence[Network]) -> Row:
    """Series of recorded points: the exits of a network, or one policy and arm on it.

    A point is [at, MACs, accuracy, lower limit, upper limit, label, {board: mean ms}, note]. ``at`` is where the slider finds it:
    the MACs asked for, or those spent where nothing was asked in MACs, as a share of the last exit of the data set's first network
    in the reference backend.
    """
    done = rows[(rows["status"] == "done") & rows["accuracy"].notna() & rows["macs"].notna() & ~rows["bound"]]
    whole = done[done["reference"] & done["exit"].notna()].groupby("dataset", sort=False)
    first = {d: own[own["model"] == own["model"].iloc[0]]["macs"].max() for d, own in whole}
    by_cell = {cell: network for network in networks for cell in network.cells.values()}
    series: dict[tuple[str, ...], Row] = {}
    for row in done.to_dict("records"):
        network = by_cell[row["cell"].split(",")[0]]
        is_exit, total = not absent(row["exit"]), first.get(row["dataset"], done["macs"].max())
        who = (row["dataset"], named(network), row["column"], row["execution"], row["backend"], "" if is_exit else row["policy"])
        if (key := (*who, row["arm"])) not in series:
            names = ("dataset", "network", "column", "execution", "backend", "policy", "arm")
            series[key] = dict(zip(names, key, strict=True)) | {"points": {}}
            if row["arm"] == "refitted" and len(network.cells) == 1:
                series[key]["points"] = _curve(network, row, total)
        ms = row["latency_ms_p50"] if absent(row["latency_ms_mean"]) else row["latency_ms_mean"]
        asked = row["policy"] if is_exit else f"budget {budget_said(row['currency'], row['budget'], row['board'])}"
        at = row["macs"] / total
        if row["currency"] == "macs" and row["spent"] > 0:
            at *= row["budget"] / row["spent"]
        said = [
            at,
            row["macs"],
            row["accuracy"],
            row["accuracy_lo"],
            row["accuracy_hi"],
            asked,
            {},
            "" if is_exit else row["exit_shares"],
        ]
        point = series[key]["points"].setdefault(asked, said)
        if not absent(ms):
            point[6][row["board"]] = _short(ms)
    for one in series.values():
        points = sorted(one["points"].values(), key=lambda p: (p[0], p[1]))
        one["points"] = [[_short(p) if isinstance(p, float) else p for p in point] for point in points]
    firsts = {d: f"{own['model'].iloc[0]}, {own['column'].iloc[0]}, last exit" for d, own in whole}
    boards = list(done["board"][done["latency_ms_p50"].notna()].unique())
    return {"series": list(series.values()), "first": firsts, "boards": boards}


def _curve(network: Network, row: Mapping[Any, Any], total: float) -> dict[Any, list[Any]]:
    """The operating points that the policy's record holds beside those asked for."""
    fitted_on = row["board"] if row["currency"] == "ms" else ""
    wanted = (row["policy"], "refitted", row["currency"], fitted_on)
    asked = [a for a in network.scores if (a.policy, a.arm, a.currency, a.fitted_on) == wanted]
    point = next((p for a in asked for p in network.scores[a].values() if p.get("curve")), None)
    if point is None:
        return {}
    curve, n = point["curve"], point["n"]
    points = zip(curve["macs"], curve["n_right"], strict=True)
    return {i: [m / total, m, r / n, None, None, "a point of its curve", {}, ""] for i, (m, r) in enumerate(points)}


def _short(number: float) -> float | None:
    return None if absent(number) else float(f"{number:.5g}")


# Exits taken, image by image -------------------------------------------------------------------------------------


def digest_of(labels: Ints) -> str:
    """12 hex digits of labels [N]."""
    return hashlib.sha256(labels.astype("<u2").tobytes()).hexdigest()[:12]


class Decided(NamedTuple):
    """One policy at one budget on the forms of a network: (form, arm, exits taken [N], right or not [N])."""

    asked: Asked
    taken: list[tuple[Network, str, Ints, Ints]]
    labels: Ints
    sure: Ints  # [N]: confidence of the reference at its first exit, in 255ths

    @property
    def order(self) -> Ints:
        """Images from the first that leaves to the last: by the mean exit over all forms, then by how sure the first exit is."""
        own = [exits for _, arm, exits, _ in self.taken if arm == "refitted"]
        return np.lexsort((-self.sure.astype(int), np.mean(own, axis=0)))

    @property
    def digest(self) -> str:
        """Names these test samples, in this order, by their labels."""
        return digest_of(self.labels)

    @property
    def shown(self) -> tuple[Ints, Ints]:
        """Indices of the images that leave first, and of those that leave last, the very last one first."""
        n = min(SHOWN, len(self.labels) // 2)
        return self.order[:n], self.order[::-1][:n]


def decided(group: Group) -> Decided | None:
    """The policy that stands for all, at the middle one of its budgets; None where no record tells the exits taken."""
    reference = group.reference
    if reference is None or not reference.files:
        return None
    seed = min(reference.files)
    asked = [a for a in reference.scores if a.arm == "refitted" and "taken" in reference.scores[a].get(seed, {})]
    policy = example((a.policy, reference.scores[a][seed].get("policy_position") or 0) for a in asked)
    budgets = sorted((a for a in asked if a.policy in policy), key=lambda a: a.budget)
    if not budgets:
        return None
    middle = budgets[(len(budgets) - 1) // 2]
    try:
        with np.load(reference.files[seed]) as file:
            labels, sure = np.asarray(file["labels"]), np.asarray(file["confidence"][0])
    except _UNREADABLE:
        return None
    found: list[tuple[Network, str, Ints, Ints]] = []
    for network in group.forms:
        for arm in ("refitted", "kept"):
            point = network.scores.get(middle._replace(arm=arm), {}).get(seed, {})
            if "taken" not in point or (arm == "kept" and network is reference):
                continue
            try:
                exits = unpacked(point["taken"])
                if "right" in point:
                    right = np.unpackbits(unpacked(point["right"]), count=len(labels))
                else:
                    with np.load(network.files[seed]) as file:
                        right = file["argmax"][exits, np.arange(len(labels))] == labels
            except _UNREADABLE + (IndexError,):
                continue
            if len(exits) == len(labels):
                found.append((network, arm, exits, right))
    return Decided(middle, found, labels, sure) if found and found[0][0] is reference else None


class Flips(NamedTuple):
    """Test samples by the exit that the reference takes (down) and the exit taken here (across)."""

    network: Network
    arm: str
    counts: Ints  # [E, E]


def flips(found: Decided) -> Iterator[Flips]:
    """A matrix for every form but the reference, and every arm."""
    reference, _, before, _ = found.taken[0]
    for network, arm, exits, _ in found.taken:
        if network is not reference:
            n = 1 + max(int(before.max()), int(exits.max()), *(a.exit or 0 for n in (reference, network) for a in n.scores))
            yield Flips(network, arm, np.bincount(before.astype(int) * n + exits, minlength=n * n).reshape(n, n))


def shares(
    group: Group,
) -> tuple[str, list[tuple[str, float, str]], dict[tuple[str, str], dict[tuple[str, float, str], list[float]]]]:
    """Of the policy that stands for all: its name, its budgets, and by (form, arm) and budget the share of samples per exit."""
    told = ((a.policy, p) for n in group.forms for a, said in n.scores.items() if a.exit is None for p in said.values())
    policies = example((policy, p.get("policy_position") or 0) for policy, p in told)
    lines: dict[tuple[str, str], dict[tuple[str, float, str], list[float]]] = defaultdict(dict)
    for network in group.forms:
        for asked, points in network.scores.items():
            if asked.policy in policies and asked.arm in ("refitted", "kept"):
                taken = [p["share"] for p in points.values() if p.get("share")]
                if taken and not (asked.arm == "kept" and network is group.reference):
                    budget = (asked.currency, asked.budget, asked.fitted_on)
                    lines[form(network), asked.arm][budget] = np.mean(taken, axis=0).tolist()
    budgets = sorted({budget for line in lines.values() for budget in line})
    return " ".join(policies), budgets, lines


# Layers and facts ------------------------------------------------------------------------------------------------


def layers(group: Group) -> tuple[list[str], list[list[str]]]:
    """A line per layer: its MACs and parameters, then for every form the bits that it multiplies in, and its SQNR."""
    forms = [n for n in group.forms if n.layers and not n.facts.get("own_exits")]
    told: dict[tuple[int, bool, str], dict[int, Row]] = defaultdict(dict)
    for i, network in enumerate(forms):
        for layer in network.layers:
            told[layer["exit"], bool(layer.get("head")), layer["layer"]][i] = layer
    # One that every form leaves in 32 bits says nothing in its column.
    apart = [i for i, n in enumerate(forms) if any((la["weight_bits"], la["activation_bits"]) != (32, 32) for la in n.layers)]
    body = []
    for (k, head, name), said in sorted(told.items()):
        any_form = next(iter(said.values()))
        line = [
            f"exit {k + 1}",
            "head" if head else "stage",
            name,
            f"{any_form['macs'] / 1e6:.3f}",
            f"{any_form['params'] / 1e3:.2f}",
        ]
        body.append([*line, *(_layer(said.get(i)) for i in apart)])
    return ["up to", "part", "layer", "MACs (M)", "params (k)", *(form(forms[i]) for i in apart)], body


def _layer(layer: Row | None) -> str:
    if layer is None:
        return "–"
    db = layer.get("sqnr_db")
    return f"W{layer['weight_bits']}A{layer['activation_bits']}" + ("" if absent(db) else f" · {db:.1f} dB")


def constructor(value: Any) -> str:
    """A recorded spec in the syntax of an experiment file; its version, which is no argument, stands behind the name."""
    if isinstance(value, dict):
        version = f" v{value['version']}" if value.get("version", 1) != 1 else ""
        inside = ", ".join(f"{name}={constructor(v)}" for name, v in value.items() if name not in ("is", "version"))
        return f"{value['is']}{version}({inside})" if "is" in value else f"dict({inside})"
    if isinstance(value, list):
        return f"({', '.join(map(constructor, value))}{',' if len(value) == 1 else ''})"
    return repr(value)


class Facts:
    """Facts of records, each long one written once: many records share a device and its versions."""

    def __init__(self, networks: Sequence[Network]) -> None:
        self.sheets: dict[str, tuple[int, str, Row]] = {}
        said: dict[str, set[str]] = defaultdict(set)
        for r in (r for network in networks for r in network.used):
            for name, value in self._told(r):
                said[name].add(json.dumps(value, sort_keys=True))
        self.shared = {name: json.loads(*texts) for name, texts in sorted(said.items()) if len(texts) == 1 and len(networks) > 1}

    def of(self, network: Network) -> Iterator[tuple[str, dict[str, list[str | int]]]]:
        """Those that not all records share: name, and by who says so ("" where all agree) the values, text or number of a sheet."""
        said: dict[str, dict[str, dict[str, None]]] = defaultdict(lambda: defaultdict(dict))
        for r in network.used:
            for name, value in self._told(r):
                if name not in self.shared and value not in (None, "", {}):
                    said[name][" on ".join(filter(None, (r.kind, r.board)))][json.dumps(value, sort_keys=True)] = None
        for name, values in sorted(said.items()):
            alike: dict[tuple[str, ...], list[str]] = defaultdict(list)
            for who, texts in sorted(values.items()):
                alike[tuple(texts)].append(who)
            agree = len(alike) == 1 and len(next(iter(alike))) == 1
            yield name, {"" if agree else ", ".join(who): [self._said(name, t) for t in texts] for texts, who in alike.items()}

    @staticmethod
    def _told(r: Record) -> list[tuple[str, Any]]:
        return [(name, value) for name, value in r.facts.items() if name != "defaults"]  # for the fold: the spec has them all

    def _said(self, name: str, text: str) -> str | int:
        value = json.loads(text)
        if isinstance(value, dict) and len(text) > _INLINE:
            return self.sheets.setdefault(f"{name} {text}", (len(self.sheets), name, value))[0]
        return flat(value)


def flat(value: Any) -> str:
    """A fact in one line."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {flat(v)}" for name, v in value.items())
    if isinstance(value, list):
        return ", ".join(map(flat, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
