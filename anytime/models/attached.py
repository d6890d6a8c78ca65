"""Exits on a network that has none, by the names of its nodes."""

from __future__ import annotations

import importlib
import inspect
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from anytime.axes import axes_of
from anytime.errors import AnytimeError, UsageError, first_line, near
from anytime.forms import as_modules
from anytime.model import AnytimeModel, ModelSpec


class _Tracer(fx.Tracer):
    """Remembers the node that each module returned last; leaves whole what acts by the training mode, and Swin's attention.

    Traced into, that is one function of its own, in which whoever looks for layers that multiply finds none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.returned: dict[str, fx.Node] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        leaf: bool = super().is_leaf_module(m, module_qualified_name)
        names = {kind.__name__ for kind in type(m).__mro__}  # torchvision may be absent
        return leaf or isinstance(m, nn.LocalResponseNorm) or not names.isdisjoint(("StochasticDepth", "ShiftedWindowAttention"))

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        out = super().call_module(m, forward, args, kwargs)
        if isinstance(out, fx.Proxy):
            self.returned[self.path_of_module(m)] = out.node
        return out


class _Shapes(fx.Interpreter):
    """Runs a graph and remembers the shape of what each node gave, or the name of its type when it is no tensor."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.of: dict[fx.Node, torch.Size | str] = {}

    def run_node(self, n: fx.Node) -> Any:
        out = super().run_node(n)
        self.of[n] = out.shape if isinstance(out, Tensor) else type(out).__name__
        return out


class _Tapped(nn.Module):
    """The state's first tensor: the value that an exit is attached to."""

    def forward(self, state: Any) -> Any:
        return state[0]


class _Pooled(nn.Module):
    """The mean over axes that are places in the image: tokens [B, T, C], maps [B, H, W, C] -> [B, C]."""

    def __init__(self, places: tuple[int, ...]) -> None:
        super().__init__()
        self.places = places

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(self.places)

    def extra_repr(self) -> str:
        return f"places={self.places}"


