"""Writes bundles: one network of an experiment, ready for who wants to use it or for a board. See bundle.py for the reader."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from anytime import machine
from anytime.arms import Decider
from anytime.backends.onnxruntime import OnnxRuntime
from anytime.board import board_test
from anytime.bundle import KIND, SCHEMA, Engine, fingerprint, policy_of, read_manifest
from anytime.cells import find_cell, inner
from anytime.config import Cell, Experiment
from anytime.engine import EXACT_INT8, WEIGHT_BIAS
from anytime.errors import AnytimeError, CorruptFile, Unsupported, UsageError, WriteError, near
from anytime.facts import Fact, facts_of
from anytime.files import write_atomically
from anytime.find import experiment
from anytime.metrics import Predictions, accuracy
from anytime.onnx_if import single_file
from anytime.onnx_net import GraphNet
from anytime.policy import Policy
from anytime.spec import key, plain
from anytime.train import Progress, silent
from anytime.workshop import Workshop

SAME, SAMPLES = 0.95, 256  # share of so many test samples that a network must answer as it did when it was scored


class Chosen(NamedTuple):
    """What is exported: a cell of an experiment, and the policy, or None, with what the manifest says of it."""

    exp: Experiment
    cell: Cell
    net: GraphNet
    policy: Policy | None
    said: dict[str, Any] | None
    shop: Workshop


# Choosing


def choose(
    words: Sequence[str], sets: Sequence[str], results: Path, policy: str | None, budget: float | None,
    progress: Progress = silent, exp: Experiment | None = None,
) -> Chosen:  # fmt: skip
    """The cell that ``words`` name (see cells.find_cell), compressed for ONNX Runtime, with that policy fitted for that budget."""
    if policy is None and budget is not None:
        raise UsageError(f"--budget {budget:g} belongs to a policy: name one with --policy")
    exps, cell = find_cell(words, sets, exp)
    having = [e for e in exps if budget in (None, *e.budgets) and policy in (None, *(p.label for p in e.policies))] or exps
    if policy is not None and len(having) > 1:
        raise UsageError(
            f"{' and '.join(e.name for e in having)} have this network and {policy}, and their budgets may be "
            f"shares of different networks: say which, as in export {having[0].name} {words[0]}"
        )
    exp = having[0]
    fact = None if policy is None else _asked(exp, cell, policy, budget)
    shop = Workshop(results, progress)
    net = shop.net(cell)
    if not isinstance(net, GraphNet):
        cell = replace(cell, backend=OnnxRuntime(of=inner(cell).backend))
        if reason := cell.backend.why_not():
            raise UsageError(f"{cell.backend.label} cannot be exported here: {reason}")
        net = shop.net(cell)
    if not isinstance(net, GraphNet) or getattr(net, "precision", "f32") != "f32":
        raise Unsupported(f"{cell.backend.label} is arithmetic of its engine, and no ONNX graph holds it: export another one")
    _check_same(cell, net, shop)
    if fact is None:
        return Chosen(exp, cell, net, None, None, shop)
    # The decision may be asked of the same numbers under another engine; it is fitted for this one.
    fitted = Decider(exp, shop, lambda _: None).fitted(replace(fact, cell=cell))
    try:
        policy_of(plain(fitted))
    except CorruptFile as error:
        raise UsageError(
            f"a bundle finds its policy by name in anytime/policies, and {policy} is not there: put its file there first"
        ) from error
    return Chosen(exp, cell, net, fitted, _said(exp, fact, fitted, shop.predictions(cell)["test"]), shop)


def _check_same(cell: Cell, net: GraphNet, shop: Workshop) -> None:
    """AnytimeError where the network is another one now than what is known of it was found on."""
    said = shop.predictions(cell)["test"].logits[:, :SAMPLES]
    if not said.shape[1]:
        return
    now = net.predict(shop.data(cell.data, cell.seed).test.x[:SAMPLES].numpy())
    same = float((now.argmax(-1) == said.argmax(-1)).mean())
    if same < SAME:
        raise AnytimeError(
            f"{cell.model.label}, {cell.backend.label} answers otherwise than when it was scored: on {same:.0%} of {said.shape[1]} test "
            "samples it names the same class. Its code or its engine has changed under one name: run the experiment again with FORCE=1"
        )


def _asked(exp: Experiment, cell: Cell, label: str, budget: float | None) -> Fact:
    """The decision that is meant; UsageError with what there is."""
    if not cell.backend.exits_early(cell.model):
        raise UsageError(f"{cell.model.label} has one exit, a policy has nothing to decide: leave out --policy")
    facts = [f for f in facts_of(exp) if f.of == "decide" and f.arm == "refitted" and key(inner(f.cell)) == key(inner(cell))]
    asked = {f.budget: f for f in facts if f.policy is not None and f.policy.label == label}
    if not asked:
        raise UsageError(f"{exp.name} has no policy {label!r}; {near(label, {f.policy.label for f in facts if f.policy})}")
    if any(f.policy is not None and f.policy.bound for f in asked.values()):
        raise UsageError(f"{label} decides by what no board can know: it is a bound, not to be exported")
    there = ", ".join(f"{b:g}" for b in sorted(asked))
    if budget is None and len(asked) > 1:
        raise UsageError(f"{label} is fitted to a budget: add --budget, of {there}")
    if budget not in (None, *asked):
        raise UsageError(f"{exp.name} has no budget {budget:g} for {label}; it has {there}")
    if len(places := {f.board.name for f in facts if f.board is not None}) > 1:
        raise UsageError(
            f"{exp.name} fits {label} to ms on each of its boards ({', '.join(sorted(places))}), and a bundle holds one policy: "
            "export from an experiment of one board"
        )
    return next(f for b, f in asked.items() if budget in (None, b))


def _said(exp: Experiment, fact: Fact, fitted: Policy, test: Predictions) -> dict[str, Any]:
    exits = fitted.exits(test.logits)
    right = fitted.answer(test.logits, exits).argmax(-1) == test.labels
    return {
        "label": fitted.label, "budget": fact.budget, "currency": exp.currency, "spec": plain(fitted),
        **({} if fact.board is None else {"board": fact.board.name}),  # whose ms these are
        **board_test(fitted, test.logits[:, :256]),
        "test_accuracy": float(right.mean()), "test_share": (np.bincount(exits, minlength=test.n_exits) / len(exits)).tolist(),
    }  # fmt: skip


# Writing


def save(
    exp: Experiment | str, *words: str, to: Path | str, policy: str | None = None, budget: float | None = None,
    results: Path | str = "results",
) -> Path:  # fmt: skip
    """Write the network of ``exp`` that ``words`` of its row name, for ``anytime.load``; answer its manifest.

    As ``python -m anytime export``: what is not trained yet is. ``exp`` is an Experiment, or the name or path of one. Without a
    policy every exit is written, for the one that ``anytime.load`` may be given; the default there, the last exit, then runs the
    heads of the others too.
    """
    if not (policy is None or isinstance(policy, str)):
        raise UsageError(f"policy={policy!r}: give its name in tables, {getattr(policy, 'label', 'MaxProb')!r}")
    found = exp if isinstance(exp, Experiment) else experiment(exp)
    chosen = choose(words, (), Path(results).expanduser(), policy, budget, exp=found)
    return write_bundle(chosen, Path(to).expanduser())


def write_bundle(chosen: Chosen, to: Path) -> Path:
    """Write the folder ``to``, whole or not at all; answer its manifest.

    An older bundle there is replaced. UsageError where the folder holds anything else, WriteError where it cannot be written.
    """
    check_free(to)
    net = chosen.net
    exits = chosen.policy.uses(net.n_exits) if chosen.policy else range(net.n_exits)
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=to.parent, prefix=f".{to.name}-") as own:
            folder = Path(own) / "bundle"
            folder.mkdir()
            segments = _segments(net, list(exits), folder)
            (folder / "manifest.json").write_text(json.dumps(manifest(chosen, segments), indent=1))
            older = Path(own) / "older"
            try:
                if to.exists():
                    os.rename(to, older)
                os.rename(folder, to)
            except BaseException:  # Ctrl-C too
                if older.exists() and not to.exists():
                    os.rename(older, to)
                raise
    except OSError as error:
        raise WriteError(f"cannot write {to}: {error.strerror or error}; free space or give another folder") from error
    return to / "manifest.json"


def write_single(chosen: Chosen, to: Path) -> Path:
    """Write one ONNX file with the whole policy, or its last exit, inside; see onnx_if.py. An older one there is replaced.

    Unsupported for a network of another engine than ONNX Runtime, which runs the file.
    """
    import onnx

    check_free(to, single=True)
    net, said = chosen.net, chosen.said
    if _engine(net) != "onnxruntime":
        raise Unsupported(
            f"a single file runs in ONNX Runtime, and {chosen.cell.backend.label} was fitted and scored under {net.execution}: "
            "export the folder, or the same network under OnnxRuntime(of=...)"
        )
    plan = net.plan(said["uses"] if said else [net.n_exits - 1])
    segments = [onnx.ModelProto.FromString(net.graph(segment)) for segment in plan]
    told = manifest(chosen, [])
    metadata = {k: json.dumps(told[k]) for k in ("network", "data", "arithmetic", "input", "classes", "policy", "provenance")}
    model = single_file(segments, [s.head for s in plan if s.head is not None], said, metadata)
    write_atomically(to, model.SerializeToString())
    return to


def how_to_use(chosen: Chosen, to: Path, single: bool) -> str:
    """A few lines of Python that run what was written."""
    parts = chosen.shop.data(chosen.cell.data, chosen.cell.seed)
    c, h, w = parts.input_shape
    if not single:
        shape = f"[{h}, {w}]" if c == 1 else f"[{h}, {w}, {c}]"
        engine = _engine(chosen.net)
        under = "" if engine == "onnxruntime" else f"  # runs in {engine}, as it was scored: pip install {engine}"
        answer = f"print(net(image))  # uint8 {shape}, as PIL and numpy give it"
        return f"import anytime\nnet = anytime.load({str(to)!r}){under}\n{answer}"
    mean, std = (v[0] if c == 1 else f"{list(v)}" for v in parts.preprocessing)
    exact = (
        f"options = onnxruntime.SessionOptions()\noptions.add_session_config_entry{EXACT_INT8}"
        "  # exact INT8 on a CPU without VNNI; slower on some that have it\n"
        if chosen.net.bits
        else ""
    )
    given = (", options" if exact else "") + ("" if chosen.net.float_biases else f", disabled_optimizers={[WEIGHT_BIAS]}")
    return (
        f"import onnxruntime\n{exact}session = onnxruntime.InferenceSession({str(to)!r}{given})\n"
        f'label, confidence, exit, logits = session.run(None, {{"x": x}})  '
        f"# x: float32 [1, {c}, {h}, {w}], (pixel / 255 - {mean}) / {std}{'' if c == 1 else ', per channel'}"
    )


def _engine(net: GraphNet) -> Engine:
    """What a bundle runs in: who names a row wants its accuracy, and another engine rounds, or saturates, otherwise."""
    return "openvino" if net.format == "openvino" else "onnxruntime"


def check_free(to: Path, single: bool = False) -> None:
    """UsageError where a bundle, or a ``single`` file, cannot be called so or would replace what is none of ours."""
    if to == Path():
        raise UsageError("no place to write to: give one with --to (TO=), a folder or, with --single-file, NAME.onnx")
    if single:
        if to.suffix != ".onnx":
            raise UsageError(f"--to {to}: a single file is called NAME.onnx")
        if to.exists() and not (to.is_file() and b"anytime" in to.read_bytes()[:64]):  # the producer stands at the beginning
            raise UsageError(f"{to} is there and is no file of ours: give another name")
        return
    if not to.exists() and not to.is_symlink():
        return
    if not to.is_dir() or to.is_symlink():
        raise UsageError(f"{to} is there and is no folder: give another name")
    there = {p.name for p in to.iterdir()}
    try:
        ours = {"manifest.json", *(s["file"] for s in read_manifest(to)["segments"])} if there else set()
    except AnytimeError as error:
        raise UsageError(f"{to} is there and holds other things than a bundle of ours: give another folder") from error
    if foreign := sorted(there - ours):
        raise UsageError(f"{to} holds other things than a bundle of ours ({', '.join(foreign[:3])}): give another folder")


def _segments(net: GraphNet, exits: Sequence[int], folder: Path) -> list[dict[str, Any]]:
    import onnx

    said: list[dict[str, Any]] = []
    entering: list[dict[str, Any]] = []
    for segment in net.plan(exits):
        body = net.graph(segment)
        name = f"segment_{segment.head + 1}.onnx"  # type: ignore[operator]
        (folder / name).write_bytes(body)
        model = onnx.ModelProto.FromString(body)
        inputs, outputs = described(model, entering)
        entering = outputs[1:]
        said.append(
            {
                "file": name, "sha256": hashlib.sha256(body).hexdigest(), "bytes": len(body), **segment._asdict(),
                "inputs": inputs, "outputs": outputs, "opset": model.opset_import[0].version, "ir": model.ir_version,
            }
        )  # fmt: skip
    return said


def described(model: Any, entering: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Inputs and outputs of a graph: names, shapes, dtypes, and the grids of integers; ``entering`` are the state's tensors."""
    import onnx

    graph = model.graph
    constants = {c.name: onnx.numpy_helper.to_array(c) for c in graph.initializer}
    made = {out: node for node in graph.node for out in node.output}
    read = {node.input[0]: node for node in graph.node if node.op_type == "DequantizeLinear"}
    known = {i.name: s for i, s in zip(graph.input, entering, strict=False)}

    def grid(name: str) -> dict[str, Any]:
        """Scale and zero point of integers: those of the Q that makes them or the DQ that reads them, past what only moves."""
        node = made.get(name)
        if node is not None and node.op_type != "QuantizeLinear":
            return grid(node.input[0])
        node = node or read.get(name)
        if node is None:
            return {k: known[name][k] for k in ("scale", "zero_point")}
        zero = constants[node.input[2]].item() if len(node.input) > 2 else 0
        return {"scale": constants[node.input[1]].item(), "zero_point": zero}

    def tensor(info: Any) -> dict[str, Any]:
        kind = info.type.tensor_type
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))
        shape = [d.dim_param or d.dim_value for d in kind.shape.dim]
        integers = np.issubdtype(dtype, np.integer)
        return {"name": info.name, "dtype": dtype.name, "shape": shape, **(grid(info.name) if integers else {})}

    return [tensor(i) for i in graph.input], [tensor(o) for o in graph.output]


