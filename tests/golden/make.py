"""Write the hand-made records of the golden table, and the tables that the report makes of them.

    python -m tests.golden.make            # both; read the diff of the tables before you commit it

Every number below is made up so that it can be checked by hand: 40 test samples of 4 classes, and for each exit the samples
that it gets wrong. The experiment has what a real one has: two networks, two training seeds of some cells, a network executed
by two engines, a simulated one, one that cannot be timed, one measured twice, policies refitted and kept, replays, a skip, a
failure, a file that is torn.
"""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import sys
import zlib
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from anytime import report
from anytime.record import Record

HERE = Path(__file__).parent
EXP = "golden"
N = 40
LABELS = np.arange(N) % 4

Wrong = list[set[int]]  # for each exit the samples that it gets wrong


def first(n: int, *more: int) -> set[int]:
    """The first ``n`` samples and ``more``."""
    return set(range(n)) | set(more)


class Maker:
    """Writes records under ``root`` with times and names that are always the same."""

    def __init__(self, root: Path) -> None:
        self.folder = root / EXP
        self.folder.mkdir(parents=True)
        self.ticks = count()

    def put(self, r: Record, attachment: bytes = b"") -> None:
        """Write one record and what lies beside it."""
        i = next(self.ticks)
        created = f"20260101T0000{i // 60:02d}.{i:06d}Z"
        stem = str(self.folder / f"{i:03d}-{r.kind}-{r.fact}")
        Path(f"{stem}.json").write_text(json.dumps(asdict(r) | {"created": created}, indent=1, sort_keys=True) + "\n")
        if attachment:
            Path(f"{stem}.npz").write_bytes(attachment)


class Cell:
    """One cell of the experiment and the records that it leaves."""

    def __init__(
        self, to: Maker, position: int, model: str, backend: str, column: str, execution: str, train_seed: int = 0
    ) -> None:
        self.to, self.name = to, re.sub(r"[^a-z0-9]+", "-", f"{model}-{backend}-{train_seed}".lower())
        self.spec = {
            "is": "Cell",
            "version": 1,
            "data": {"is": "Toy", "version": 1},
            "model": {"is": model.replace("-", ""), "version": 1},
            "recipe": {"is": "Recipe", "version": 1, "epochs": 4},
            "backend": {"is": backend, "version": 1},
            "train_seed": train_seed,
            "seed": 0,
        }
        self.facts = {
            "model": model,
            "dataset": "Toy",
            "backend": backend,
            "column": column,
            "execution": execution,
            "simulated": execution == "fake-quant",
            "position": position,
            "reference": backend == "FP32",
            "versions": {"numpy": "2.4.6", "torch": "2.13.0"},
            "git": {"commit": "0123456789abcdef", "dirty": False},
            "wall_s": {"fit": 1.5},
            "question": "Does a quantized early-exit network keep its accuracy, and is it faster?",
        }

    def record(self, kind: str, fact: str, facts: dict[str, Any] | None = None, **more: Any) -> None:
        """A record of this cell without exits."""
        kept = {name: more.pop(name) for name in ("attachment",) if name in more}
        said = Record(EXP, self.name, kind, f"{self.name}-{fact}", self.spec, facts=self.facts | (facts or {}), **more)  # type: ignore[arg-type]
        self.to.put(said, **kept)

    def eval(
        self,
        wrong: Wrong,
        bits: int = 32,
        size: int = 300_000,
        share: float | None = None,
        agreement: float = 1.0,
        layers: tuple[dict[str, Any], ...] = (),
    ) -> Cell:
        """What it predicts: 100 kMACs and 10 k parameters a link."""
        self.wrong, right = wrong, [N - len(w) for w in wrong]
        argmax = np.array([[(y + (n in w)) % 4 for n, y in enumerate(LABELS)] for w in wrong], np.uint8)
        file = io.BytesIO()
        np.savez(file, argmax=argmax, confidence=np.full(argmax.shape, 200, np.uint8), labels=LABELS.astype(np.uint8))
        exits = [
            {
                "exit": k,
                "n": N,
                "n_right": right[k],
                "accuracy": right[k] / N,
                "nll": 0.5 - 0.1 * k,
                "ece": 0.05,
                "macs": 100_000 * (k + 1),
                "bops": 100_000 * (k + 1) * bits * bits,
                "params": 10_000 * (k + 1),
                "packed_bytes": 10_000 * (k + 1) * bits // 8,
                "peak_activation_bytes": 4_000,
                "own_macs": 90_000 * (k + 1),
                "agreement": agreement - 0.025 * k * (agreement < 1),
                "int8_macs_share": share,
            }
            for k in range(len(wrong))
        ]
        self.record(
            "eval",
            "eval",
            {"size_bytes": size, "net": {"exclusions": ""}},
            exits=exits,
            of="eval",
            layers=list(layers),
            attachment=file.getvalue(),
        )
        return self

    def measure(self, *p50: float, noisy: bool = False) -> Cell:
        """How long its exits take on the host."""
        device = {"cpu": "Toy CPU", "threads": "1", "noisy": "yes" if noisy else "no", "pressure": f"{p50[0]:g} %"}
        exits = [
            {"exit": k, "n": 256, "latency_ms_p50": ms, "latency_ms_p90": 1.5 * ms, "latency_ms_p99": None, "cpu_ms": ms}
            for k, ms in enumerate(p50)
        ]
        self.record("measure", "measure-host", {"device": device}, board="host", exits=exits)
        return self

    def decide(self, early: int, arm: str = "refitted", budget: float = 0.75, flips: float | None = None) -> Cell:
        """An entropy policy that lets the last ``early`` samples leave at exit 1, the others at exit 2."""
        exits = np.array([1] * (N - early) + [0] * early, np.uint8)
        n_right = N - sum(n in self.wrong[exits[n]] for n in range(N))
        self.point = {"policy_label": "Entropy", "arm": arm, "budget": budget, "currency": "macs"}
        spent = (100_000 * early + 200_000 * (N - early)) / N
        scored = {"accuracy": n_right / N, "n": N, "n_right": n_right, "spent": spent / 200_000, "spent_val": spent / 200_000}
        cost = {
            "macs": spent,
            "bops": 64 * spent,
            "int8_macs_share": None,
            "share": [early / N, 1 - early / N],
            "exit_flips": flips,
        }
        taken = base64.b64encode(zlib.compress(exits.tobytes())).decode()
        point = {"policy": {"is": "Entropy", "version": 1}, **self.point, **scored, **cost, "taken": taken}
        self.record("decide", f"entropy-{budget:g}-{arm}", points=[point])
        return self

    def replay(self, p50: float) -> Cell:
        """The decision before it, executed."""
        times = {"latency_ms_p50": p50, "latency_ms_p90": 2 * p50, "latency_ms_p99": None, "latency_ms_mean": p50, "cpu_ms": p50}
        said = {"n": 250, "accuracy": 0.9, "same_exits": 1.0, "same_answers": 0.996, "share": [0.5, 0.5]}
        fact = f"entropy-{self.point['budget']:g}-{self.point['arm']}"
        facts = {"decides": f"{self.name}-{fact}", "device": {"cpu": "Toy CPU", "threads": "1", "noisy": "no"}}
        self.record("replay", f"{fact}-host", facts, board="host", points=[self.point | times | said])
        return self

    def miss(self, kind: str, of: str, reason: str, board: str = "", **facts: Any) -> Cell:
        """A skip or a failure."""
        self.record(kind, "-".join(filter(None, (of, facts.get("arm", ""), board))), facts, of=of, board=board, reason=reason)
        return self


