"""Rounding that is learned unit by unit, so that each unit gives what it gave in float: AdaRound, BRECQ, QDrop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass
from operator import attrgetter, getitem
from time import perf_counter
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, fx, nn

from anytime.errors import Diverged, Unsupported, UsageError
from anytime.model import AnytimeModel
from anytime.quant.fake import ActivationLearner, FakeQuant, QuantizedLayer, Settled, WeightLearner, on_grid, per_channel
from anytime.quant.graph import Quantized
from anytime.quant.ranges import Grid
from anytime.quant.trace import is_relu, links, module_of

ZETA, GAMMA = 1.1, -0.1  # how far the sigmoid is stretched, so that 0 and 1 are reached
BETA = (20.0, 2.0)  # the penalty's exponent, from first to last
WARM_UP = 0.2  # share of the iterations without penalty
MOST_LAYERS = 6  # of one unit; a longer piece that no single tensor cuts is learned layer by layer
SWEEP = 128  # samples at a time where nothing is learned
SMALLEST = torch.finfo(torch.float32).eps  # a learned step does not fall under this

Progress = Callable[[str, int, int], None]
Values = dict[fx.Node, Tensor]  # what was computed at a node of a quantized link, for all samples or for a batch


@dataclass(frozen=True)
class Reconstruction:
    """How rounding is learned.

    ``unit`` "layer" with ``drop`` 0 is AdaRound, "block" with 0 BRECQ, with 0.5 QDrop. ``drop``: the share of values that stay
    in float, among a unit's inputs and behind its quantizers; it is kept to the nearest 256th. ``learn_steps``: the steps of
    activations too, by Adam at ``step_lr``, which falls as a cosine. ``iterations``: of each unit. ``travel``: the rounding's
    rate, Adam's too, times iterations: how far it can go. ``penalty``: weight of what drives the rounding to 0 or 1.
    ``exit_weight``: what the error at an exit counts in the block that it reads (see reconstruct).
    Source: QDrop's published configuration. Deviation: it has 20,000 iterations at 1e-3, which is the same travel; a tenth
    of them at 1e-3 decides too little (ResNet-20, W4A8, 300 iterations: the logits' squared error on val is 0.86, at 1e-2 0.52).
    """

    unit: Literal["layer", "block"] = "block"
    drop: float = 0.5
    learn_steps: bool = True
    iterations: int = 2000
    batch: int = 32
    travel: float = 20.0
    step_lr: float = 4e-5
    penalty: float = 0.01
    exit_weight: float = 0.1

    def __post_init__(self) -> None:
        if self.unit not in ("layer", "block"):
            raise UsageError(f"unit {self.unit!r} of a reconstruction: take 'layer' or 'block'")
        if not 0 <= self.drop < 1:
            raise UsageError(f"drop {self.drop}: it is the share of values that stay in float, from 0 up to but not 1")
        if self.iterations < 0 or self.batch < 1:
            raise UsageError(f"{self.iterations} iterations of batches of {self.batch}: take 0 or more, of 1 or more")


class Learned(NamedTuple):
    """What became of one unit; ``before`` and ``after`` are its losses, rounded to nearest and as it has learned, nothing dropped."""

    unit: str
    layers: tuple[str, ...]
    samples: int
    iterations: int
    seconds: float
    before: float
    after: float


def rectified_sigmoid(v: Tensor) -> Tensor:
    """clip(sigmoid(v) (zeta - gamma) + gamma, 0, 1): AdaRound's h(V)."""
    return (torch.sigmoid(v) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


class AdaRoundWeight(WeightLearner):
    """Rounds down or up as h(V) says, from a start at the float weight; in eval mode, and settled, up where V >= 0.

    Source: Nagel, Amjad, van Baalen, Louizos, Blankevoort, ICML 2020, arXiv:2004.10568, section 3.2, as in BRECQ's code.
    """

    floor: Tensor
    scale: Tensor

    def __init__(self, layer: QuantizedLayer) -> None:
        super().__init__()
        self.qmin, self.qmax = layer.weight_qmin, layer.weight_qmax
        weight = _channels_last(layer.weight.detach())
        self.register_buffer("scale", per_channel(layer.weight_scale, weight))
        steps = weight / self.scale
        self.register_buffer("floor", steps.floor())
        self.v = nn.Parameter(-torch.log((ZETA - GAMMA) / (steps - self.floor - GAMMA) - 1))

    def forward(self, weight: Tensor) -> Tensor:
        up = rectified_sigmoid(self.v) if self.training else (self.v >= 0).float()
        return (self.floor + up).clamp(self.qmin, self.qmax) * self.scale

    def undecided(self, beta: float) -> Tensor:
        """Sum of 1 - |2 h(V) - 1|^beta: how many weights are not yet rounded."""
        return (1 - (2 * rectified_sigmoid(self.v) - 1).abs().pow(beta)).sum()

    def settle(self, weight: Tensor) -> Settled:
        with torch.no_grad():
            return Settled(self.eval()(weight), self.scale.flatten(), self.qmin, self.qmax)


class DropStep(ActivationLearner):
    """Rounds with a learned step, all but a random ``drop`` of the values; in eval mode all of them. The zero point stays.

    Source: Wei, Gong, Li, Liu, Yu, ICLR 2022, arXiv:2203.05740 (the drop); Esser et al., ICLR 2020, arXiv:1902.08153,
    section 2 (the step's gradient, scaled by 1 / sqrt(N Q_P), N the elements of one sample; QDrop's code counts the batch
    too, and calls a value inside that is clipped by less than half a step).
    """

    def __init__(self, q: FakeQuant, drop: float, generator: torch.Generator, learn: bool = True) -> None:
        super().__init__()
        grid = q.grid
        self.zero_point, self.qmin, self.qmax = grid.zero_point, grid.qmin, grid.qmax
        self.drop, self.generator = drop, generator
        self.step = nn.Parameter(torch.tensor(grid.scale), requires_grad=learn)

    def forward(self, x: Tensor) -> Tensor:
        keep = kept(x, self.drop, self.generator) if self.training and self.drop else None
        return _DropRound.apply(x, self.step, keep, self.grid())  # type: ignore[no-any-return, no-untyped-call]

    def grid(self) -> Grid:
        return Grid(float(self.step.detach()), self.zero_point, self.qmin, self.qmax)


class _DropRound(torch.autograd.Function):
    """Rounded where ``keep`` is 1, left where it is 0.

    d x_hat / d step = round(x / step) - x / step inside, the clipped integer, x_hat / step, outside: so <g, x_hat> - <g
    inside, x>, divided by the step, is all of it. What is dropped adds g x to both products.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, keep: Tensor | None, grid: Grid) -> Tensor:
        out = on_grid(x, grid)
        if keep is not None:
            torch.lerp(x, out, keep, out=out)
        ctx.save_for_backward(x, keep, out)
        ctx.grid = grid
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (x, keep, out), grid = ctx.saved_tensors, ctx.grid
        low, high = grid.qmin - grid.zero_point, grid.qmax - grid.zero_point
        dx = torch.ops.aten.hardtanh_backward(g, x, low * grid.scale, high * grid.scale)
        if keep is not None:
            torch.lerp(g, dx, keep, out=dx)
        dstep = None
        if ctx.needs_input_grad[1]:
            gain = 1 / math.sqrt(x[0].numel() * max(grid.qmax, 1))
            dstep = (_flat(g).dot(_flat(out)) - _flat(dx).dot(_flat(x))) * (gain / grid.scale)
        return dx, dstep, None, None


def kept(like: Tensor, drop: float, generator: torch.Generator) -> Tensor:
    """1 with probability 1 - drop, else 0, in the shape, type and layout of ``like``."""
    words = torch.empty(-(-like.numel() // 8), dtype=torch.int64).random_(-(2**63), None, generator=generator)
    ones = words.view(torch.uint8)[: like.numel()].to(like.dtype).ge_(round(256 * drop))  # a draw makes eight values
    return ones.as_strided(like.shape, torch.empty_like(like, dtype=torch.uint8).stride())


class Op(NamedTuple):
    """A node of a quantized link as both chains call it; where ``args`` names nodes, their values are meant."""

    node: fx.Node
    rounded: Callable[..., Any]
    plain: Callable[..., Any]
    args: Any
    kwargs: Any
    reads: tuple[fx.Node, ...]
    layer: str  # path of the quantized layer that this is, or ""


class Unit(NamedTuple):
    """Ops that follow one another; without ``layers`` there is nothing to learn in them.

    ``gives``: those of its values that are read later, by the next stage too. ``head``: the ops of the head that reads what
    it gives, and ``logits`` theirs: they count in its loss, in float.
    """

    ops: tuple[Op, ...]
    layers: tuple[str, ...]
    reads: tuple[fx.Node, ...]
    gives: tuple[fx.Node, ...]
    head: tuple[Op, ...] = ()
    logits: fx.Node | None = None

    @property
    def name(self) -> str:
        """stages.0.layer3.2: what the names of its layers have in common."""
        return ".".join(p[0] for p in zip(*(layer.split(".") for layer in self.layers), strict=False) if len(set(p)) == 1)


class Stage(NamedTuple):
    """The units of a stage and its head, in order, and what the stage hands on."""

    units: tuple[Unit, ...]
    state: frozenset[fx.Node]


def partition(net: Quantized, model: AnytimeModel, how: Reconstruction) -> tuple[fx.Node, list[Stage]]:
    """The name of the chain's input, and every stage's units; ``model`` is the traced float chain that ``net`` was made of.

    "layer": each layer by itself, with its BatchNorm, its ReLU and the quantizer behind them. "block": a link is cut wherever
    everything goes through one tensor, and what has no layer belongs to the layer before it: a residual block is one unit. A
    piece of more than six layers between two cuts (dense connections, states of several tensors) is learned layer by layer,
    each with what leads to it. A head's units follow those of its stage; the last of these that it reads knows the head.
    """
    plain = dict(links(model))
    alias: dict[fx.Node, Any] = {}
    entry: Any = None
    state: Any = None
    found: list[Stage] = []
    for path, link in links(net.model):
        if entry is None:
            entry = state = next(n for n in link.graph.nodes if n.op == "placeholder")
        is_head = path.startswith("heads")
        begin = entry if net.model.restarts and not is_head else state
        ops, result = _ops(link, plain.get(path), path, begin, alias)
        if not is_head:
            body, state = ops, result
            continue
        leaves = frozenset(_nodes(state))
        if how.unit == "layer":
            units = _units(_layerwise([*body, *ops], leaves, alone=True), {*leaves, result})
        else:
            units = _units([*_blocks(body, leaves), *_blocks(ops, {result})], {*leaves, result})
            read = {n for op in ops for n in op.reads} - {op.node for op in ops}
            feeds = [i for i, u in enumerate(units) if u.layers and not read.isdisjoint(u.gives)]
            if feeds and how.exit_weight:
                units[feeds[-1]] = _with_exit(units[feeds[-1]], ops, result)
        found.append(Stage(tuple(units), leaves))
    return entry, found


def _ops(link: fx.GraphModule, plain: Any, path: str, begin: Any, alias: dict[fx.Node, Any]) -> tuple[list[Op], Any]:
    """What a link computes from ``begin``, a node or a tuple of them, and what it returns."""
    same = [n.name for n in link.graph.nodes if not isinstance(module_of(link, n), FakeQuant)]
    if not isinstance(plain, fx.GraphModule) or same != [n.name for n in plain.graph.nodes]:
        raise Unsupported(f"{path} of the float chain is not what was quantized: give the traced chain that the net was made of")
    ops: list[Op] = []

    def meant(value: Any) -> Any:
        return fx.node.map_arg(value, lambda n: alias.get(n, n))

    for node in link.graph.nodes:
        module = module_of(link, node)
        if node.op == "placeholder":
            alias[node] = begin
        elif node.op == "get_attr":
            alias[node] = attrgetter(str(node.target))(link)
        elif node.target is getitem and not isinstance(meant(node.args[0]), fx.Node):
            alias[node] = meant(node.args[0])[node.args[1]]  # of a state of several tensors
        elif node.op != "output":
            rounded: Any = getattr(Tensor, str(node.target)) if node.op == "call_method" else node.target
            twin: Any = rounded
            if module is not None:
                rounded, twin = module, _same if isinstance(module, FakeQuant) else module_of(plain, node)
            args, kwargs = meant(node.args), meant(node.kwargs)
            layer = f"{path}.{node.target}" if isinstance(module, QuantizedLayer) else ""
            ops.append(Op(node, rounded, twin, args, kwargs, _nodes((args, kwargs)), layer))
    return ops, meant(link.graph.output_node().args[0])


def _same(x: Tensor) -> Tensor:
    return x


def _nodes(value: Any) -> tuple[fx.Node, ...]:
    """The nodes in a tree of arguments."""
    found: list[fx.Node] = []
    fx.node.map_arg(value, found.append)
    return tuple(dict.fromkeys(found))


def _blocks(ops: list[Op], state: Set[fx.Node]) -> list[list[Op]]:
    """Ops cut where one tensor is all that is read later, every run with a layer or more."""
    last = {n: i for i, op in enumerate(ops) for n in op.reads} | dict.fromkeys(state, len(ops))
    unpacked = {n for op in ops if op.node.target is getitem for n in op.reads}  # a tuple, perhaps
    live = set(last) - {op.node for op in ops}
    runs: list[list[Op]] = [[]]
    piece: list[Op] = []
    for i, op in enumerate(ops):
        piece.append(op)
        live = {n for n in {*live, op.node} if last.get(n, -1) > i}
        if i + 1 == len(ops) or (len(live) == 1 and not live & unpacked):
            if _n_layers(piece) and _n_layers(runs[-1]):
                runs.append([])
            runs[-1] += piece
            piece = []
    return [r for run in runs for r in ([run] if _n_layers(run) <= MOST_LAYERS else _layerwise(run, state, alone=False))]


def _layerwise(ops: list[Op], state: Set[fx.Node], alone: bool) -> list[list[Op]]:
    """Ops cut behind each layer, its BatchNorm, its ReLU and their quantizer; ``alone``: before it too."""
    readers: dict[fx.Node, list[Op]] = {}
    for op in ops:
        for n in op.reads:
            readers.setdefault(n, []).append(op)
    runs: list[list[Op]] = []
    run: list[Op] = []
    taken: set[fx.Node] = set()
    for op in ops:
        if op.node in taken:
            continue
        if not op.layer:
            run.append(op)
            continue
        fused = [op]
        while len(after := readers.get(fused[-1].node, [])) == 1 and fused[-1].node not in state and _fuses(after[0]):
            fused += after
        taken |= {o.node for o in fused}
        runs += [r for r in (run, fused) if r] if alone else [run + fused]
        run = []
    if run and (alone or not runs):
        runs.append(run)
    else:
        runs[-1] += run
    return runs


def _fuses(op: Op) -> bool:
    return isinstance(op.rounded, FakeQuant | nn.BatchNorm2d) or is_relu(op.node.graph.owning_module, op.node)  # type: ignore[arg-type]


def _n_layers(ops: Iterable[Op]) -> int:
    return sum(bool(op.layer) for op in ops)


def _units(runs: list[list[Op]], later: Set[fx.Node]) -> list[Unit]:
    units: list[Unit] = []
    for run in reversed([r for r in runs if r]):
        own = [op.node for op in run]
        reads = dict.fromkeys(n for op in run for n in op.reads if n not in own)
        layers = tuple(op.layer for op in run if op.layer)
        units.append(Unit(tuple(run), layers, tuple(reads), tuple(n for n in own if n in later)))
        later = later | reads.keys()
    return units[::-1]


def _with_exit(unit: Unit, head: list[Op], logits: fx.Node) -> Unit:
    own = {op.node for op in (*unit.ops, *head)}
    reads = dict.fromkeys((*unit.reads, *(n for op in head for n in op.reads if n not in own)))
    return unit._replace(reads=tuple(reads), head=tuple(head), logits=logits)


def reconstruct(
    net: Quantized,
    model: AnytimeModel,
    x: Tensor,
    how: Reconstruction,
    seed: int,
    reached: Tensor | None = None,
    progress: Progress = lambda what, done, total: None,
) -> list[Learned]:
    """Learn how a calibrated net rounds, unit by unit from front to back, and settle it; grids of weights stay.

    ``model``: the traced float chain that it was made of. x [N, C, H, W]: the calibration images. ``reached`` [N]: the last
    stage that each enters, -1 for none; a unit learns from those that reach its stage. A unit's inputs come from what is
    already rounded before it, or are float where dropped; its targets are what it gives in float, on float inputs. Its loss
    is the squared error summed over channels, the mean over everything else (BRECQ's), plus ``penalty`` times
    AdaRoundWeight.undecided. Deterministic for a seed, a machine and a number of threads; draws from no generator but its own.

    The unit that a head reads is learned with that head: to the error at its output is added that of the logits which the
    float head makes of it, weighed so that equal relative errors count 1 : ``exit_weight``, that is, by it times the targets'
    mean square at the output over that at the logits, both summed over channels. Then the head's own units learn, on what is
    rounded before them. This form is this project's: where block and head learn at once, both rounded, the head decides its
    roundings while the block's still move, and early exits gain less (benchmarks/reconstruct.py says how much). Unit
    "layer" knows no such thing.
    Source: Nagel et al., ICML 2020, arXiv:2004.10568 (AdaRound); Li, Gong, Tan et al., ICLR 2021, arXiv:2102.05426 (BRECQ,
    section 3); Wei et al., ICLR 2022, arXiv:2203.05740 (QDrop); facts from the code of BRECQ, QDrop and MQBench. Deviations:
    plain squared error, not weighed by the Fisher information, as in all three codes' defaults; a unit's output is compared
    behind its quantizer, for AdaRound too, as in MQBench; the first layer learns like any other, at its edge bits (BRECQ
    leaves it rounded to nearest); with ``drop`` 0 activations are rounded while weights learn, where BRECQ learns steps
    afterwards.
    """
    net.check_coverage()
    if len(x) == 0:
        raise Unsupported("reconstruction has no samples: give the data set a calib part")
    net.model.eval()
    entry, plan = partition(net, model, how)
    generator = torch.Generator().manual_seed(seed)
    settled: set[nn.Module] = set()
    report: list[Learned] = []
    total = sum(bool(unit.layers) for stage in plan for unit in stage.units) * how.iterations
    rounded: Values = {entry: _channels_last(x)}
    floats = rounded

    def tell(n: int) -> None:
        progress("reconstruct", len(report) * how.iterations + n, total)

    for k, stage in enumerate(plan):
        if reached is not None:
            here = (reached >= k).nonzero().flatten()
            if len(here) == 0:
                raise Unsupported(f"no calibration image reaches stage {k}: give more of them, or learn from all")
            reached = reached[here]
            floats = {n: _take(v, here) for n, v in floats.items()}
            rounded = {n: floats[n] if n is entry else _take(v, here) for n, v in rounded.items()}
        for i, unit in enumerate(stage.units):
            start = perf_counter()
            targets, given = _sweep(unit, floats, rounds=False), _sweep(unit, rounded, rounds=True)
            if unit.layers:
                weigh = _weights(unit, targets, how.exit_weight)
                before = float(_loss(given, targets, weigh))
                _learn(unit, (rounded, floats, targets), weigh, how, generator, settled, tell)
                given = _sweep(unit, rounded, rounds=True)
                after = float(_loss(given, targets, weigh))
                if not math.isfinite(after):
                    raise Diverged(f"reconstruction of {unit.name} met NaN or infinity: look at the images, or lower the rates")
                n, seconds = len(given[unit.gives[0]]), perf_counter() - start
                report.append(Learned(unit.name, unit.layers, n, how.iterations, seconds, before, after))
            needed = {n for u in stage.units[i + 1 :] for n in u.reads} | ({entry} if net.model.restarts else stage.state)
            rounded, floats = ({n: v for n, v in have.items() if n in needed} for have in (rounded | given, floats | targets))
    return report


def _learn(
    unit: Unit, caches: tuple[Values, Values, Values], weigh: dict[fx.Node, float], how: Reconstruction,
    generator: torch.Generator, settled: set[nn.Module], tell: Callable[[int], None],
) -> None:  # fmt: skip
    """Learn and settle one unit; what an earlier one settled (a grid that tensors share, a layer called twice) stays."""
    rounded, floats, targets = caches
    modules = dict.fromkeys(op.rounded for op in unit.ops if isinstance(op.rounded, FakeQuant | QuantizedLayer))
    weights: list[AdaRoundWeight] = []
    steps: list[nn.Parameter] = []
    for m in modules:
        if isinstance(m, FakeQuant):
            m.learner = DropStep(m, how.drop, generator, how.learn_steps and m not in settled)
            steps += [m.learner.step] if m.learner.step.requires_grad else []
        elif m not in settled:
            m.learner = AdaRoundWeight(m)
            weights.append(m.learner)
    params = [*(w.v for w in weights), *steps]
    groups = [{"params": params[: len(weights)], "lr": how.travel / max(how.iterations, 1)}, {"params": steps, "lr": how.step_lr}]
    optimizer = torch.optim.Adam(groups, fused=True)
    n = len(targets[unit.gives[0]])
    for i in range(how.iterations if params else 0):
        rows = torch.randperm(n, generator=generator)[: how.batch]
        values: Values = {}
        for node in unit.reads:
            values[node] = _take(rounded[node], rows)
            if how.drop and rounded[node] is not floats[node]:
                keep = kept(values[node], how.drop, generator)
                values[node] = torch.lerp(_take(floats[node], rows), values[node], keep)
        _run(unit, values, rounds=True)
        loss = _loss(values, {node: _take(t, rows) for node, t in targets.items()}, weigh)
        late = (i / how.iterations - WARM_UP) / (1 - WARM_UP)
        if late >= 0:
            for w in weights:
                loss = loss + how.penalty * w.undecided(BETA[0] + (BETA[1] - BETA[0]) * late)
        optimizer.param_groups[1]["lr"] = how.step_lr * (1 + math.cos(math.pi * i / how.iterations)) / 2
        optimizer.zero_grad()
        loss.backward(inputs=params)  # type: ignore[no-untyped-call]  # biases and the like stay
        optimizer.step()
        for step in steps:
            step.data.clamp_(min=SMALLEST)
        tell(i + 1)
    for m in modules:
        m.settle()
    settled.update(modules)


def _weights(unit: Unit, targets: Values, exit_weight: float) -> dict[fx.Node, float]:
    """What the error at each of its outputs counts."""
    power = {n: float(t.square().mean()) * _channels(t) for n, t in targets.items()}
    weigh = dict.fromkeys(unit.gives, 1.0)
    if unit.logits is not None:
        weigh[unit.logits] = exit_weight * sum(power[n] for n in unit.gives) / max(power[unit.logits], SMALLEST)
    return weigh


def _loss(values: Values, targets: Values, weigh: dict[fx.Node, float]) -> Tensor:
    total = torch.zeros(())
    for n, t in targets.items():
        # Not mse_loss or mean: their gradients have another layout, which makes what is before them three times slower.
        error = _flat(values[n] - t)
        total = total + error.dot(error) * (_channels(t) * weigh[n] / len(error))
    return total


def _channels(t: Tensor) -> int:
    return t.shape[1] if t.ndim > 1 else 1


def _run(unit: Unit, values: Values, rounds: bool) -> None:
    """Compute what a unit gives from what it reads, and what its head makes of that."""
    for ops, rounded in ((unit.ops, rounds), (unit.head, False)):
        for op in ops:
            args, kwargs = fx.node.map_arg((op.args, op.kwargs), values.__getitem__)
            values[op.node] = (op.rounded if rounded else op.plain)(*args, **kwargs)


@torch.no_grad()
def _sweep(unit: Unit, cache: Values, rounds: bool) -> Values:
    """The same for all samples."""
    wanted = unit.gives if unit.logits is None else (*unit.gives, unit.logits)
    parts: dict[fx.Node, list[Tensor]] = {n: [] for n in wanted}
    for i in range(0, len(next(iter(cache.values()))), SWEEP):
        values = {n: cache[n][i : i + SWEEP] for n in unit.reads}
        _run(unit, values, rounds)
        for n, part in parts.items():
            part.append(values[n])
    return {n: _channels_last(torch.cat(part)) for n, part in parts.items()}


def _channels_last(t: Tensor) -> Tensor:
    """In the layout in which convolutions of few channels are two to three times faster."""
    return t.contiguous(memory_format=torch.channels_last if t.ndim == 4 else torch.contiguous_format)


def _flat(t: Tensor) -> Tensor:
    """As a vector, in the order of _channels_last."""
    return (t.permute(0, 2, 3, 1) if t.ndim == 4 else t).reshape(-1)


def _take(t: Tensor, rows: Tensor) -> Tensor:
    """Rows of what is laid out by _channels_last, in that layout."""
    return t.permute(0, 2, 3, 1).index_select(0, rows).permute(0, 3, 1, 2) if t.ndim == 4 else t.index_select(0, rows)
