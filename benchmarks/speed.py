"""How fast are the executed networks, and which bars of issue 6 do they reach?

    python benchmarks/speed.py [--trunk resnet56] [--launches 3] [--samples 256] [--give 0.25] [--skip peers,lenet,...] [--compile]

SDN on a ResNet and its static twin (CIFAR-10), B-LeNet and LeNet (MNIST), with the weights of results/zoo; a network that is not
there is built untrained, its speed is as good and its accuracy says nothing. Everything of one table is timed in one
run of fresh processes, interleaved (anytime/boards/host.py): torch eager, ONNX Runtime and OpenVINO, FP32 and INT8, batch 1 and 64.

A time is the mean over samples of each sample's median over launches. Wall times judge the bars; where others took the CPU
("noisy") process CPU times do, and the tables say so. Policies are fitted on val, for batch 1 and 64 apart: of every choice of up to
three exits under MaxProb, the cheapest in measured milliseconds that loses at most ``--give`` points of val accuracy to the static FP32
twin; accuracy is that of all test samples on the engine, and its loss is paired. ``ideal``: for each exit the bare ``step`` of the fused
graph up to it, without the heads before it, weighted by how many samples leave there.

All of it is kept in results/benchmarks/speed.json under names that hold no measured number and no comma, so that pages can cite them;
1 and 0 stand for yes and no. With ``--skip`` nothing is kept: a part must not replace the whole.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from time import perf_counter_ns, process_time_ns
from typing import Any, NamedTuple

import numpy as np
import torch
from keep import keep

from anytime import cpu, zoo
from anytime.backend import Deployable, Segment, TorchNet
from anytime.backends.float import BFloat16, Float32
from anytime.backends.nncf import NNCF
from anytime.backends.onnxruntime import OnnxRuntime
from anytime.backends.openvino import OpenVINO
from anytime.backends.ort_quantizer import OrtQuantizer
from anytime.backends.ptq import PTQ
from anytime.backends.torch_compile import TorchCompile
from anytime.board import Replayed, Timing
from anytime.boards.host import AT_ONCE, Host
from anytime.cost import Cost, account
from anytime.dataset import Data, DatasetSpec, Part
from anytime.datasets.cifar import CIFAR10
from anytime.datasets.mnist import MNIST
from anytime.engine import OnnxRuntimeGraph
from anytime.errors import AnytimeError, Infeasible
from anytime.execute import Executor
from anytime.metrics import Bools, Floats, Ints, Predictions, correct, paired_loss
from anytime.model import AnytimeModel, ModelSpec
from anytime.models.branchynet import BLeNet
from anytime.models.sdn import SDN
from anytime.models.static import Static
from anytime.onnx_if import single_file
from anytime.onnx_net import GraphNet, OnnxNet, OpenVINONet, written
from anytime.policies.confidence import MaxProb
from anytime.policies.fixed import Fixed
from anytime.policies.reading import Reading
from anytime.policy import PathCost, Policy
from anytime.quant.trace import traced
from anytime.stopwatch import _ready, _Replay
from anytime.train import Recipe, Trainer
from anytime.weights import load_weights

ZOO = Path(__file__).resolve().parent.parent / "results" / "zoo"
GEMM = 2048  # side of the matrices whose product is the machine's INT8 peak
READINGS = 4  # of batches, in a launch
Jobs = Mapping[str, tuple[Deployable, Policy]]


class Gemm(TorchNet):
    """The INT8 product of two matrices, in place of a network: what the machine's INT8 peak is measured with."""

    def __init__(self) -> None:
        super().__init__(
            AnytimeModel([torch.nn.Identity()], [torch.nn.Identity()]), {}, simulated=False, execution="torch._int_mm"
        )
        self.left, self.right = (torch.randint(-128, 127, (GEMM, GEMM), dtype=torch.int8) for _ in range(2))

    def step(self, segment: Segment, state: Any) -> tuple[Any, Floats | None]:
        torch._int_mm(self.left, self.right)
        return state, np.zeros((len(state), 2), np.float32)


