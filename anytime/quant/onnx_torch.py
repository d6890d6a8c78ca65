"""Operations without a form in onnx_ops, as torch's own exporter writes them, each by itself and each tried."""

from __future__ import annotations

import io
import warnings
from contextlib import redirect_stdout
from operator import getitem
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, fx, nn
from torch.onnx._internal.torchscript_exporter import symbolic_opset14
from torch.utils import _pytree as pytree

from anytime.errors import Unsupported, first_line
from anytime.quant.fake import QuantizedLayer
from anytime.quant.nodes import module_of, name_of, passes
from anytime.quant.onnx_writer import OPSET, Value, Writer

BATCHES = (2, 3)  # shapes are noted at both: an axis that differs is one that the batch is in
ATTENTION = "aten::scaled_dot_product_attention"  # the exporter writes it from opset 14 on, in operators that 13 has too
TOLERANCE = 1e-4  # of the largest value that torch gives, or of 1


def exported(w: Writer, link: fx.GraphModule, node: fx.Node, name: str, values: dict[fx.Node, Any]) -> Any:
    """What a node makes of the tensors in ``values``, nested as torch gives it; what it reads of shapes is written with it.

    The piece is written at one batch size and run by ONNX Runtime at another: Unsupported, by the node's name, where the
    exporter has no form for it, and where the form that it has answers otherwise than torch (a pooling window that starts
    in the padding, a shape that was taken for a constant).
    """
    if isinstance(module_of(link, node), QuantizedLayer):
        raise Unsupported(f"{name}: {_said(link, node)} has no ONNX form in integers, as it is set here")
    piece, inputs = _cut_out(link, node)
    if not inputs:  # made of parameters alone
        return pytree.tree_map_only(Tensor, lambda t: Value(w.constant(name, t.detach().numpy())), piece())
    names = [f"in_{i}" for i in range(len(inputs))]
    example, other = ([_sample(n, batch) for n in inputs] for batch in BATCHES)
    try:
        proto = _write(piece, example, dict(zip(names, map(batch_axes, inputs), strict=True)))
        wrong = _differs(piece, proto, names, other)
    except Exception as error:  # the exporter's own errors have many classes
        raise Unsupported(f"{name}: no ONNX form is known for {_said(link, node)} ({first_line(error)})") from error
    if wrong:
        raise Unsupported(
            f"{name}: the ONNX form of {_said(link, node)} answers otherwise than torch ({wrong}); write it differently"
        )
    at = {given: values[n].name for given, n in zip(names, inputs, strict=True)}
    for tensor in proto.graph.initializer:
        at[tensor.name] = w.constant(f"{name}/{tensor.name}", numpy_helper.to_array(tensor))
    for i, op in enumerate(proto.graph.node):
        op.name = f"{name}/{op.op_type}_{i}"
        at |= {out: f"{name}/{out}" for out in op.output if out}
        for field in (op.input, op.output):
            field[:] = [at.get(tensor, tensor) for tensor in field]
        w.nodes.append(op)
    made = iter(proto.graph.output)
    moved = values[inputs[0]] if passes(link, node) or node.target is getitem else None

    def value(_: Tensor) -> Value:
        out = at[next(made).name]
        return Value(out) if moved is None else w.keep(out, moved, out)

    return pytree.tree_map_only(Tensor, value, _run(piece, example))


def batch_axes(node: fx.Node) -> list[int]:
    """Axes of what a node makes that grow with the batch."""
    one, other = (node.meta["shapes"][batch] for batch in BATCHES)
    return [axis for axis, (a, b) in enumerate(zip(one, other, strict=True)) if a != b]


def is_tensor(node: fx.Node) -> bool:
    """Whether a node makes tensors: shapes and what is computed of them are numbers."""
    return "shapes" in node.meta


class _Plain(nn.Module):
    """A module without a graph: the exporter takes what has one for TorchScript."""

    def __init__(self, piece: nn.Module) -> None:
        super().__init__()
        self.piece = piece

    def forward(self, *x: Tensor) -> Any:
        return self.piece(*x)


