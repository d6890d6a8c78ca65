"""The user's object: a folder with a manifest and one ONNX per segment, and what runs it. numpy and an engine; never torch."""

from __future__ import annotations

import hashlib
import importlib
import json
import pkgutil
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from anytime import cpu, policies, stops
from anytime.engine import Graph, OnnxRuntimeGraph, OpenVINOGraph
from anytime.errors import AnytimeError, CorruptFile, UsageError, first_line, near
from anytime.execute import Executor
from anytime.metrics import Floats, Ints
from anytime.policies.fixed import Fixed
from anytime.policy import Policy

SCHEMA = 1
KIND = "anytime bundle"
Engine = Literal["onnxruntime", "openvino"]

# ONNX writes the path of external data as the key "location"; bundles hold their weights inside. Protobuf's readers take its tag
# and its length in more bytes than they need, too.
EXTERNAL = re.compile(rb"(?:\n|\x8a\x80*\x00)(?:\x08|\x88\x80*\x00)location")


class Answer(NamedTuple):
    """What the network says of one image.

    ``confidence``: the largest softmax probability, in (0, 1]. ``exit`` counts from 0. ``ms``: wall time from the image to this
    answer, preprocessing and label included. ``place``: the image's among those that were handed over, from 0.
    """

    label: str
    confidence: float
    exit: int
    ms: float
    place: int = 0


class Part(NamedTuple):
    """A segment of the bundle, and how to run it."""

    first: int
    stop: int
    head: int
    run: Graph


def load(folder: Path | str, *, policy: Policy | None = None, engine: Engine | None = None, threads: int = 1) -> Bundle:
    """Read a bundle that ``python -m anytime export`` wrote, check every file, and make it ready to run.

    ``policy``: any fitted one, ``Fixed(k)`` for a plain exit; default: the bundle's own, or its last exit. ``engine``: default: the
    one that the bundle was fitted and scored under. ``threads`` 0: every core. UsageError where the folder is none or asks for
    what is not there, CorruptFile for a file that is missing or not as it was written. RuntimeWarning where the engine gives
    other answers on this CPU.
    """
    folder = Path(folder).expanduser()
    manifest = read_manifest(folder)
    own: Engine = manifest.get("engine", "onnxruntime")  # manifests of before do not say
    engine = engine or own
    if engine not in get_args(Engine):
        raise UsageError(f"there is no engine {engine!r}; {near(engine, get_args(Engine))}")
    if not (policy is None or isinstance(policy, Policy)):
        raise UsageError(
            f"policy={policy!r} is no policy: give a fitted one, as Fixed(0); by its name a policy is chosen where the bundle is written"
        )
    if threads < 0:
        raise UsageError(f"threads={threads} is no number of threads: give 1 or more, or 0 for every core")
    made = manifest["provenance"]
    overflows = manifest.get("overflows", any(bits[0] == 8 for bits in made["bits"].values()))  # manifests of before do not say
    saturates = engine == "openvino" and cpu.saturates() and overflows
    if saturates != ("saturates" in made["net"]):
        warnings.warn(
            "this CPU has no VNNI, and OpenVINO's INT8 saturates there: other answers than were exported come out; "
            "use engine='onnxruntime', or export weights of 7 bits"
            if saturates
            else "this bundle was fitted and scored where OpenVINO's INT8 saturates, on a CPU without VNNI, and here it does not: other "
            "answers than were exported come out; export it on a CPU like this one, or weights of 7 bits",
            RuntimeWarning,
            stacklevel=2,
        )
    biases, parts = manifest["float_biases"], []
    for said in manifest["segments"]:
        body = _checked(folder, said)
        try:
            run: Graph = OpenVINOGraph(body, threads) if engine == "openvino" else OnnxRuntimeGraph(body, threads, biases)
            run([np.zeros([1, *tensor["shape"][1:]], tensor["dtype"]) for tensor in said["inputs"]])  # engines wait for the first
        except ImportError as error:
            other = f", or pass engine='onnxruntime'; accuracy was measured under {own}" if engine == "openvino" else ""
            raise UsageError(f"{engine} is not installed here: pip install {engine}{other}") from error
        except AnytimeError:
            raise
        except Exception as error:  # engines share no base class
            raise AnytimeError(f"{engine} cannot take {folder / said['file']}: {first_line(error)}") from error
        parts.append(Part(said["first"], said["stop"], said["head"], run))
    if policy is None:
        policy = Fixed() if manifest["policy"] is None else policy_of(manifest["policy"]["spec"])
    return Bundle(manifest, policy, parts)