class Prefix(Deployable):
    """A network's first segments and one head, fused, as all that there is: under Host's stopwatch no more than its ``step`` runs."""

    n_exits, restarts, simulated = 1, False, False

    def __init__(self, net: GraphNet, exit: int, batch: int) -> None:
        self.net, self.batch = net, batch
        self.segment = Segment(exit if net.restarts else 0, exit + 1, exit)
        self.format, self.execution, self.needs = net.format, net.execution, net.needs  # type: ignore[misc]

    def open(self, threads: int) -> None:
        self.net.open(threads)

    def start(self, x: Floats) -> Any:
        return x

    def step(self, segment: Segment, state: Any) -> tuple[Any, Floats | None]:
        for i in range(0, len(state) if segment.head is None else 0, self.batch):  # a reading is of several batches
            self.net.step(self.segment, self.net.start(state[i : i + self.batch]))
        return state, None

    def save(self, folder: Path) -> list[Path]:
        return []


class Bars:
    """The bars, with what was measured: all that is kept, by names that stay the same from run to run."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str]] = []
        self.values: dict[str, float] = {}

    def keep(self, values: Mapping[str, float], of: str = "") -> None:
        """What has no bar; ``of``: what each name begins with."""
        self.values |= {of + what: float(value) for what, value in values.items()}

    def at_least(self, what: str, got: float, wanted: float, digits: int = 2, note: str = "") -> None:
        """A bar that must be reached."""
        verdict = "met" if got >= wanted else f"short by {wanted - got:.{digits}f}"
        self.rows.append((what, f"{got:.{digits}f} (at least {wanted:g}): {verdict}{note}"))
        self.values[what] = got

    def at_most(self, what: str, got: float, wanted: float, digits: int = 2, note: str = "") -> None:
        """A bar that must not be passed."""
        verdict = "met" if got <= wanted else f"over by {got - wanted:.{digits}f}"
        self.rows.append((what, f"{got:.{digits}f} (at most {wanted:g}): {verdict}{note}"))
        self.values[what] = got

    def show(self) -> None:
        """Print them."""
        print("\nBars of issue 6")
        for what, said in self.rows:
            print(f"  {what:78} {said}")


# Networks


def built(spec: ModelSpec, data: DatasetSpec, parts: Data) -> tuple[AnytimeModel, bool]:
    """The network with the zoo's weights, and whether there are any; of several the one that was trained longest."""
    torch.manual_seed(0)
    model = spec.build(parts.input_shape, parts.n_classes)
    held = {k: v for k, v in zoo.read(ZOO).items() if (v["model"], v["data"]) == (spec.label, data.label)}
    if held:
        recipes = {k: v["spec"][3] for k, v in held.items()}
        name = max(recipes, key=lambda k: recipes[k]["epochs"] + recipes[k].get("trunk_epochs", 0))
        load_weights(model, ZOO / f"{name}.safetensors")
        return model.eval(), True
    print(f"{spec.label} is not in the zoo: untrained, its accuracy says nothing")
    model.train()
    with torch.no_grad():  # BatchNorm statistics, so that activations have a trained network's size
        model(parts.calib.x[:256])
    return model.eval(), False


def made(model: AnytimeModel, parts: Data, peers: bool = False, compiled: bool = False) -> dict[str, Deployable]:
    """Every form of a network: "engine arithmetic" -> it."""
    trainer = Trainer(Recipe(), parts.train, 0)

    def compress(backend: Any) -> Deployable:
        net: Deployable = backend.compress(model, parts.calib, trainer)
        return net

    def on_openvino(net: Deployable) -> Deployable:
        assert isinstance(net, GraphNet)
        return OpenVINONet(net.twin, net.bits, net.graph, net.facts)

    forms = {
        "torch FP32": compress(Float32()),
        "ORT FP32": compress(OnnxRuntime(of=Float32())),
        "ORT INT8": compress(OnnxRuntime(of=PTQ())),
        "OV FP32": compress(OpenVINO(of=Float32())),
        "OV INT8": compress(OpenVINO(of=PTQ())),
    }
    if cpu.has_any(cpu.BF16_KERNELS):
        forms["OV BF16"] = compress(OpenVINO(of=BFloat16()))
    else:
        print("no BF16: this CPU does not multiply it")
    if compiled:
        forms["torch.compile FP32"] = compress(TorchCompile(of=Float32()))
    if peers:
        forms["ORT quantize_static"] = compress(OrtQuantizer())
        nncf = compress(NNCF())
        forms |= {"ORT NNCF": nncf, "OV NNCF": on_openvino(nncf), "OV quantize_static": on_openvino(forms["ORT quantize_static"])}
    return forms


