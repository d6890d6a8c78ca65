"""Anytime networks under compression: one experiment, one honest table.

By name are here: what an experiment on one's own network and images is written with, and what takes the network out of it.
Everything else is imported from its own file.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anytime.backends.float import Float32 as Float32
    from anytime.backends.onnxruntime import OnnxRuntime as OnnxRuntime
    from anytime.backends.ptq import PTQ as PTQ
    from anytime.backends.qat import QAT as QAT
    from anytime.boards.host import Host as Host
    from anytime.bundle import load as load
    from anytime.config import Experiment as Experiment
    from anytime.config import Suite as Suite
    from anytime.datasets.image_folder import ImageFolder as ImageFolder
    from anytime.datasets.npz import Npz as Npz
    from anytime.export import save as save
    from anytime.models.attached import Attached as Attached
    from anytime.models.static import Static as Static
    from anytime.policies.confidence import Entropy as Entropy
    from anytime.policies.confidence import MaxProb as MaxProb
    from anytime.run import Runner as Runner
    from anytime.train import Recipe as Recipe

__version__ = "0.1.0"

_FILES = {
    **dict.fromkeys(("Experiment", "Suite"), "config"), "Recipe": "train", "Runner": "run", "save": "export", "load": "bundle",
    "ImageFolder": "datasets.image_folder", "Npz": "datasets.npz", "Attached": "models.attached", "Static": "models.static",
    "Float32": "backends.float", "PTQ": "backends.ptq", "QAT": "backends.qat", "OnnxRuntime": "backends.onnxruntime",
    **dict.fromkeys(("Entropy", "MaxProb"), "policies.confidence"), "Host": "boards.host",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Imported when it is first asked for: a table needs no engine, and a bundle no torch."""
    if name in _FILES:
        return getattr(import_module(f"anytime.{_FILES[name]}"), name)
    raise AttributeError(f"module 'anytime' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_FILES]
