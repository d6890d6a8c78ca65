"""Records gathered by network: what is known of a cell, its training seeds together."""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from anytime import record
from anytime.metrics import METRICS
from anytime.record import Record

Row = dict[str, Any]
NAN = math.nan
_NEEDED = {  # what the fold cannot do without; every other key may be absent
    "eval": {"exit", "n", "accuracy"},
    "measure": {"exit"},
    "decide": {"policy_label", "n", "accuracy"},
    "replay": {"policy_label"},
}


def listed(text: str) -> tuple[str, ...]:
    """The words of ``text``."""
    return tuple(text.split())


_IS: dict[str, dict[str, tuple[type, ...]]] = {  # what a name holds, where it is there at all
    "facts": {
        **dict.fromkeys(listed("device versions git net defaults"), (dict,)),
        **dict.fromkeys(listed("model dataset backend column execution session question unjudged policy_label arm"), (str,)),
        **dict.fromkeys(listed("position size_bytes suite budget"), (int, float)),
        "input_shape": (list,),
    },
    "spec": {"model": (dict,), "seed": (int,), "train_seed": (int,)},
    "points": {
        **dict.fromkeys(METRICS, (int, float)),
        **dict.fromkeys(
            listed(
                "n_right budget policy_position own_macs n_timed peak_activation_bytes spent_val own_latency_ms_p50 same_answers"
            ),
            (int, float),
        ),
        **dict.fromkeys(listed("policy_label arm currency taken right budgets_of"), (str,)),
        **{"exit": (int,), "n": (int,), "share": (list,), "limits": (dict,), "curve": (dict,), "reference": (dict,)},
    },
    "layers": {**dict.fromkeys(listed("macs weight_bits activation_bits sqnr_db"), (int, float)), "layer": (str,)},
}


# What of a board must be alike for times to be comparable, and what else for them to be one sample: engines.
MACHINE = listed("cpu flags threads batch power_mode clocks")
_TIMED_ON = (*MACHINE, *listed("provider l4t tensorrt torch onnxruntime openvino tensorflow"))
LEFT_OUT = " left out: "  # of what could be read, and is not used
LEFT = "Records left out, and why"


_ALWAYS_SAID = ("add_bits",)  # W4A4 means two things: what additions read may keep more bits


class Asked(NamedTuple):
    """What a point answers: an exit, or a policy; ``fitted_on`` is the board whose milliseconds a budget counts, else empty."""

    exit: int | None
    policy: str
    budget: float
    currency: str
    arm: str
    fitted_on: str


@dataclass
class Network:
    """What is known of one cell, its training seeds folded. ``spec``: what is not by default; ``full_spec``: all of it.

    ``place``, ``family`` and ``model`` are asked for a million times in a large table: made once, when all is gathered.
    """

    spec: Row
    full_spec: Row = field(default_factory=dict)
    facts: Row = field(default_factory=dict)
    variant: str = ""
    cells: dict[int, str] = field(default_factory=dict)
    files: dict[int, Path] = field(default_factory=dict)  # train seed -> its predictions
    layers: list[Row] = field(default_factory=list)  # of one training seed: bits and MACs are those of all
    # what is asked -> train seed -> point; what is asked -> board -> points
    scores: dict[Asked, dict[int, Row]] = field(default_factory=lambda: defaultdict(dict))
    times: dict[Asked, dict[str, list[Row]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(list)))
    missed: list[Record] = field(default_factory=list)
    used: list[Record] = field(default_factory=list)

    @cached_property
    def place(self) -> str:
        """What networks must share to be compared: data, seed of the split, and the suite where several have these data."""
        return key_of([self.spec.get("data"), self.spec.get("seed"), self.facts.get("suite", 0)])

    @cached_property
    def family(self) -> str:
        """What forms of one network must share to be paired: the recipe too."""
        return key_of([self.place, self.spec.get("recipe")])

    @cached_property
    def model(self) -> str:
        """The spec of the model, as a key."""
        return key_of(self.spec.get("model"))

    def label(self, name: str) -> str:
        """The fact ``name``, else the class that the spec names."""
        spec = self.spec.get({"dataset": "data", "column": "backend"}.get(name, name))
        return str(self.facts.get(name) or (spec.get("is", "") if isinstance(spec, dict) else ""))

    def common(self, seeds: Iterable[int]) -> Row:
        """What every row of this network says."""
        seeds = sorted(seeds)
        return {
            **{name: self.label(name) for name in ("model", "dataset", "backend", "execution", "column")},
            **{name: bool(self.facts.get(name)) for name in ("simulated", "reference")},
            "seed": self.spec.get("seed"),
            "variant": self.variant,
            "train_seeds": ",".join(map(str, seeds)),
            "cell": ",".join(self.cells[seed] for seed in seeds),
        }