@dataclass(frozen=True)
class Attached(ModelSpec):
    """Exits on a classifier without any, which is cut into a chain behind the values named in ``at``.

    ``backbone``: a classifier of torchvision ("resnet152"), or "package.module:factory" for a network of your own that
    torch.fx can trace; the factory is called with ``num_classes``. ``at``: module paths ("layer2.0": what that module
    returns, the last time if it is called often) or names of torch.fx nodes, in any order; exits are numbered in the
    network's own. Each stage computes what its exit needs and no earlier one did; the state is the named value, or a
    tuple of it and of whatever else later stages read. An exit is global pooling and one linear layer on maps
    [B, C, H, W] or [B, H, W, C] (Swin, ConvNeXt inside its blocks), the mean over all tokens, the class token among them, and one
    linear layer on tokens [B, T, C] (ViT), one linear layer on features [B, C]; the last exit begins at the network's last layer
    that multiplies. Which axis holds the channels is followed from the image on; where that cannot be told the exit is refused.
    In-place operations are made out of place, and what the network does is that of its eval mode, except in modules
    (Dropout, BatchNorm, StochasticDepth). ``weights``: path of a state dict, loaded strictly before the cut; then
    ``trained_on`` must say what it has learned from: the digests of published training sets ("imagenet" will do for
    one that no data set here draws from). The recipe trains what was loaded on, with its exits; ``Static`` of it is taken as it is.
    Every chain is held against the network that it was cut from when it is built.
    Source: this project; node names as in torchvision's feature extraction.
    """

    backbone: str = "mobilenet_v2"
    at: tuple[str, ...] = ("features.3", "features.6", "features.13")
    weights: str = ""
    trained_on: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """The network's own name; exits are told apart by number, networks with others by the rows' variant."""
        name = self.backbone.rpartition(":")[2]
        return f"{name} from {Path(self.weights).name}" if self.weights else name

    def build(self, input_shape: tuple[int, ...], n_classes: int) -> AnytimeModel:
        if not self.at:
            raise UsageError(f"{self.backbone}: at names no node; name at least one, or use Static for a network without exits")
        net = self._backbone(n_classes)
        self._load(net)
        net.eval()
        x = torch.randn(2, *input_shape, generator=torch.Generator().manual_seed(0))
        logits = self._run(net, x, n_classes)
        tracer = _Tracer()
        shapes = self._trace(tracer, net, x)
        needed = _needed(tracer.graph.output_node())
        nodes = [n for n in tracer.graph.nodes if n in needed]
        model = self._cut(net, nodes, self._taps(tracer, nodes), shapes, n_classes)
        with torch.no_grad():
            gap = (model.eval()(x)[-1] - logits).abs().max()
            if gap > 1e-4 * logits.abs().max():
                raise UsageError(
                    f"{self.backbone} cut into a chain gives other logits: its forward has effects that torch.fx does not see, "
                    "such as in-place changes of a value that is read again; write them out of place"
                )
        model.trained_on, model.fresh_heads = frozenset(self.trained_on), True
        return model.train()

    def _backbone(self, n_classes: int) -> nn.Module:
        if ":" not in self.backbone:
            from anytime.dataset import torchvision  # finds it beside a CPU torch too

            models = torchvision().models
            known = models.list_models(module=models)
            if self.backbone not in known:
                raise UsageError(
                    f"{self.backbone!r} is no classifier of torchvision and no 'package.module:factory'; {_like(self.backbone, known)}"
                )
            return models.get_model(self.backbone, weights=None, num_classes=n_classes)  # type: ignore[no-any-return]
        path, _, name = self.backbone.partition(":")
        try:
            module = importlib.import_module(path)
        except Exception as error:  # a user's own code may raise anything, when it is imported too
            raise UsageError(
                f"backbone {self.backbone!r}: {path!r} cannot be imported ({first_line(error)}); run from its folder"
            ) from error
        if not callable(getattr(module, name, None)):
            known = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
            raise UsageError(f"backbone {self.backbone!r}: {path} has no factory {name!r}; {_like(name, known)}")
        try:
            net = getattr(module, name)(num_classes=n_classes)
        except Exception as error:
            raise UsageError(
                f"backbone {self.backbone!r}: the call with num_classes={n_classes} failed ({first_line(error)})"
            ) from error
        if not isinstance(net, nn.Module):
            raise UsageError(f"backbone {self.backbone!r}: it made a {type(net).__name__}, not a torch.nn.Module")
        return net

    def _load(self, net: nn.Module) -> None:
        if not self.weights:
            return
        if not self.trained_on:
            raise UsageError(
                f"{self.weights}: say by trained_on what these weights have learned from, so that no policy is fitted on it"
            )
        try:
            state = torch.load(Path(self.weights).expanduser(), map_location="cpu", weights_only=True)
        except FileNotFoundError as error:
            raise AnytimeError(
                f"there is no file {self.weights}: give the path of a torch state dict as weights, or none"
            ) from error
        except Exception as error:  # torch.load raises anything on a file that is no checkpoint
            raise UsageError(
                f"weights={self.weights!r} is no state dict that loads with weights_only=True ({first_line(error)})"
            ) from error
        if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
            raise UsageError(f"weights={self.weights!r} holds no state dict (names to tensors); save model.state_dict()")
        own = net.state_dict()
        wrong = {
            "missing": [k for k in own if k not in state],
            "unknown": [k for k in state if k not in own],
            "of another shape": [k for k in own if k in state and state[k].shape != own[k].shape],
        }
        if any(wrong.values()):
            said = "; ".join(f"{len(keys)} {what} ({_some(keys)})" for what, keys in wrong.items() if keys)
            raise UsageError(f"weights={self.weights!r} do not fit {self.backbone}: {said}")
        net.load_state_dict(state)

    def _run(self, net: nn.Module, x: Tensor, n_classes: int) -> Tensor:
        try:
            with torch.no_grad():
                out = net(x)
        except Exception as error:  # torch has no class of its own for a shape that does not fit
            raise UsageError(
                f"{self.backbone} cannot take inputs of {_by(x.shape)} ({first_line(error)}): "
                "choose a data set of another shape or another backbone"
            ) from error
        if not isinstance(out, Tensor) or out.shape != (2, n_classes):
            got = _by(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise UsageError(f"{self.backbone} gives {got} for each input, not {n_classes} logits: attach exits to a classifier")
        return out

    def _trace(self, tracer: _Tracer, net: nn.Module, x: Tensor) -> dict[fx.Node, torch.Size | str]:
        """Trace the network and run it on x; nothing works in place any more."""
        for m in net.modules():
            if hasattr(m, "inplace"):
                setattr(m, "inplace", False)  # noqa: B010  (torch's types do not know it)
        try:
            # Arguments behind the images stay what their defaults say.
            takes = inspect.signature(net.forward).parameters.values()
            fixed = {p.name: p.default for p in takes if isinstance(p.default, bool | int | float | str | None)}
            graph = tracer.trace(net, fixed or None)
            for node in graph.nodes:
                if node.op == "call_method" and node.target.endswith("_") and hasattr(Tensor, node.target[:-1]):
                    node.target = node.target[:-1]
                if node.kwargs.get("inplace"):
                    node.kwargs = {**node.kwargs, "inplace": False}
            shapes = _Shapes(fx.GraphModule(net, graph))
            with torch.no_grad():
                shapes.run(x)
            as_modules(net, graph, shapes.of)
            _without_idle_pools(tracer, shapes.of)
        except Exception as error:  # whatever the network's Python does with a proxy
            raise UsageError(
                f"{self.backbone} cannot be traced by torch.fx ({first_line(error)}): its forward must not depend on values"
            ) from error
        if sum(n.op == "placeholder" for n in _needed(graph.output_node())) > 1:
            raise UsageError(
                f"{self.backbone}: its forward takes more than one input; give a factory whose network takes images only"
            )
        return shapes.of

    def _taps(self, tracer: _Tracer, nodes: list[fx.Node]) -> list[fx.Node]:
        """The named nodes in order, then what the last layer reads."""
        order = {n: i for i, n in enumerate(nodes)}
        plain = {n.name: n for n in tracer.graph.nodes if n.op not in ("placeholder", "output")}
        named = tracer.returned | {name: n for name, n in plain.items() if name not in tracer.returned}
        layers = [
            n
            for n in nodes
            if n.op == "call_module" and isinstance(tracer.root.get_submodule(str(n.target)), nn.Conv2d | nn.Linear)
        ]
        end = layers[-1].all_input_nodes[0] if layers else nodes[-1].all_input_nodes[0]
        taps: dict[fx.Node, str] = {}
        for name in self.at:
            node = named.get(name)
            if node is None:
                raise UsageError(f"{self.backbone} has no module or node {name!r}; {_like(name, named)}")
            if node in taps:
                raise UsageError(f"{self.backbone}: {taps[node]!r} and {name!r} are the same value; one exit there is enough")
            if node not in order:
                raise UsageError(
                    f"{self.backbone}: {name!r} is not on the way to the output; attach exits to what the output needs"
                )
            if order[node] >= order[end]:
                raise UsageError(
                    f"{self.backbone}: nothing is left to compute between {name!r} and the last layer, "
                    f"which reads {end.name!r}; attach exits before that"
                )
            taps[node] = name
        return [*sorted(taps, key=order.__getitem__), end]

    def _cut(
        self, net: nn.Module, nodes: list[fx.Node], taps: list[fx.Node], shapes: dict[fx.Node, torch.Size | str], n_classes: int
    ) -> AnytimeModel:
        entering = [n for n in nodes if n.op == "placeholder"]
        done = set(entering)
        # What hangs on no sample (a parameter, the sigmoid of one) is no part of the state: whoever reads it computes it again.
        constant: set[fx.Node] = set()
        for n in nodes:
            if n.op != "placeholder" and constant.issuperset(n.all_input_nodes):
                constant.add(n)
        axes = axes_of(net, nodes, shapes)
        stages: list[nn.Module] = []
        heads: list[nn.Module] = []
        for tap in taps:
            needed = _needed(tap)
            part = [n for n in nodes if n in needed and n not in done]
            done.update(part)
            read = {a for n in nodes if n not in done for a in n.all_input_nodes if a not in constant}
            leaving = [tap, *(n for n in nodes if n in done and n in read and n is not tap)]
            for n in leaving:
                if isinstance(shapes[n], str):
                    raise UsageError(
                        f"{self.backbone}: the cut behind {tap.name!r} goes through {n.name!r}, a {shapes[n]} where only "
                        "tensors can be handed on; cut before or behind that block"
                    )
            if tap is not taps[-1]:
                heads.append(self._exit(tap.name, shapes[tap], axes.get(tap, ""), len(leaving) > 1, n_classes))
            for n in leaving:
                # Samples that leave are taken out by their place on the first axis: it is theirs, and two came in.
                if axes.get(n, "b")[0] != "b" or shapes[n][:1] != (2,):
                    raise UsageError(
                        f"{self.backbone}: the cut behind {tap.name!r} goes through {n.name!r}, whose first axis is not that of "
                        "the samples; build the network with batch_first=True, or cut before or behind that block"
                    )
            stages.append(_graph(net, part, entering, leaving))
            entering = leaving
        rest = [n for n in nodes if n not in done]
        heads.append(_graph(net, rest[:-1], entering, rest[-1].all_input_nodes))
        return AnytimeModel(stages, heads)

    def _exit(self, name: str, shape: Sequence[Any], axes: str, first: bool, n_classes: int) -> nn.Sequential:
        layers: list[nn.Module] = [_Tapped()] if first else []
        if len(shape) == 2:
            axes = "bc"
        elif axes == "bcss":
            layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        elif axes.count("b") == axes.count("c") == 1:
            layers.append(_Pooled(tuple(i for i, axis in enumerate(axes) if axis == "s")))
        else:
            raise UsageError(
                f"{self.backbone}: {name!r} gives {'x'.join(map(str, shape))} for 2 inputs, and which one axis of it holds the "
                "channels cannot be told; attach the exit to what the block around it gives: features C, maps CxHxW or HxWxC, "
                "or tokens TxC for each input"
            )
        return nn.Sequential(*layers, nn.Linear(shape[axes.index("c")], n_classes))


def _without_idle_pools(tracer: _Tracer, shapes: dict[fx.Node, torch.Size | str]) -> None:
    """Take out adaptive pooling to the very size that comes in (AlexNet, VGG at 224): it changes nothing, and has no form in ONNX."""
    for node in list(tracer.graph.nodes):
        idle = node.op == "call_module" and isinstance(tracer.root.get_submodule(str(node.target)), nn.AdaptiveAvgPool2d)
        if idle and shapes[node] == shapes[node.all_input_nodes[0]]:
            node.replace_all_uses_with(node.all_input_nodes[0])
            tracer.returned = {path: node.all_input_nodes[0] if n is node else n for path, n in tracer.returned.items()}
            tracer.graph.erase_node(node)


def _needed(node: fx.Node) -> set[fx.Node]:
    """The node and everything that it is computed from."""
    found, todo = {node}, [node]
    while todo:
        new = set(todo.pop().all_input_nodes) - found
        found |= new
        todo += new
    return found


def _graph(net: nn.Module, part: list[fx.Node], entering: list[fx.Node], leaving: list[fx.Node]) -> fx.GraphModule:
    """A part of the network as a module from state to state; a state of one value is no tuple."""
    graph = fx.Graph()
    state = graph.placeholder("state")
    place = {n: i for i, n in enumerate(entering)}
    copies = {entering[0]: state} if len(entering) == 1 else {}

    def copied(n: fx.Node) -> fx.Node:
        if n not in copies:
            copies[n] = graph.call_function(operator.getitem, (state, place[n])) if n in place else graph.node_copy(n, copied)
        return copies[n]

    for n in part:
        copied(n)
    out = tuple(map(copied, leaving))
    graph.output(out if len(out) > 1 else out[0])
    return fx.GraphModule(net, graph, type(net).__name__)


def _by(shape: Sequence[Any]) -> str:
    return "x".join(map(str, shape[1:]))


def _some(keys: Iterable[str], n: int = 3) -> str:
    every = list(keys)
    return ", ".join(every[:n]) + (", ..." if len(every) > n else "")


def _like(name: str, names: Iterable[str]) -> str:
    """The near misses, or a few names: a network has hundreds."""
    said = near(name, names)
    return said if said.startswith("did") else f"there is {_some(names, 8)}"
