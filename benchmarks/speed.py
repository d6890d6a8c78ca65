"""How fast are the executed networks, and which bars of issue 6 do they reach?

    python benchmarks/speed.py [--trunk resnet56] [--launches 3] [--samples 256] [--give 0.25] [--skip peers,lenet,...] [--compile]

SDN on a ResNet and its static twin (CIFAR-10), B-LeNet and LeNet (MNIST), with the weights of results/zoo; a network that is not
there is built untrained, its speed is as good and its accuracy says nothing. Everything of one table is timed in one
run of fresh processes, interleaved (anytime/boards/host.py): torch eager, ONNX Runtime and OpenVINO, FP32 and INT8, batch 1 and 64.

A time is the mean over samples of each sample's median over launches. Wall times judge the bars; where others took the CPU
("noisy") process CPU times do, and the tables say so. Policies are fitted on val: of every choice of up to three exits under MaxProb,
the cheapest in measured milliseconds that loses at most ``--give`` points of val accuracy to the static FP32 twin; accuracy is that of all
test samples on the engine, and its loss is paired. ``ideal``: for each exit the fused graph up to it, without the heads before it
and without host code, weighted by how many samples leave there.
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
from typing import Any

import numpy as np
import torch
from keep import keep

from anytime import zoo
from anytime.backend import Deployable, Segment, TorchNet
from anytime.backends.float import BFloat16, Float32
from anytime.backends.nncf import NNCF
from anytime.backends.onnxruntime import OnnxRuntime
from anytime.backends.openvino import OpenVINO
from anytime.backends.ort_quantizer import OrtQuantizer
from anytime.backends.ptq import PTQ
from anytime.backends.torch_compile import TorchCompile
from anytime.board import Replayed
from anytime.boards.host import AT_ONCE, Host
from anytime.cost import Cost, account
from anytime.dataset import Data, DatasetSpec, Part
from anytime.datasets.cifar import CIFAR10
from anytime.datasets.mnist import MNIST
from anytime.engine import OnnxRuntimeGraph
from anytime.errors import AnytimeError, Infeasible
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


class Bars:
    """The bars, with what was measured."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str]] = []
        self.values: dict[str, float] = {}

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
    forms["OV BF16"] = compress(OpenVINO(of=BFloat16()))
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