def gather(records: Sequence[tuple[Record, Path]], troubles: list[str]) -> list[Network]:
    """Networks in the order of their experiment; a sentence for every record that could not be used is added to ``troubles``."""
    newest, made = record.newest(records), record.made(records)
    networks: dict[str, Network] = {}
    left_out: Counter[str] = Counter()
    # Where a budget, a policy or a board came to mean something else, its fact has another name and its times stand in the same row.
    by_time = sorted((r for r, _ in newest.values() if not odd(r) and _is_time(r)), key=lambda r: r.created)
    timed_last = {_row_of(r): r.fact for r in by_time}
    defaults: dict[str, Row] = defaultdict(dict)
    for r, _ in records:
        if not odd(r):
            for name, said in r.facts.get("defaults", {}).items():
                defaults[name] |= said
    order = listed("skip fail measure replay decide eval")  # what a skip says of its cell gives way to what its eval says
    for r, path in sorted(records, key=lambda item: order.index(item[0].kind)):
        points, needed = r.exits + r.points, _NEEDED.get(r.kind, set())
        if needed and not (points and all(needed <= point.keys() for point in points)):
            troubles.append(
                f"the {r.kind} record {path} lacks {' or '.join(sorted(needed))}: remove it; what it held is run again"
            )
            continue
        if wrong := odd(r):
            troubles.append(
                f"the {r.kind} record {path} is not as it was written ({wrong}): remove it; what it held is run again"
            )
            continue
        timed = r.kind in ("measure", "replay")
        if timed and not _is_time(r):
            troubles.append(f"the {r.kind} record {path} is{LEFT_OUT}it is of an emulated board, whose times mean nothing")
            continue
        if record.is_stale(r, made):
            left_out["older than their network, which was made anew"] += 1
            continue
        last = newest[r.fact][0]
        if timed and (last.kind != r.kind or timed_last.get(_row_of(r), r.fact) != r.fact or _timed_on(last) != _timed_on(r)):
            left_out["times of another machine, setting or engine version than the newest of the same"] += 1
            continue
        if newest[r.fact][1] != path and not timed:  # times of one machine are pooled
            if r.kind == newest[r.fact][0].kind and _scores(r) != _scores(newest[r.fact][0]):
                why = f"it says other numbers of its fact than {newest[r.fact][1]}, which is newer and used"
                troubles.append(f"the {r.kind} record {path} is{LEFT_OUT}{why}")
            continue
        full = {name: value for name, value in r.spec.items() if name != "train_seed"}
        spec = said_of(full, defaults)
        network, seed = networks.setdefault(key_of(spec), Network(spec, full)), train_seed_of(r)
        position = min(r.facts.get("position", math.inf), network.facts.get("position", math.inf))
        network.facts |= {name: value for name, value in r.facts.items() if value not in (None, "")} | {"position": position}
        network.cells[seed] = r.cell
        network.used.append(r)
        for point in points:
            if timed:
                device = r.facts.get("device") or {}
                about = {"noisy": noisy(r), "session": str(r.facts.get("session") or "")}
                about |= {"machine": {name: str(device[name]) for name in MACHINE if device.get(name)}}
                network.times[asked_of(r, point)][r.board].append(point | about)
            else:
                network.scores[asked_of(r, point)][seed] = point
        if r.kind == "eval":
            network.files[seed] = path.with_suffix(".npz")
            network.layers = r.layers
        if r.kind in ("skip", "fail"):
            network.missed.append(r)
    troubles += [f"{n} records are{LEFT_OUT}{why}" for why, n in left_out.items()]
    current = latest(list(networks.values()))
    name_datasets(current)
    name_variants(current)
    name_columns(current)
    return sorted(current, key=lambda n: (n.facts["position"], n.variant, key_of(n.spec)))


def _is_time(r: Record) -> bool:
    """Whether it holds times that mean something."""
    return r.kind in ("measure", "replay") and (r.facts.get("device") or {}).get("emulated") != "yes"