def manifest(chosen: Chosen, segments: list[dict[str, Any]]) -> dict[str, Any]:
    """Everything that a user or a board must know of the bundle."""
    cell, net, shop = chosen.cell, chosen.net, chosen.shop
    parts, test, cost = shop.data(cell.data, cell.seed), shop.predictions(cell)["test"], shop.cost(cell)
    every = {what: cost.every(what) for what in ("macs", "bops", "params")}
    exits = [
        {
            "exit": k, "test_accuracy": accuracy(test, np.full(len(test.labels), k)), "n_test": len(test.labels),
            **{what: float(values[k]) for what, values in every.items()},
            "stage_macs": float(cost.stage.macs[k]), "head_macs": float(cost.head.macs[k]),
        }
        for k in range(net.n_exits)
    ]  # fmt: skip
    said = {
        "kind": KIND, "schema": SCHEMA,
        "engine": _engine(net),
        "network": cell.model.label, "data": cell.data.label, "arithmetic": cell.backend.column, "label": cell.backend.label,
        "input": {
            "shape": list(parts.input_shape), "dtype": "float32", "layout": "NCHW", "image": "HWC",
            "image_range": {"uint8": [0, 255], "float": [0.0, 1.0]}, "formula": "(pixel in [0, 1] - mean) / std, per channel",
            "mean": list(parts.preprocessing.mean), "std": list(parts.preprocessing.std),
        },
        "classes": list(parts.classes), "n_exits": net.n_exits, "restarts": net.restarts,
        # Whether two products of its weights and an activation can be more than 16 bits hold.
        "overflows": net.overflows,
        # ONNX Runtime's pass WeightBiasQuantization must stay off where this is False.
        "float_biases": net.float_biases,
        "segments": segments, "policy": chosen.said, "exits": exits,
        "provenance": {
            "experiment": chosen.exp.name, "cell": key(cell), "spec": plain(cell), "trained_on": sorted(net.twin.trained_on),
            "net": net.facts, "bits": {name: list(bits) for name, bits in net.bits.items()},
            "git": machine.commit(), "versions": machine.versions(), "exported": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    }  # fmt: skip
    return said | {"sha256": fingerprint(said)}