class Bundle:
    """A network with its policy, its preprocessing and its class names, loaded.

    Images are [H, W, C], or [H, W] where C is 1, as PIL and numpy give them: uint8 from 0 to 255 or float from 0 to 1.
    """

    def __init__(self, manifest: dict[str, Any], policy: Policy, parts: Sequence[Part]) -> None:
        self.manifest, self.policy, self.parts = manifest, policy, tuple(parts)
        self.n_exits: int = manifest["n_exits"]
        self.classes: tuple[str, ...] = tuple(manifest["classes"])
        self._one = Executor(self, policy, batch=1)
        for n in range(1, len(self._one.used)):
            policy.stop(np.zeros((n, 1, len(self.classes)), np.float32))  # one that is not fitted says so here

    def __call__(self, image: Any) -> Answer:
        """Answer one image."""
        started = perf_counter()
        exit, logits = self._one.one(self.prepared([image]))
        return self._said(np.array([0]), np.array([exit]), logits, [started])[0]

    def batch(self, images: Any, batch: int = 64) -> list[Answer]:
        """Answer many images [N, H, W, C], or a sequence of them, ``batch`` at a time; in their order.

        An AnytimeError on the way, a bad image's too, carries the answers that were there in its field ``answered``.
        """
        done: list[Answer] = []
        try:
            for answer in self.stream(images, batch):
                done.append(answer)
        except AnytimeError as error:
            error.answered = sorted(done, key=lambda a: a.place)  # type: ignore[attr-defined]
            raise
        return sorted(done, key=lambda a: a.place)

    def stream(self, images: Iterable[Any], batch: int = 1) -> Iterator[Answer]:
        """Answer images as they come, each as soon as it is ready: not in their order where ``batch`` is over 1.

        At most ``batch`` x segments images are held at a time.
        """
        try:
            return self._streamed(iter(images), batch)
        except TypeError:
            raise UsageError(
                f"{type(images).__name__} holds no images one after the other: for one image call net(image)"
            ) from None

    def _streamed(self, images: Iterator[Any], batch: int) -> Iterator[Answer]:
        began: dict[int, float] = {}

        def samples() -> Iterator[Floats]:
            for i, image in enumerate(images):
                began[i] = perf_counter()
                yield self.prepared([image], i)[0]

        for answers in Executor(self, self.policy, batch).stream(samples()):
            yield from self._said(answers.place, answers.exits, answers.logits, [began.pop(i) for i in answers.place])

    def prepared(self, images: Any, first: int = 0) -> Floats:
        """Images [N, H, W, C] -> network inputs [N, C, H, W], normalised; ``first`` is the place of the first one."""
        said = self.manifest["input"]
        done = [_pixels(image, said["shape"], first + i) for i, image in enumerate(images)]
        x = np.stack(done) if done else np.empty((0, *said["shape"]), np.float32)
        mean, std = (np.array(said[k], np.float32).reshape(-1, 1, 1) for k in ("mean", "std"))
        return np.ascontiguousarray((x - mean) / std)

    def _said(self, place: Ints, exits: Ints, logits: Floats, began: Sequence[float]) -> list[Answer]:
        sure = stops.max_probability(logits).tolist()
        labels = [self.classes[c] for c in logits.argmax(-1)]
        now = perf_counter()
        return [
            Answer(label, p, k, 1e3 * (now - t), i)
            for label, p, k, t, i in zip(labels, sure, exits.tolist(), began, place.tolist(), strict=True)
        ]

    # What an Executor asks of a network

    def plan(self, exits: Sequence[int]) -> tuple[Part, ...]:
        """Segments up to the last of ``exits``, of stages that restart just theirs; UsageError where the bundle does not hold one."""
        there = [part.head for part in self.parts]
        for k in exits:
            if k not in there:
                held = ", ".join(str(k + 1) for k in there)
                raise UsageError(f"the policy reads exit {k + 1}, this bundle holds exit {held}: export it for this policy")
        return tuple(p for p in self.parts if p.head in exits or (p.head < max(exits) and not self.manifest["restarts"]))

    def start(self, x: Floats) -> list[Any]:
        """Network inputs [B, C, H, W] -> state 0."""
        return [np.ascontiguousarray(x, dtype=np.float32)]

    def step(self, part: Part, state: list[Any]) -> tuple[list[Any], Floats]:
        """As a Deployable's."""
        logits, *after = part.run(state)
        return (state if self.manifest["restarts"] else after), logits


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a bundle, of a schema that we know."""
    path = folder / "manifest.json"
    if not path.is_file():
        raise UsageError(f"{folder} is no bundle, it has no manifest.json: write one with python -m anytime export CELL --to DIR")
    try:
        said = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CorruptFile(f"{path} cannot be read ({error}): export the bundle again") from error
    if not isinstance(said, dict) or said.get("kind") != KIND:
        raise CorruptFile(f"{path} is no manifest of a bundle: give the folder that python -m anytime export wrote")
    if said.get("schema") != SCHEMA:
        raise CorruptFile(f"{path} was written by another version (schema {said.get('schema')}, this one reads {SCHEMA}): update")
    if said.get("sha256") != fingerprint(said):
        raise CorruptFile(f"{path} is not as it was written (its sha256 differs): export the bundle again")
    return said


def fingerprint(manifest: Mapping[str, Any]) -> str:
    """sha256 of everything else that a manifest says."""
    said = {k: v for k, v in manifest.items() if k != "sha256"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def policy_of(said: Mapping[str, Any]) -> Policy:
    """A policy from its plain form (spec.plain); CorruptFile where this version has none that means the same."""
    rooms = [importlib.import_module(f"anytime.policies.{m.name}") for m in pkgutil.iter_modules(policies.__path__)]
    kinds = {
        name: kind
        for room in rooms
        for name, kind in vars(room).items()
        if isinstance(kind, type) and issubclass(kind, Policy) and kind.__module__ == room.__name__
    }
    name = said.get("is", "")
    if name not in kinds:
        raise CorruptFile(f"the bundle's policy is {name!r}, which this version does not have; {near(name, kinds)}")
    if kinds[name].version != said.get("version"):
        raise CorruptFile(
            f"the bundle's {name} is of version {said.get('version')}, here it is {kinds[name].version}: export again"
        )
    fields: dict[str, Any] = {
        k: policy_of(v) if isinstance(v, dict) else _tuples(v) for k, v in said.items() if k not in ("is", "version")
    }
    try:
        return kinds[name](**fields)
    except TypeError as error:
        raise CorruptFile(f"the bundle's {name} does not have this version's fields ({error}): export again") from error


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def _checked(folder: Path, said: Mapping[str, Any]) -> bytes:
    """The bytes of a segment's file, if they are those that were written."""
    name = said["file"]
    if Path(name).name != name:
        raise CorruptFile(f"{folder / 'manifest.json'} names {name!r}, which lies outside its folder: export the bundle again")
    path = folder / name
    try:
        body: bytes = path.read_bytes()
    except OSError as error:
        raise CorruptFile(f"{path} is missing or cannot be read ({error.strerror}): export the bundle again") from error
    if hashlib.sha256(body).hexdigest() != said["sha256"]:
        raise CorruptFile(f"{path} is not as it was written (its sha256 differs): export the bundle again")
    if EXTERNAL.search(body):
        raise CorruptFile(f"{path} keeps weights in another file, and a bundle holds all of its own: export the bundle again")
    return body