def _row_of(r: Record) -> str:
    """Where its times stand in a table, whatever its fact is called."""
    said = r.points[0] if r.points else {}
    return key_of([r.cell, r.kind, r.board, *map(said.get, listed("policy_label budget currency arm"))])


def _timed_on(r: Record) -> list[Any]:
    device = r.facts.get("device") or {}
    return [device.get(name) for name in _TIMED_ON]


def latest(networks: Sequence[Network]) -> list[Network]:
    """Without those of which a newer version of a class says something: what its fields meant then, nothing can make any more."""
    named = [(*_unversioned(network.spec), network) for network in networks]
    newest: dict[str, list[int]] = {}
    for name, versions, _ in named:
        newest[name] = max(newest.get(name, []), versions)
    return [network for name, versions, network in named if versions == newest[name]]


def _unversioned(spec: Row) -> tuple[str, list[int]]:
    """A spec as a key without its versions, and these in the order of the key."""
    text = key_of(spec)
    return re.sub(r'"version": \d+', "", text), [int(v) for v in re.findall(r'"version": (\d+)', text)]


def said_of(spec: Any, defaults: Mapping[str, Row]) -> Any:
    """What a spec says that is not by default: a record of before a field came equals one of after it.

    ``defaults``: of each "class version" by field, as eval records hold them; a class that no record tells of stays as it is.
    """
    if isinstance(spec, list):
        return [said_of(value, defaults) for value in spec]
    if not isinstance(spec, dict):
        return spec
    own = defaults.get(f"{spec.get('is')} {spec.get('version')}", {})
    said = {name: said_of(value, defaults) for name, value in spec.items()}
    return {n: v for n, v in said.items() if n not in own or not _same(v, said_of(own[n], defaults))}


def _same(a: Any, b: Any) -> bool:
    """Equal as JSON says them: 1 is neither 1.0 nor true. Most are words, or differ at once."""
    return bool(a == b) and (isinstance(a, str) or key_of(a) == key_of(b))


def filled(spec: Any, defaults: Mapping[str, Row]) -> Any:
    """The other way round: a spec with what it leaves to a default, also of fields that came after its record."""
    if isinstance(spec, list):
        return [filled(value, defaults) for value in spec]
    if not isinstance(spec, dict):
        return spec
    own = defaults.get(f"{spec.get('is')} {spec.get('version')}", {})
    return {name: filled(value, defaults) for name, value in (own | spec).items()}


def odd(r: Record) -> str:
    """What in ``r`` cannot be, for it was edited by hand or is of a version that meant something else; empty where nothing is."""
    points, layers = r.exits + r.points, r.layers if r.kind == "eval" else []
    for where, said in (("facts", [r.facts]), ("spec", [r.spec]), ("points", points), ("layers", layers)):
        for name, kinds in _IS[where].items():
            for value in (row[name] for row in said if name in row):
                fits = isinstance(value, kinds) and not isinstance(value, bool)
                if not fits and not (
                    value is None and float in kinds and where in ("points", "layers")
                ):  # a number that was not taken
                    return f"{name} is {value!r}"
    for point in points:
        exit, n, accuracy = point.get("exit", 0), point.get("n", 1), point.get("accuracy", 0)
        if exit is None or exit < 0 or n is None or n < 1:
            return f"exit is {exit!r}, n is {n!r}"
        if accuracy is None or not 0 <= accuracy <= 1:
            return f"accuracy is {accuracy!r}"
        if point.get("n_right") is not None and not math.isclose(accuracy, point["n_right"] / n, abs_tol=0.5 / n):
            return f"accuracy is {accuracy!r}, but n_right {point['n_right']!r} of n {n!r}"
        if not all(isinstance(share, int | float) for share in point.get("share") or ()):
            return f"share is {point['share']!r}"
    for layer in layers:
        if lacking := [name for name in ("layer", "macs", "weight_bits", "activation_bits") if layer.get(name) is None]:
            return f"a layer lacks its {lacking[0]}"
    return ""


def _scores(r: Record) -> list[list[Any]]:
    return [[point.get(name) for name in ("exit", "accuracy", "macs")] for point in r.exits + r.points]


def asked_of(r: Record, said: Row) -> Asked:
    """What a row of a record answers."""
    if "exit" in said:
        return Asked(int(said["exit"]), f"exit {said['exit'] + 1}", NAN, "", "", "")
    policy, currency, arm = (str(said.get(name) or "") for name in ("policy_label", "currency", "arm"))
    budget = said.get("budget")
    return Asked(None, policy, NAN if budget is None else float(budget), currency, arm, r.board if currency == "ms" else "")