def predictions(net: Deployable, parts: Data, part: str) -> Predictions:
    """What a network says of a part."""
    p: Part = getattr(parts, part)
    return Predictions(net.predict(p.x.numpy()), p.y.numpy(), p.name)


def chosen(name: str, val: Predictions, cost: PathCost, wanted: float) -> tuple[Policy, bool]:
    """The cheapest policy whose accuracy on val is ``wanted``, of all that read up to three exits; see the head of this file.

    Where none has it, a stand-in that spends 0.6 of the time of a path through three exits. Second: whether it is one.
    """
    found: list[tuple[float, Policy]] = []
    for asked in (Fixed(), Reading(of=MaxProb())):
        with suppress(Infeasible):
            policy = asked.fit_accuracy(val, cost, wanted)
            found.append((policy.spends(policy.leave(val), val.n_exits, cost), policy))
    if found:
        return min(found, key=lambda f: f[0])[1], False
    last = 100 * float(correct(val)[-1].mean())
    print(f"  {name}: no policy has {100 * wanted:.2f} % on val, the last exit has {last:.2f}: one at 0.6 stands in")
    reads = (0, val.n_exits // 2, val.n_exits - 1)
    return Reading(of=MaxProb(), reads=reads).fit(val, cost, 0.6 * cost.path(reads, reads[-1])), True


# Times


class Run:
    """Jobs that were executed in one interleaved run, by name, and bare prefixes beside them."""

    def __init__(self, board: Host, jobs: Jobs, x: Floats, prefixes: Mapping[str, Prefix] | None = None) -> None:
        self.board, prefixes = board, prefixes or {}
        at_once = 1 if board.batch == 1 else AT_ONCE * board.batch
        # As board.run does, with jobs that have no policy: they are timed link by link, and a prefix is one.
        measured = board._measure([*jobs.values(), *((net, None) for net in prefixes.values())], x, at_once)
        self.replays: dict[str, Replayed] = {}
        for name, (readings, facts) in zip(jobs, measured, strict=False):
            wall, spent, exits, answers = readings.transpose(2, 0, 1)
            if (exits != exits[0]).any() or (answers != answers[0]).any():
                raise AnytimeError(f"{name} took other exits or gave other answers in another launch")
            self.replays[name] = Replayed(exits[0], answers[0], 1e-6 * wall, 1e-6 * spent, facts, at_once)
        # A reading's stage is all of it: start and step.
        self.bare = {
            name: 1e-6 / at_once * readings.transpose(2, 0, 1)[:2]
            for name, (readings, _) in zip(prefixes, measured[len(jobs) :], strict=True)
        }
        said = [facts for _, facts in measured]  # each engine has processes, and noise, of its own
        self.noisy = any(facts["noisy"] == "yes" for facts in said)
        judge = "NOISY, so CPU times judge" if self.noisy else "wall times judge"
        print(f"\n{board.name}, {board.threads} thread(s), {len(x)} samples, {board.launches} launches")
        print(f"  CPU pressure {max(facts['pressure_share'] for facts in said)}: {judge}", flush=True)

    def ms(self, name: str, cpu: bool | None = None) -> float:
        """ms a sample: see the head of this file."""
        replay = self.replays[name]
        taken = replay.cpu_ms if (self.noisy if cpu is None else cpu) else replay.wall_ms
        return float(np.median(taken, axis=0).mean())

    def bare_ms(self, name: str) -> float:
        """ms a sample of a prefix, on the same clock."""
        return float(np.median(self.bare[name][int(self.noisy)], axis=0).mean())

    def keep(self, bars: Bars, of: str, offline: Mapping[str, Ints]) -> None:
        """Times, memory and what was answered otherwise than all at once, of every job."""
        bars.keep({f"{of}: noisy": self.noisy})
        for name, r in self.replays.items():
            values = {"wall (ms)": self.ms(name, False), "CPU (ms)": self.ms(name, True)}
            for fact, what in (("first_answer_ms", "first answer (ms)"), ("memory_mb", "memory (MB)")):
                if r.facts.get(fact, "unknown") != "unknown":
                    values[what] = float(r.facts[fact])
            if name in offline:
                values["answered otherwise (samples)"] = self.otherwise(name, offline)
            bars.keep(values, f"{of} {name}: ")

    def otherwise(self, name: str, offline: Mapping[str, Ints]) -> int:
        """How many samples got another answer than all at once."""
        answers = self.replays[name].answers
        return int((answers != offline[name][: len(answers)]).sum())

    def shares(self, name: str, n_exits: int) -> Floats:
        """How many of the samples left at each exit [E]."""
        exits = self.replays[name].exits
        return np.bincount(exits, minlength=n_exits) / len(exits)

    def show(self, accuracies: Mapping[str, str], offline: Mapping[str, Ints]) -> None:
        """Print them; ``offline``: the answers that a job must have given, which is checked."""
        slowest = next(iter(self.replays))
        print(f"  {'':32} {'ms wall':>9} {'ms CPU':>9} {'x ' + slowest:>24}   first answer ms, MB; accuracy of all test samples")
        for name, r in self.replays.items():
            ratio = self.ms(slowest) / self.ms(name)
            print(
                f"  {name:32} {self.ms(name, False):9.4f} {self.ms(name, True):9.4f} {ratio:24.2f}   "
                f"{r.facts.get('first_answer_ms', ''):>8} {r.facts.get('memory_mb', ''):>7}   {accuracies.get(name, '')}"
            )
            if name in offline and (other := self.otherwise(name, offline)):
                print(f"  {'':32} executed, it answered {other} of these samples otherwise than all at once")


def interleaved(runs: Mapping[str, Callable[[], Any]], rounds: int, inner: int = 5) -> dict[str, float]:
    """Median CPU ms of each, in this process, in turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            run()
            for _ in range(inner):
                c0 = process_time_ns()
                run()
                c1 = process_time_ns()
                if turn:
                    times[name].append(1e-6 * (c1 - c0))
    return {name: float(np.median(each)) for name, each in times.items()}


class Stopwatch:
    """Stands in for what runs a graph, and counts the ns that its method takes."""

    def __init__(self, it: Any, method: str) -> None:
        self.it, self.ns = it, 0
        inner = getattr(it, method)

        def timed(*args: Any) -> Any:
            started = perf_counter_ns()
            out = inner(*args)
            self.ns += perf_counter_ns() - started
            return out

        setattr(self, method, timed)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.it, name)


def host_code_us(net: GraphNet, policy: Policy, x: Floats) -> float:
    """us a segment outside the engine's own run: the median over samples of what is left of a replay, batch 1."""
    net = net.__class__(net.twin, net.bits, net.graph, net.facts)
    net.open(1)
    replay = _Replay(net, policy)
    _ready(net, replay.segments, x[:1], lambda: None)
    for run in net._graphs.values():
        if isinstance(run, OnnxRuntimeGraph):
            run._session = Stopwatch(run._session, "run")
        else:
            run._single._request = Stopwatch(run._single._request, "infer")  # type: ignore[attr-defined]
    watches = [getattr(r, "_session", None) or r._single._request for r in net._graphs.values()]  # type: ignore[attr-defined]
    left = []
    for i in range(len(x)):
        before = sum(w.ns for w in watches)
        ((wall, _, exit, _),) = replay.go(x[i : i + 1])
        left.append((wall - (sum(w.ns for w in watches) - before)) / (1 + policy.uses(net.n_exits).index(exit)) / 1e3)
    return float(np.median(left))


# The tables


def paths(cost: Cost, reads: Sequence[int], shares: Floats) -> float:
    """Mean MACs of a sample."""
    return float(sum(s * cost.path(tuple(reads), k) for k, s in enumerate(shares) if s))


class Scored(NamedTuple):
    """What a policy answers all test samples [N], on one engine."""

    answers: Ints
    accuracy: float  # in percent
    loss: float  # points, paired, against the reference
    upper: float  # points: its upper limit

    def __str__(self) -> str:
        return f"{self.accuracy:.2f} %, paired loss {self.loss:+.2f}, at most {self.upper:+.2f}"

    @property
    def values(self) -> dict[str, float]:
        """What is kept."""
        return {"accuracy (%)": self.accuracy, "paired loss (points)": self.loss, "upper limit of it (points)": self.upper}


def scored(test: Predictions, policy: Policy, reference: Bools) -> Scored:
    """``reference``: which samples the network has right that the loss is against [N]."""
    answers = policy.answer(test.logits, policy.exits(test.logits)).argmax(-1)
    right = answers == test.labels
    loss = paired_loss(reference, right)
    return Scored(answers, 100 * float(right.mean()), 100 * loss.value, 100 * loss.upper)


def condition(bars: Bars, of: str, said: Scored, limit: float, trained: bool, stands_in: bool) -> str:
    """Keep whether a policy is one that the bars speak of, which its times alone do not show; in words where it is not."""
    flags = {f"within {limit:g}": said.upper <= limit, "trained": trained, "stand-in": stands_in}
    bars.keep(said.values | flags, of)
    if not trained:
        return "; untrained"
    if stands_in:
        return f"; STAND-IN for a policy that no choice is ({said.upper:+.2f} points)"
    return "" if said.upper <= limit else f"; NOT within {limit:g} points ({said.upper:+.2f})"


def show_stages(bars: Bars, where: str, links: Mapping[str, Timing], cost: Cost) -> None:
    """Print and keep where the time goes, stage by stage, CPU times: what a saving in MACs cannot save more of."""
    for name, timing in links.items():
        stage, head = (1e3 * np.median(ms, axis=1) for ms in (timing.stage_cpu_ms, timing.head_cpu_ms))
        speed = 2e-3 * cost.stage.macs / stage
        print(f"  {name}: stages us {np.round(stage, 1).tolist()}, heads us {np.round(head, 1).tolist()},", end=" ")
        print(f"stages GOP/s {np.round(speed).astype(int).tolist()}")
        for k in range(len(stage)):
            values = {"stage (us)": stage[k], "head (us)": head[k], "stage (GOP/s)": speed[k]}
            bars.keep(values, f"{where} {name} link {k + 1}: ")


def residual(args: argparse.Namespace, bars: Bars) -> dict[str, GraphNet]:
    """SDN on a ResNet against its static twin; answers the INT8 networks."""
    data, spec = CIFAR10(), SDN(args.trunk)
    parts = data.load(0)
    (twin, twin_trained), (model, trained) = built(Static(spec), data, parts), built(spec, data, parts)
    static, sdn = made(twin, parts, "peers" not in args.skip, args.compile), made(model, parts)
    for form in ("torch FP32", "OV BF16"):
        sdn.pop(form, None)
    last, x = Fixed(-1), parts.test.x.numpy()
    static_right = correct(predictions(static["ORT FP32"], parts, "test"))[0]
    wanted = float(correct(predictions(static["ORT FP32"], parts, "val"))[0].mean()) - args.give / 100
    vals, tests = ({name: predictions(net, parts, part) for name, net in sdn.items()} for part in ("val", "test"))
    alone = {f"static {name}": scored(predictions(net, parts, "test"), last, static_right) for name, net in static.items()}
    for job, said in alone.items():
        bars.keep(said.values, f"{args.trunk} {job}: ")
    cost = account(sdn["ORT INT8"], parts.input_shape)
    e = cost.stage.macs.size
    for batch, least_eager, least_efficiency in ((1, 16, 0.65), (64, 7, 0.75)):
        n, warmup = (args.samples, 10) if batch == 1 else (READINGS * AT_ONCE * batch, 2)
        where = f"SDN {args.trunk} batch {batch}"
        timed = Host(launches=1, batch=batch, warmup=warmup).time(list(sdn.values()), x[:n])
        links = dict(zip(sdn, timed, strict=True))
        fitted = {name: chosen(f"{where} {name}", vals[name], links[name], wanted) for name in sdn}
        policies = {name: policy for name, (policy, _) in fitted.items()}
        results = alone | {f"policy {name}": scored(tests[name], policies[name], static_right) for name in sdn}
        offline = {job: said.answers for job, said in results.items()}
        jobs: dict[str, tuple[Deployable, Policy]] = {f"static {name}": (net, last) for name, net in static.items()}
        jobs |= {f"policy {name}": (net, policies[name]) for name, net in sdn.items()}
        int8 = {name: net for name, net in sdn.items() if name.endswith("INT8") and isinstance(net, GraphNet)}
        jobs |= {f"full {name}": (net, last) for name, net in int8.items()}
        prefixes = {
            f"{name} {k + 1}": Prefix(net, k, batch) for name, net in int8.items() for k in policies[name].uses(net.n_exits)
        }
        host = {name: host_code_us(net, policies[name], x[:200]) for name, net in int8.items()} if batch == 1 else {}
        run = Run(Host(launches=args.launches, batch=batch, warmup=warmup), jobs, x[:n], prefixes)
        run.show({job: str(said) for job, said in results.items()}, offline)
        run.keep(bars, where, offline)
        show_stages(bars, where, {name: links[name] for name in int8}, cost)
        notes = {
            name: condition(bars, f"{where} policy {name}: ", results[f"policy {name}"], 0.5, trained and twin_trained, stands_in)
            for name, (_, stands_in) in fitted.items()
        }
        best8 = min(run.ms("static ORT INT8"), run.ms("static OV INT8"))
        for engine in ("ORT", "OV"):
            name = f"{engine} INT8"
            of, note = f"{where} policy {name}: ", notes[name]
            t, reads = run.ms(f"policy {name}"), policies[name].uses(e)
            shares = run.shares(f"policy {name}", e)
            eager, fp32, static8 = (run.ms(f"static {form}") for form in ("torch FP32", f"{engine} FP32", f"{engine} INT8"))
            print(
                f"  {name}: {eager / t:.1f}x eager = engine {eager / fp32:.2f} x INT8 {fp32 / static8:.2f} x exits {static8 / t:.2f};"
                f" reads exits {[k + 1 for k in reads]}, shares {np.round(shares[list(reads)], 2).tolist()}"
            )
            bars.keep({"x by the engine": eager / fp32, "x by INT8": fp32 / static8, "x by the exits": static8 / t}, of)
            bars.keep({f"share at exit {k + 1}": shares[k] for k in reads}, of)
            bars.at_least(f"{of}x eager FP32", eager / t, least_eager, note=note)
            if batch == 1:
                bars.at_least(f"{of}x the same engine's static FP32", fp32 / t, 3, note=note)
                bars.at_least(f"{of}x static INT8 on its best engine", best8 / t, 1.4, note=note)
                bars.at_most(f"{of}host code a segment (us)", host[name], 10, 1)
            saved = cost.path((e - 1,), e - 1) / paths(cost, reads, shares)
            bars.keep({"x fewer MACs": saved}, of)
            efficiency = run.ms(f"full {name}") / t / saved
            bars.at_least(f"{of}efficiency of the saving", efficiency, least_efficiency, note=f"; {saved:.2f}x fewer MACs")
            ideal = float(sum(shares[k] * run.bare_ms(f"{name} {k + 1}") for k in reads))
            bars.keep({f"bare prefix to exit {k + 1} (ms)": run.bare_ms(f"{name} {k + 1}") for k in reads}, of)
            bars.at_least(f"{of}share of the ideal", ideal / t, 0.9)
            for peer in ("NNCF", "quantize_static"):
                if f"static {engine} {peer}" in jobs:
                    what = f"static {args.trunk} INT8 batch {batch} {engine}: ours over {peer}"
                    bars.at_most(what, static8 / run.ms(f"static {engine} {peer}"), 1.03)
    if "peak" not in args.skip:
        names = ("ORT INT8", "OV INT8")
        for threads in (1, 2):
            jobs = {"gemm": (Gemm(), last)} | {n: (static[n], last) for n in names}
            run = Run(Host(launches=args.launches, batch=64, threads=threads, warmup=2), jobs, x[: READINGS * AT_ONCE * 64])
            run.show({}, {})
            where = f"static {args.trunk} batch 64 with {threads} thread(s)"
            run.keep(bars, where, {})
            peak = 2 * GEMM**3 / run.ms("gemm") / 64
            macs = account(static["ORT INT8"], parts.input_shape).path((0,), 0)
            bars.keep({f"{where}: INT8 GEMM (GOP/s)": peak / 1e6})
            # CPU times of several threads hold what they spin away.
            note = "; NOISY, so this means nothing" if threads > 1 and run.noisy else ""
            note = f" of {peak / 1e6:.0f} GOP/s{note}"
            for name, least in zip(names, (0.45, 0.65), strict=True):
                bars.at_least(f"{where} {name}: share of the INT8 GEMM", 2 * macs / run.ms(name) / peak, least, note=note)
    return {name: net for name, net in sdn.items() if name.endswith("INT8") and isinstance(net, GraphNet)}


def lenet(args: argparse.Namespace, bars: Bars) -> None:
    """B-LeNet against LeNet in torch."""
    data, spec = MNIST(), BLeNet()
    parts = data.load(0)
    (twin, twin_trained), (model, trained) = built(Static(spec), data, parts), built(spec, data, parts)
    nets = made(model, parts)
    eager = Float32().compress(twin, parts.calib, Trainer(Recipe(), parts.train, 0))
    x = parts.test.x.numpy()
    links = dict(zip(nets, Host(launches=1).time(list(nets.values()), x[:64]), strict=True))
    vals, tests = ({name: predictions(net, parts, part) for name, net in nets.items()} for part in ("val", "test"))
    alone = float(correct(predictions(eager, parts, "val"))[0].mean())
    fitted = {"torch FP32": chosen("B-LeNet torch FP32", vals["torch FP32"], links["torch FP32"], alone - args.give / 100)}
    fp32, val, test = fitted["torch FP32"][0], vals["torch FP32"], tests["torch FP32"]
    wanted = float((fp32.answer(val.logits, fp32.exits(val.logits)).argmax(-1) == val.labels).mean())
    fitted |= {name: chosen(f"B-LeNet {name}", vals[name], links[name], wanted) for name in nets if name != "torch FP32"}
    reference = fp32.answer(test.logits, fp32.exits(test.logits)).argmax(-1) == test.labels
    results = {f"policy {name}": scored(tests[name], fitted[name][0], reference) for name in nets}
    offline = {job: said.answers for job, said in results.items()}
    run = Run(
        Host(launches=args.launches),
        {"LeNet torch FP32": (eager, Fixed(-1))} | {f"policy {name}": (net, fitted[name][0]) for name, net in nets.items()},
        x[: args.samples],
    )
    run.show({job: str(said) for job, said in results.items()}, offline)
    run.keep(bars, "B-LeNet batch 1", offline)
    for name, (_, stands_in) in fitted.items():
        of = f"B-LeNet batch 1 policy {name}: "
        note = condition(bars, of, results[f"policy {name}"], 0.1, trained and twin_trained, stands_in)
        if name.endswith("INT8"):
            bars.at_least(f"{of}x eager FP32 LeNet", run.ms("LeNet torch FP32") / run.ms(f"policy {name}"), 5.4, note=note)


def one_file(nets: Mapping[str, GraphNet], bars: Bars, x: Floats) -> None:
    """The graph with ``If`` against its first segment alone and against the flat graph."""
    import onnx

    net = nets["ORT INT8"]
    n = net.n_exits
    plan = net.plan((n // 2, n - 1))
    segments = [onnx.ModelProto.FromString(net.graph(s)) for s in plan]

    def whole(threshold: float) -> Callable[[], Any]:
        test = {"test": "by_max_probability", "arguments": {"thresholds": [threshold]}}
        said = {"tests": [test], "temperatures": (), "answer": "exit taken", "label": "MaxProb"}
        run = OnnxRuntimeGraph(single_file(segments, [n // 2, n - 1], said, {}).SerializeToString(), 1)
        return lambda: run([x[:1]])

    first, flat = (OnnxRuntimeGraph(net.graph(s), 1) for s in (plan[0], Segment(0, n, n - 1)))
    ms = interleaved(
        {"early": whole(0.0), "first": lambda: first([x[:1]]), "full": whole(2.0), "flat": lambda: flat([x[:1]])}, 60
    )
    print("\nOne file, ms CPU:", {k: round(v, 4) for k, v in ms.items()})
    bars.keep({f"single file: {what} (ms)": taken for what, taken in ms.items()})
    bars.at_most("single file: early exit over first segment alone", ms["early"] / ms["first"], 1.1)
    bars.at_most("single file: full depth over flat graph", ms["full"] / ms["flat"], 1.1)


def linear(bars: Bars) -> None:
    """Cost against work: samples at once, and exits that are read."""
    conv = [torch.nn.Conv2d(16, 16, 3, padding=1), torch.nn.ReLU()]
    stages = [torch.nn.Sequential(*(conv if k else [torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.ReLU()])) for k in range(10)]
    heads = [torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(16, 10)) for _ in stages]
    rng = np.random.default_rng(0)

    def exits(n: int) -> Deployable:
        chain = traced(AnytimeModel(stages[:n], heads[:n]))
        net = OnnxNet(chain, {}, partial(written, chain, (3, 32, 32)), {})
        net.open(1)
        return net

    def execute(net: Deployable, policy: Policy, n: int) -> Callable[[], Any]:
        executor = Executor(net, policy, batch=n)
        return lambda: executor.run(x[:n])

    x = rng.normal(size=(4096, 3, 32, 32)).astype(np.float32)
    counts = [4**i for i in range(7)]
    net = exits(3)
    mixed = MaxProb().matched((0.4, 0.3, 0.3), net.predict(x))
    print("\nCost against work, ms CPU; all samples at once, of which 4 in 10 leave at exit 1, 3 at exit 2")
    ms = np.array(list(interleaved({str(n): execute(net, mixed, n) for n in counts}, 5, 2).values()))
    print("  samples:", dict(zip(counts, np.round(ms, 3).tolist(), strict=True)))
    bars.keep({f"cost of {n} sample(s) at once (ms)": taken for n, taken in zip(counts, ms, strict=True)})
    for first in (0, 3):  # from 1 on it holds what a call costs, and less than linear is no surprise
        slope = np.polyfit(np.log(counts[first:]), np.log(ms[first:]), 1)[0]
        bars.at_most(f"{counts[first]} to 4096 samples: exponent of the cost", float(slope), 1.05)
    runs = {}
    for n in range(1, 11):  # every exit is read and tested, and everyone leaves at the last
        runs[str(n)] = execute(exits(n), MaxProb(thresholds=(2.0,) * (n - 1)) if n > 1 else Fixed(-1), 64)
    ms = np.array(list(interleaved(runs, 8, 2).values()))
    print("  exits:", dict(enumerate(np.round(ms, 3).tolist(), 1)))
    bars.keep({f"cost of {n} exit(s) (ms)": taken for n, taken in enumerate(ms, 1)})
    fit = np.corrcoef(np.arange(1, 11), ms)[0, 1] ** 2
    bars.at_least("1 to 10 exits: R^2 of a straight line through the cost", float(fit), 0.98, 3)


def main() -> None:
    """Measure, print the tables, then the bars."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trunk", default="resnet56")
    parser.add_argument("--launches", type=int, default=3)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--give", type=float, default=0.25, help="points of val accuracy that a policy may lose")
    parser.add_argument("--skip", default="", help="of: peers,peak,residual,lenet,file,linear; then nothing is kept")
    parser.add_argument("--compile", action="store_true", help="torch.compile too: minutes of compilation in every launch")
    args = parser.parse_args()
    args.skip = [part for part in args.skip.split(",") if part]
    warnings.filterwarnings("ignore")
    bars = Bars()
    try:
        nets = {} if "residual" in args.skip else residual(args, bars)
        if "file" not in args.skip and nets:
            one_file(nets, bars, CIFAR10().load(0).test.x[:1].numpy())
        if "lenet" not in args.skip:
            lenet(args, bars)
        if "linear" not in args.skip:
            linear(bars)
    except AnytimeError as sentence:
        sys.exit(str(sentence))
    finally:
        bars.show()
    if args.skip:
        print(
            f"\nnot kept in results/benchmarks/speed.json: --skip {','.join(args.skip)} left a part out, which would replace the whole"
        )
    else:
        keep("speed", bars.values)


if __name__ == "__main__":
    # Under its own name, so that the processes that measure can import what is pickled.
    from speed import main as own_main

    own_main()