def _pixels(image: Any, shape: Sequence[int], place: int) -> Floats:
    """One image -> float32 [C, H, W] in [0, 1]."""
    c, h, w = shape
    if image is None or isinstance(image, str | bytes | Path):
        raise UsageError(f"image {place} is a {type(image).__name__}: open it first, as PIL.Image.open does, and give its pixels")
    mode = getattr(image, "mode", "")  # PIL's
    if mode in ("P", "YCbCr", "HSV", "LAB"):  # places in a palette, or three numbers that are not red, green and blue
        raise UsageError(f"image {place} is in PIL's mode {mode}: give image.convert({'L' if c == 1 else 'RGB'!r})")
    try:
        a = np.asarray(image)
    except Exception as error:  # PIL reads a file only now
        raise UsageError(f"image {place} cannot be read ({first_line(error)}): give another, or leave it out") from error
    if a.ndim == 2 and c == 1:
        a = a[..., None]
    if a.shape != (h, w, c):
        raise UsageError(
            f"image {place} has the shape {np.shape(image)}, the network takes {(h, w, c)} (height, width, channels)"
        )
    if a.dtype == np.uint8:
        x = a.astype(np.float32) / np.float32(255)
    elif np.issubdtype(a.dtype, np.floating):
        x = a.astype(np.float32)
        if not ((x >= 0) & (x <= 1)).all():  # NaN fails too
            raise UsageError(
                f"image {place} is {a.dtype} from {a.min():g} to {a.max():g}: "
                "give floats from 0 to 1, or uint8 from 0 to 255; the bundle normalises them itself"
            )
    else:
        raise UsageError(f"image {place} is {a.dtype}: give uint8 from 0 to 255, or floats from 0 to 1")
    return x.transpose(2, 0, 1)
