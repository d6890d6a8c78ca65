"""TensorFlow with Keras 2 behind it: whether it is here, and the module. It is imported inside a function only."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from typing import Any

import torch

from anytime.errors import AnytimeError, install

INSTALL = install("qkeras")


def missing(*packages: str) -> str | None:
    """Why TensorFlow and ``packages`` cannot be imported here, with the command that mends it; None when they can."""
    absent = [name for name in ("tensorflow", "tf_keras", *packages) if find_spec(name) is None]
    if absent:
        return f"{', '.join(absent)} is not installed: {INSTALL}"
    if "qkeras" in packages and _overwritten():
        return (
            "HGQ2 was installed over QKeras' package qkeras: "
            "pip uninstall -y HGQ2 && pip install --force-reinstall --no-deps qkeras==0.9.0"
        )
    return None


def _overwritten() -> bool:
    """Whether HGQ2, which ships a package ``qkeras`` of its own, is here or has left a hole when it went."""
    spec = find_spec("qkeras")
    if spec is None or spec.origin is None:
        return True
    try:
        distribution("HGQ2")
    except PackageNotFoundError:
        return False
    return True


def tensorflow() -> Any:
    """The module, with Keras 2 behind ``tf.keras``: QKeras knows no other. It takes torch's number of threads at first use."""
    os.environ["TF_USE_LEGACY_KERAS"] = "1"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow as tf

    if not tf.keras.layers.Layer.__module__.startswith("tf_keras"):
        raise AnytimeError(
            "TensorFlow was imported with Keras 3 before this: set TF_USE_LEGACY_KERAS=1 in the environment and start again"
        )
    try:
        tf.config.threading.set_intra_op_parallelism_threads(torch.get_num_threads())
        tf.config.threading.set_inter_op_parallelism_threads(1)
    except RuntimeError:
        pass  # it has run something already and keeps its threads
    return tf