def chosen(name: str, val: Predictions, cost: PathCost, wanted: float) -> Policy:
    """The cheapest policy whose accuracy on val is ``wanted``, of all that read up to three exits; see the head of this file.

    Where none has it, a stand-in that spends 0.6 of the time of a path through three exits; it is said.
    """
    found: list[tuple[float, Policy]] = []
    for asked in (Fixed(), Reading(of=MaxProb())):
        with suppress(Infeasible):
            policy = asked.fit_accuracy(val, cost, wanted)
            found.append((policy.spends(policy.leave(val), val.n_exits, cost), policy))
    if found:
        return min(found, key=lambda f: f[0])[1]
    last = 100 * float(correct(val)[-1].mean())
    print(f"  {name}: no policy has {100 * wanted:.2f} % on val, the last exit has {last:.2f}: one at 0.6 stands in")
    reads = (0, val.n_exits // 2, val.n_exits - 1)
    return Reading(of=MaxProb(), reads=reads).fit(val, cost, 0.6 * cost.path(reads, reads[-1]))


# Times


class Run:
    """Jobs that were executed in one interleaved run, by name."""

    def __init__(self, board: Host, jobs: Jobs, x: Floats) -> None:
        self.board = board
        self.replays: dict[str, Replayed] = dict(zip(jobs, board.run(list(jobs.values()), x), strict=True))
        facts = next(iter(self.replays.values())).facts
        self.noisy = facts["noisy"] == "yes"
        judge = "NOISY, so CPU times judge" if self.noisy else "wall times judge"
        print(f"\n{board.name}, {board.threads} thread(s), {len(x)} samples, {board.launches} launches")
        print(f"  CPU pressure {facts['pressure_share']}: {judge}", flush=True)

    def ms(self, name: str, cpu: bool | None = None) -> float:
        """ms a sample: see the head of this file."""
        replay = self.replays[name]
        taken = replay.cpu_ms if (self.noisy if cpu is None else cpu) else replay.wall_ms
        return float(np.median(taken, axis=0).mean())

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
            if name in offline and (other := int((r.answers != offline[name][: len(r.answers)]).sum())):
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


def scored(test: Predictions, policy: Policy, reference: Bools) -> tuple[Ints, str, float]:
    """Answers [N], their accuracy in words, and the upper limit of the paired loss against ``reference`` in points."""
    answers = policy.answer(test.logits, policy.exits(test.logits)).argmax(-1)
    right = answers == test.labels
    loss = paired_loss(reference, right)
    said = f"{100 * right.mean():.2f} %, paired loss {100 * loss.value:+.2f}, at most {100 * loss.upper:+.2f}"
    return answers, said, 100 * loss.upper


def show_stages(board: Host, nets: Mapping[str, Deployable], cost: Cost, x: Floats) -> None:
    """Print where the time goes, stage by stage, CPU times: what a saving in MACs cannot save more of."""
    for (name, _), timing in zip(nets.items(), board.time(list(nets.values()), x), strict=True):
        stage, head = (np.median(ms, axis=1) for ms in (timing.stage_cpu_ms, timing.head_cpu_ms))
        speed = 2e-6 * cost.stage.macs / stage
        print(f"  {name}: stages us {np.round(1e3 * stage, 1).tolist()}, heads us {np.round(1e3 * head, 1).tolist()},", end=" ")
        print(f"stages GOP/s {np.round(speed).astype(int).tolist()}")


def residual(args: argparse.Namespace, bars: Bars) -> dict[str, GraphNet]:
    """SDN on a ResNet against its static twin; answers the INT8 networks."""
    data, spec = CIFAR10(), SDN(args.trunk)
    parts = data.load(0)
    (twin, _), (model, trained) = built(Static(spec), data, parts), built(spec, data, parts)
    static, sdn = made(twin, parts, "peers" not in args.skip, args.compile), made(model, parts)
    for form in ("torch FP32", "OV BF16"):
        sdn.pop(form)
    last, x = Fixed(-1), parts.test.x.numpy()
    static_right = correct(predictions(static["ORT FP32"], parts, "test"))[0]
    wanted = float(correct(predictions(static["ORT FP32"], parts, "val"))[0].mean()) - args.give / 100
    links = dict(zip(sdn, Host(launches=1).time(list(sdn.values()), x[:64]), strict=True))
    policies = {name: chosen(name, predictions(net, parts, "val"), links[name], wanted) for name, net in sdn.items()}
    words: dict[str, str] = {}
    offline: dict[str, Ints] = {}
    upper: dict[str, float] = {}
    for name, net in static.items():
        job = f"static {name}"
        offline[job], words[job], _ = scored(predictions(net, parts, "test"), last, static_right)
    for name, net in sdn.items():
        job = f"policy {name}"
        offline[job], words[job], upper[name] = scored(predictions(net, parts, "test"), policies[name], static_right)
    jobs: dict[str, tuple[Deployable, Policy]] = {f"static {n}": (net, last) for n, net in static.items()}
    for name, net in sdn.items():
        jobs[f"policy {name}"] = (net, policies[name])
        if name.endswith("INT8"):
            jobs[f"full {name}"] = (net, last)
            jobs |= {f"prefix {name} {k + 1}": (net, Fixed(k)) for k in policies[name].uses(net.n_exits)}
    host = {name: host_code_us(net, policies[name], x[:200]) for name, net in sdn.items() if isinstance(net, GraphNet)}
    cost = account(sdn["ORT INT8"], parts.input_shape)
    e = cost.stage.macs.size
    for batch, least_eager, least_efficiency in ((1, 16, 0.65), (64, 7, 0.75)):
        n = args.samples if batch == 1 else READINGS * AT_ONCE * batch
        run = Run(Host(launches=args.launches, batch=batch, warmup=10 if batch == 1 else 2), jobs, x[:n])
        run.show(words, offline)
        show_stages(Host(launches=1, batch=batch), {n: net for n, net in sdn.items() if n.endswith("INT8")}, cost, x[:n])
        where = f"SDN {args.trunk}, batch {batch}"
        best8 = min(run.ms("static ORT INT8"), run.ms("static OV INT8"))
        for engine in ("ORT", "OV"):
            name = f"{engine} INT8"
            t, reads = run.ms(f"policy {name}"), policies[name].uses(e)
            shares = run.shares(f"policy {name}", e)
            eager, fp32, int8 = (run.ms(f"static {n}") for n in ("torch FP32", f"{engine} FP32", f"{engine} INT8"))
            print(
                f"  {name}: {eager / t:.1f}x eager = engine {eager / fp32:.2f} x INT8 {fp32 / int8:.2f} x exits {int8 / t:.2f};"
                f" reads exits {[k + 1 for k in reads]}, shares {np.round(shares[list(reads)], 2).tolist()}"
            )
            note = "; untrained" if not trained else "" if upper[name] <= 0.5 else f"; NOT within 0.5 points ({upper[name]:+.2f})"
            bars.at_least(f"{where}, {name} policy: x eager FP32", eager / t, least_eager, note=note)
            if batch == 1:
                bars.at_least(f"{where}, {name} policy: x the same engine's static FP32", fp32 / t, 3, note=note)
                bars.at_least(f"{where}, {name} policy: x static INT8 on its best engine", best8 / t, 1.4, note=note)
                bars.at_most(f"{where}, {name}: host code a segment, us", host[name], 10, 1)
            saved = cost.path((e - 1,), e - 1) / paths(cost, reads, shares)
            bars.at_least(
                f"{where}, {name}: efficiency of the saving (MACs / {saved:.2f})",
                run.ms(f"full {name}") / t / saved,
                least_efficiency,
            )
            code = host[name] / 1e3 if batch == 1 else 0.0
            ideal = sum(s * (run.ms(f"prefix {name} {k + 1}") - code) for k, s in enumerate(shares) if s)
            bars.at_least(f"{where}, {name}: share of the ideal", ideal / t, 0.9)
            for peer in ("NNCF", "quantize_static"):
                if f"static {engine} {peer}" in jobs:
                    bars.at_most(
                        f"static {args.trunk} INT8, batch {batch}, {engine}: ours / {peer}",
                        int8 / run.ms(f"static {engine} {peer}"),
                        1.03,
                    )
    if "peak" not in args.skip:
        names = ("ORT INT8", "OV INT8")
        for threads in (1, 2):
            jobs = {"gemm": (Gemm(), last)} | {n: (static[n], last) for n in names}
            run = Run(Host(launches=args.launches, batch=64, threads=threads, warmup=2), jobs, x[: READINGS * AT_ONCE * 64])
            run.show({}, {})
            peak = 2 * GEMM**3 / run.ms("gemm") / 64
            macs = account(static["ORT INT8"], parts.input_shape).path((0,), 0)
            # CPU times of several threads hold what they spin away.
            note = "; NOISY, so this means nothing" if threads > 1 and run.noisy else ""
            for name, least in zip(names, (0.45, 0.65), strict=True):
                what = f"static {args.trunk}, batch 64, {threads} thread(s), {name}: share of {peak / 1e6:.0f} GOP/s"
                bars.at_least(what, 2 * macs / run.ms(name) / peak, least, note=note)
    return {name: net for name, net in sdn.items() if name.endswith("INT8") and isinstance(net, GraphNet)}


def lenet(args: argparse.Namespace, bars: Bars) -> None:
    """B-LeNet against LeNet in torch."""
    data, spec = MNIST(), BLeNet()
    parts = data.load(0)
    (twin, _), (model, trained) = built(Static(spec), data, parts), built(spec, data, parts)
    nets = made(model, parts)
    eager = Float32().compress(twin, parts.calib, Trainer(Recipe(), parts.train, 0))
    x = parts.test.x.numpy()
    links = dict(zip(nets, Host(launches=1).time(list(nets.values()), x[:64]), strict=True))
    vals = {name: predictions(net, parts, "val") for name, net in nets.items()}
    alone = float(correct(predictions(eager, parts, "val"))[0].mean())
    fp32 = chosen("B-LeNet torch FP32", vals["torch FP32"], links["torch FP32"], alone - args.give / 100)
    val, test = vals["torch FP32"], predictions(nets["torch FP32"], parts, "test")
    wanted = float((fp32.answer(val.logits, fp32.exits(val.logits)).argmax(-1) == val.labels).mean())
    policies = {
        name: fp32 if name == "torch FP32" else chosen(f"B-LeNet {name}", vals[name], links[name], wanted) for name in nets
    }
    reference = fp32.answer(test.logits, fp32.exits(test.logits)).argmax(-1) == test.labels
    words: dict[str, str] = {}
    offline: dict[str, Ints] = {}
    upper: dict[str, float] = {}
    for name, net in nets.items():
        job = f"policy {name}"
        offline[job], words[job], upper[name] = scored(predictions(net, parts, "test"), policies[name], reference)
    run = Run(
        Host(launches=args.launches),
        {"LeNet torch FP32": (eager, Fixed(-1))} | {f"policy {n}": (net, policies[n]) for n, net in nets.items()},
        x[: args.samples],
    )
    run.show(words, offline)
    for name in ("ORT INT8", "OV INT8"):
        note = "" if trained and upper[name] <= 0.1 else f"; NOT within 0.1 point ({upper[name]:+.2f})"
        bars.at_least(
            f"B-LeNet, batch 1, {name} policy: x eager FP32 LeNet",
            run.ms("LeNet torch FP32") / run.ms(f"policy {name}"),
            5.4,
            note=note,
        )


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
    bars.at_most("single file, early exit / first segment alone", ms["early"] / ms["first"], 1.1)
    bars.at_most("single file, full depth / flat graph", ms["full"] / ms["flat"], 1.1)


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

    x = rng.normal(size=(4096, 3, 32, 32)).astype(np.float32)
    counts = (1, 4, 16, 64, 256, 1024, 4096)
    net = exits(3)
    print("\nCost against work, ms CPU")
    by_samples = interleaved({str(n): (lambda n=n: net.predict(x[:n], batch=64)) for n in counts}, 4, 2)  # type: ignore[misc]
    print("  samples:", {n: round(t, 3) for n, t in by_samples.items()})
    slope = np.polyfit(np.log(counts[3:]), np.log([by_samples[str(n)] for n in counts[3:]]), 1)[0]
    bars.at_most("64 to 4,096 samples: exponent of the cost", float(slope), 1.05)
    nets = {str(n): exits(n) for n in range(1, 11)}
    by_exits = interleaved({n: (lambda net=net: net.predict(x[:64], batch=64)) for n, net in nets.items()}, 8, 2)  # type: ignore[misc]
    print("  exits:", {n: round(t, 3) for n, t in by_exits.items()})
    fit = np.corrcoef(np.arange(1, 11), list(by_exits.values()))[0, 1] ** 2
    bars.at_least("1 to 10 exits: R^2 of a straight line through the cost", float(fit), 0.98, 3)


def main() -> None:
    """Measure, print the tables, then the bars."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trunk", default="resnet56")
    parser.add_argument("--launches", type=int, default=3)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--give", type=float, default=0.25, help="points of val accuracy that a policy may lose")
    parser.add_argument("--skip", default="", help="of: peers,peak,residual,lenet,file,linear")
    parser.add_argument("--compile", action="store_true", help="torch.compile too: minutes of compilation in every launch")
    args = parser.parse_args()
    args.skip = args.skip.split(",")
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
    keep("speed", bars.values)


if __name__ == "__main__":
    # Under its own name, so that the processes that measure can import what is pickled.
    from speed import main as own_main

    own_main()