def _cut_out(link: fx.GraphModule, node: fx.Node) -> tuple[fx.GraphModule, list[fx.Node]]:
    """A module of this node, the parameters, numbers and tuples that it reads; and the tensors that are its inputs."""
    taken, inputs, ahead = {node}, [], list(node.all_input_nodes)
    while ahead:
        n = ahead.pop(0)
        if n in taken or n in inputs:
            continue
        if n.op == "get_attr" or n.meta.get("shapes", {}).get(BATCHES[0]) is None:  # several tensors are made again
            taken.add(n)
            ahead += n.all_input_nodes
        else:
            inputs.append(n)
    graph = fx.Graph()
    copies = {n: graph.placeholder(n.name) for n in inputs}
    for n in link.graph.nodes:
        if n in taken and n.target is getattr and n.args[1] == "mT":  # of which the exporter has not heard
            copies[n] = graph.call_method("transpose", (copies[n.args[0]], -2, -1))
        elif n in taken:
            copies[n] = graph.node_copy(n, copies.__getitem__)
    graph.output(copies[node])
    return fx.GraphModule(link, graph).eval(), inputs


def _sample(node: fx.Node, batch: int) -> Tensor:
    shape, dtype = node.meta["shapes"][batch], node.meta["tensor_meta"].dtype
    if not dtype.is_floating_point:
        return torch.zeros(shape, dtype=dtype)
    return torch.rand(shape, generator=torch.Generator().manual_seed(batch)) * 8 - 4  # both sides of what clips at 3 or 0


def _write(piece: fx.GraphModule, example: list[Tensor], axes: dict[str, list[int]]) -> onnx.ModelProto:
    """By the exporter that traces: opset 13, and nothing else to install. Torch, which deprecates it, is pinned."""
    body: Any = io.BytesIO()  # annotated as a path, documented as a file
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one operator that ONNX does not have
    torch.onnx.register_custom_op_symbolic(ATTENTION, symbolic_opset14.scaled_dot_product_attention, OPSET)  # type: ignore[attr-defined]
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):  # of a failure it prints all that it has traced
            warnings.simplefilter("ignore")
            torch.onnx.export(
                _Plain(piece).eval(), tuple(example), body, dynamo=False, opset_version=OPSET, input_names=list(axes),
                dynamic_axes={name: {axis: f"{name}_{axis}" for axis in found} for name, found in axes.items()},
            )  # fmt: skip
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        torch.onnx.unregister_custom_op_symbolic(ATTENTION, OPSET)  # type: ignore[attr-defined]
    proto = onnx.load_from_string(body.getvalue())
    for op in proto.graph.node:
        if op.domain or any(a.HasField("g") for a in op.attribute):
            raise Unsupported(f"{op.op_type} is no plain operator of opset {OPSET}")
    return proto


def _differs(piece: fx.GraphModule, proto: onnx.ModelProto, names: list[str], x: list[Tensor]) -> str:
    """How ONNX Runtime's answers differ from torch's; "" where they do not."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    read = {i.name for i in session.get_inputs()}
    got = session.run(None, {name: t.numpy() for name, t in zip(names, x, strict=True) if name in read})
    for g, t in zip(got, (t for t in pytree.tree_leaves(_run(piece, x)) if isinstance(t, Tensor)), strict=True):
        want = t.detach().numpy()
        if g.shape != want.shape:
            return f"shape {g.shape}, not {want.shape}"
        error = np.abs(np.nan_to_num(g) - np.nan_to_num(want)).max(initial=0)
        if (np.isnan(g) != np.isnan(want)).any() or error > TOLERANCE * max(1, np.abs(want).max(initial=0)):
            return f"by {error:.2g}"
    return ""


def _run(piece: fx.GraphModule, x: list[Tensor]) -> Any:
    with torch.inference_mode():
        return piece(*x)


def _said(link: fx.GraphModule, node: fx.Node) -> str:
    return type(link.get_submodule(str(node.target))).__name__ if node.op == "call_module" else name_of(node)
