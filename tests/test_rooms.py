"""Who may import whom. A room is a file of ``anytime/`` or one of its folders."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "anytime"
EVERYTHING = {p.stem for p in ROOT.iterdir() if p.suffix == ".py" or (p.is_dir() and not p.name.startswith("_"))} - {"__init__"}

MAY = {  # room -> rooms that it may import; errors may be imported by every one but stops
    "errors": "", "stops": "", "cpu": "", "layers": "", "forms": "", "axes": "", "machine": "cpu",
    "spec": "", "metrics": "", "record": "",
    "progress": "", "augment": "dataset", "osgd": "",
    "gather": "metrics record", "decided": "decisions metrics gather",
    "steps": "gather", "paired": "metrics gather", "timed": "gather", "rivals": "gather paired timed",
    "rows": "metrics record gather decided paired steps timed rivals", "figures": "metrics record decided",
    "tables": "metrics gather rows decided conversions", "report": "rows styles tables",
    "page": "files record gather decided metrics paired rows tables",
    "styles": "", "conversions": "rows", "compare": "metrics record gather rows timed styles",
    "model": "spec", "dataset": "spec metrics", "policy": "spec metrics stops", "threshold": "metrics policy stops",
    "losses": "spec model",
    "files": "", "workers": "", "forced": "files record", "weights": "model files",
    "train": "spec model dataset augment losses osgd files weights cpu",
    "quant": "model metrics layers", "rounding": "model train quant",
    "backend": "spec metrics model dataset train quant",
    "engine": "cpu", "onnx_net": "metrics model quant backend engine", "peer": "spec model dataset quant backend",
    "tf": "", "keras_layers": "layers quant tf", "keras_chain": "model quant keras_layers", "tflite_net": "metrics model backend tf",
    "cost": "metrics model quant backend", "combiners": "metrics", "ensemble_net": "metrics model backend",
    "ensemble": "metrics model dataset train backend cost combiners ensemble_net",
    "reach": "spec policy metrics dataset model backend cost",
    "board": "spec metrics backend policy stops",
    "config": "spec model dataset train backend policy board",
    "models": "spec model layers forms axes", "datasets": "spec metrics dataset augment", "policies": "spec metrics stops policy threshold",
    "backends": "spec metrics model dataset losses train quant rounding backend cpu onnx_net peer cost reach combiners ensemble "
    "tf keras_layers keras_chain tflite_net",
    "boards": "spec metrics backend board policy stops cpu execute nvidia", "nvidia": "",
    "find": "spec config",
    "facts": "spec config model dataset backend board policy record",
    "contents": "spec model",
    "probe": "model dataset quant",
    "workshop": "spec metrics model models dataset files train quant backend board config cost contents probe",
    "scoring": "metrics record dataset backend board cost decisions",
    "decisions": "metrics",
    "arms": "spec metrics record policy cost config facts decisions scoring workshop",
    "run": "scoring spec metrics record model dataset files train backend board config policy facts pace arms workshop "
    "machine forced workers",
    "zoo": "machine spec record files config facts weights workshop",
    "pace": "record facts",
    "listing": "spec record config facts forced pace progress",
    "stopwatch": "metrics policy backend cpu execute",
    "execute": "metrics policy", "bundle": "metrics stops policy policies engine execute cpu", "onnx_if": "",
    "cells": "spec config facts find backends models",
    "export": "cells machine spec metrics policy board files train config facts find arms workshop backends onnx_net onnx_if bundle engine",
    "measure": "board boards config find run train workers",
    "__main__": " ".join(EVERYTHING - {"__main__"}),
}  # fmt: skip

HEAVY = {  # vendor -> rooms that may import it at the top of a file; the others only inside a method
    "torch": {
        *("model", "layers", "forms", "axes", "dataset", "augment", "losses", "weights", "train", "quant", "rounding", "backend", "cost"),
        *("combiners", "ensemble_net", "ensemble"),
        *("models", "datasets", "backends", "boards"),
        *("workshop", "probe", "scoring", "run", "machine", "osgd", "onnx_net", "peer", "tf", "keras_layers", "keras_chain", "tflite_net"),
    },
    "pandas": {"gather", "rows", "tables", "report", "figures", "page"},
    "matplotlib": {"figures"},
    "onnx": {"quant", "onnx_if"},
    "rich": {"progress"},
    **dict.fromkeys(("bokeh", "PIL"), set()),
    **dict.fromkeys(("onnxruntime", "torchvision", "sklearn", "ptflops", "openvino", "nncf", "torchao", "asyncssh"), set()),
    **dict.fromkeys(("tensorrt", "tensorflow", "qkeras"), set()),
}  # fmt: skip


def imports_at_the_top(path):
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def wrong_imports(path, root=ROOT):
    """Sentences about what a file imports and may not."""
    parts = path.relative_to(root).with_suffix("").parts
    room, wrong = parts[0], []
    if room == "__init__":
        return []
    for name in imports_at_the_top(path):
        head, *rest = name.split(".")
        if head == "anytime":
            other = rest[0]
            keeper_of_keeper = room == other and len(parts) > 1 and room not in ("quant", "page") and parts[1] != rest[1]
            allowed = (
                other in MAY.get(room, "").split()
                or other == room
                or other not in EVERYTHING
                or (other == "errors" and room != "stops")
            )
            if keeper_of_keeper:
                wrong.append(f"{path.name}: a keeper may not import the keeper {name}")
            elif not allowed:
                wrong.append(f"{path.name}: {room} may not import {name}")
        elif head in HEAVY and room not in HEAVY[head]:
            wrong.append(f"{path.name}: {room} may not import {head} at the top")
    return wrong


def test_every_room_has_its_rules():
    assert set(MAY) == EVERYTHING


def test_nobody_imports_what_it_may_not():
    wrong = [sentence for path in sorted(ROOT.rglob("*.py")) for sentence in wrong_imports(path)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "file, text, said",
    [
        ("report.py", "import torch", "report may not import torch"),
        ("policies/mine.py", "from anytime.train import Recipe", "policies may not import anytime.train"),
        ("backends/mine.py", "from anytime.backends.ptq import PTQ", "a keeper may not import the keeper"),
        ("stops.py", "from anytime.errors import near", "stops may not import anytime.errors"),
        ("backends/mine.py", "import onnxruntime", "backends may not import onnxruntime at the top"),
    ],
)
def test_a_wrong_import_is_caught(tmp_path, file, text, said):
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    assert any(said in sentence for sentence in wrong_imports(path, tmp_path))


def test_report_needs_no_torch():
    """A table can be made on a laptop without torch: nothing that report imports imports it."""
    import subprocess
    import sys

    code = "import sys; sys.modules['torch'] = None; import anytime.report, anytime.__main__; print('fine')"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "fine\n"