def order(item: tuple[Asked, Any]) -> tuple[Any, ...]:
    """Sorts what is asked: exits from the first on, then policies by name, budget and arm."""
    return (item[0].exit is None, item[0].exit or 0, *item[0][1:])


def name_datasets(networks: Sequence[Network]) -> None:
    """Add to the labels of different data the fields in which they differ, where labels are equal (two folders of one name)."""
    said = _differences([_leaves(n.spec.get("data")) for n in networks], [n.label("dataset") for n in networks])
    for network, fields in zip(networks, said, strict=True):
        network.facts = network.facts | {"dataset": _with(network.label("dataset"), fields)}


def name_variants(networks: Sequence[Network]) -> None:
    """Give networks of equal labels the fields in which their specs differ as ``variant``."""
    # Runs under other settings (--set) share the folder; without a name for the difference their rows would look alike.
    alike = [key_of([network.label(name) for name in ("dataset", "model", "backend")]) for network in networks]
    for network, fields in zip(networks, _differences([_leaves(n.spec) for n in networks], alike), strict=True):
        network.variant = _with("", dict(sorted(fields.items())))


def name_columns(networks: Sequence[Network]) -> None:
    """Add to the columns of a network's rows the fields of their backends that tell equal ones apart, so that none stands for another.

    A field that two of "INT4 PTQ (QDrop)" differ in is said of every "INT4 PTQ". First the fields of what an engine executes,
    whichever engine it is; then the engine's own, among the rows of one engine.
    """
    for apart, whole, always in ((listed("dataset model"), False, _ALWAYS_SAID), (listed("dataset model execution"), True, ())):
        families: dict[str, list[Network]] = defaultdict(list)
        for network in networks:
            stem = network.label("column").partition(" (")[0]
            families[key_of([stem, *map(network.label, apart)])].append(network)
        for family in families.values():
            backends = [n.spec.get("backend") if whole else _innermost(n.spec.get("backend")) for n in family]
            leaves = [{k: v for k, v in _leaves(b).items() if k.rpartition(".")[2] not in ("is", "version")} for b in backends]
            for network, fields in zip(family, _differences(leaves, [n.label("column") for n in family], always), strict=True):
                fields = {path: value for path, value in fields.items() if (path, value) != ("add_bits", "0")}
                network.facts = network.facts | {"column": _with(network.label("column"), fields)}


def _differences(leaves: Sequence[dict[str, str]], alike: Sequence[str], always: Collection[str] = ()) -> list[dict[str, str]]:
    """Of every leaf in which two that are ``alike`` differ, and of ``always``, what each says of it, if anything."""
    frame = pd.DataFrame(leaves).fillna("")
    n_different = frame.groupby(list(alike)).nunique()
    differ = [str(path) for path in frame if path in always or (n_different[path] > 1).any()]
    return [{str(path): value for path, value in said.items() if value} for said in frame[differ].to_dict("records")]


def _with(name: str, fields: Mapping[str, str]) -> str:
    return ", ".join([*([name] if name else []), *(f"{path}={value}" for path, value in fields.items())])


def _innermost(spec: Any) -> Any:
    """What wrappers of a backend come down to."""
    while isinstance(spec, dict) and isinstance(spec.get("of"), dict):
        spec = spec["of"]
    return spec


def _leaves(value: Any, path: str = "") -> dict[str, str]:
    """ "recipe.loss.is" -> "Rising", and so on."""
    if not isinstance(value, dict):
        return {path: str(value)}
    return {leaf: said for name, v in value.items() for leaf, said in _leaves(v, f"{path}.{name}" if path else name).items()}


def absent(value: Any) -> bool:
    """Whether a row says nothing here: None, NaN or pandas' NA."""
    return value is None or value is pd.NA or value != value


def known(values: Iterable[Any]) -> list[float]:
    """Those that are there, as floats."""
    return [float(value) for value in values if not absent(value)]


def key_of(value: Any) -> str:
    """Equal for equal plain values."""
    return json.dumps(value, sort_keys=True)


def train_seed_of(r: Record) -> int:
    """The training seed of its cell."""
    return int(r.spec.get("train_seed", 0))


def noisy(r: Record) -> bool:
    """Whether other work kept the machine busy while it was measured."""
    return (r.facts.get("device") or {}).get("noisy") in (True, "yes")