def make(root: Path) -> None:
    """Write the records under ``root``, which must not be there."""
    to = Maker(root)
    ort, fake = "ONNX Runtime", "fake-quant"
    Cell(to, 0, "LeNet", "FP32", "FP32", "torch").eval([first(3)]).measure(0.8)
    Cell(to, 1, "LeNet", "OnnxRuntime(of=FP32)", "FP32", ort).eval([first(3)]).measure(0.4).measure(0.5, noisy=True)
    Cell(to, 2, "LeNet", "OnnxRuntime(of=PTQ)", "INT8 PTQ", ort).eval([first(4)], 8, 80_000, 1.0).measure(0.2)
    half = Cell(to, 3, "LeNet", "FP16", "FP16", "torch").eval([first(3)], 16)
    half.miss("skip", "measure", "this CPU has no FP16 kernels", "host")
    Cell(to, 4, "LeNet", "QAT(bits=4)", "INT4 QAT", "").miss("fail", "eval", "epoch 2, step 7: the loss is NaN;\n lower the rate")
    for seed, wrong in enumerate(([first(8), first(4)], [first(10), first(6)])):
        fp32 = Cell(to, 10, "B-LeNet", "FP32", "FP32", "torch", seed).eval(wrong)
        fp32.measure(0.5, 1.0).decide(20).replay(0.7)
    fp32 = Cell(to, 11, "B-LeNet", "OnnxRuntime(of=FP32)", "FP32", ort).eval([first(8), first(4)]).measure(0.25, 0.5)
    fp32.decide(20).replay(0.36).decide(20, "kept").replay(0.38)
    half = Cell(to, 12, "B-LeNet", "FP16", "FP16", "torch").eval([first(8), first(4)], 16)
    half.miss("skip", "measure", "this CPU has no FP16 kernels", "host")
    ptq = Cell(to, 13, "B-LeNet", "PTQ", "INT8 PTQ", fake).eval([first(8, 10), first(3, 20, 21)], 8)
    ptq.miss("skip", "measure", "simulated arithmetic has no latency", "host")
    for seed, wrong in enumerate(([first(8, 10), first(3, 20, 21)], [first(10, 12), first(6, 30)])):
        ptq = Cell(to, 14, "B-LeNet", "OnnxRuntime(of=PTQ)", "INT8 PTQ", ort, seed).eval(wrong, 8, 90_000, 1.0, 0.975)
        ptq.measure(0.1, 0.2).decide(24, flips=0.1).replay(0.16).decide(30, "kept", flips=0.25)
    qat = Cell(to, 15, "B-LeNet", "QAT(bits=4)", "INT4 QAT", fake).eval([first(20), first(16)], 4)
    qat.miss("skip", "measure", "simulated arithmetic has no latency", "host")
    qat.miss("fail", "decide", "the least possible is 0.5", policy_label="Entropy", budget=0.25, arm="refitted", currency="macs")
    trt = Cell(to, 16, "B-LeNet", "TensorRT(of=PTQ)", "TensorRT INT8", "")
    trt.miss("skip", "eval", "tensorrt is not installed: pip install tensorrt | a_b 50 %")
    (to.folder / "900-torn.json").write_text('{"cell": "b-lenet')


def main(out: Path = HERE) -> None:
    """Records and tables."""
    shutil.rmtree(out / "records", ignore_errors=True)
    make(out / "records")
    rows = report.rows(out / "records", EXP)
    for fmt in report.FORMATS:
        (out / "tables").mkdir(exist_ok=True)
        (out / "tables" / f"{EXP}.{fmt}").write_text(report.show(rows, fmt))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
