"""What runs one graph on a board: a class for each engine, chosen by name. Inputs in the graph's order -> outputs in the graph's order.

What an engine hands on as a state is its own affair: arrays, or memory of the GPU. Logits are arrays, samples come as arrays.
"""

import ctypes
import hashlib
import json
import os
from typing import Any, Dict, List, Optional, Tuple

import numpy as np

SCHEMA = 1
Segment = Tuple[int, int, Optional[int]]  # first stage, the one to stop before, head


class Refused(Exception):
    """A sentence: what is wrong with this job or this board."""


def _has_vnni() -> bool:
    """Whether this CPU says that it adds products of u8 and s8 in 32 bits."""
    try:
        with open("/proc/cpuinfo") as f:
            said = f.read()
    except OSError:
        return False
    return any(flag in said for flag in ("avx512_vnni", "avx_vnni", "amx_int8"))


class OnnxRuntime:
    """A graph in a session of ONNX Runtime; it must run where the job wants it, and not fall back in silence."""

    def __init__(self, path: str, segment: Dict[str, Any], manifest: Dict[str, Any], job: Dict[str, Any]) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = job["threads"], 1
        options.log_severity_level = 3
        if not _has_vnni():
            options.add_session_config_entry("session.x64quantprecision", "1")  # see EXACT_INT8 in anytime/engine.py
        # See anytime/engine.py: it would quantize what was kept in float on purpose.
        off = [] if manifest["float_biases"] else ["WeightBiasQuantization"]
        wanted = job["provider"]
        if wanted != "CPUExecutionProvider" and wanted in onnxruntime.get_available_providers():
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")  # a node that it cannot run is an error
        self.session = onnxruntime.InferenceSession(path, options, providers=[wanted], disabled_optimizers=off)
        got = self.session.get_providers()
        if not got or got[0] != wanted:
            raise Refused("ONNX Runtime runs on %s here, not on %s as was asked for" % (" and ".join(got) or "nothing", wanted))
        self.inputs = [i.name for i in self.session.get_inputs()]
        self.outputs = [o.name for o in self.session.get_outputs()]
        self.facts = {"engine": "onnxruntime %s" % onnxruntime.__version__, "provider": got[0]}

    def run(self, inputs: List[Any]) -> List[Any]:
        return list(self.session.run(self.outputs, dict(zip(self.inputs, inputs))))


class TensorRT:
    """An engine that build.py or trtexec has made here, one sample at a time.

    States stay on the GPU, logits are copied back; ``run`` ends when the GPU has ended. How the CPU waits for it is CUDA's choice.
    """

    def __init__(self, path: str, segment: Dict[str, Any], manifest: Dict[str, Any], job: Dict[str, Any]) -> None:
        import tensorrt as trt

        self.cuda, self.head = Cuda.opened(), segment["head"] is not None
        try:
            with open(plan_of(path), "rb") as f:
                plan = f.read()
        except OSError:
            raise Refused("%s is not there: its engine could not be built" % plan_of(path)) from None
        self.runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))  # an engine must not outlive its runtime
        self.engine = self.runtime.deserialize_cuda_engine(plan)
        if self.engine is None:
            raise Refused("TensorRT %s cannot read %s, which was built here" % (trt.__version__, plan_of(path)))
        self.context = self.engine.create_execution_context()
        if self.context is None:
            raise Refused("TensorRT has no memory to run %s" % plan_of(path))
        self.named = hasattr(self.engine, "num_io_tensors")  # TensorRT 8.5 and later; 10 knows no other way
        tensors = self._tensors(trt)
        self.outputs = [self._memory(name, tensors) for name in segment["outputs"]]
        # A head need not read the whole state, and what it does not read may be gone from its engine.
        self.inputs = [(name, self._memory(name, tensors) if name in tensors else None) for name in segment["inputs"]]
        strange = set(tensors) - set(segment["inputs"]) - set(segment["outputs"])
        if strange:
            raise Refused("%s asks for %s, which its graph does not have" % (plan_of(path), ", ".join(sorted(strange))))
        self.places = {name: place for place, name in enumerate(tensors)}
        self.addresses = [0] * len(tensors)
        for memory in self.outputs:
            self._bind(memory.name, memory.address)
        self.facts = {"engine": "tensorrt %s" % trt.__version__, "gpu": self.cuda.name}

    def run(self, inputs: List[Any]) -> List[Any]:
        for (name, own), given in zip(self.inputs, inputs):
            if own is None:
                continue
            if isinstance(given, np.ndarray):
                if given.shape != own.host.shape:  # numpy would repeat the smaller one
                    raise Refused("a tensor of shape %s where %s takes %s" % (given.shape, name, own.host.shape))
                np.copyto(own.host, given)
                self.cuda.to_device(own)
                given = own
            self._bind(name, given.address)
        if self.named:
            done = self.context.execute_async_v3(self.cuda.stream)
        else:
            done = self.context.execute_async_v2(self.addresses, self.cuda.stream)
        if not done:
            raise Refused("TensorRT could not run an engine: see its messages")
        out = list(self.outputs)  # type: List[Any]
        if self.head:
            self.cuda.to_host(out[0])
        self.cuda.wait()
        if self.head:
            out[0] = out[0].host.copy()
        return out

    def _bind(self, name: str, address: int) -> None:
        place = self.places[name]
        if self.addresses[place] != address:
            self.addresses[place] = address
            if self.named and not self.context.set_tensor_address(name, address):
                raise Refused("TensorRT does not take the memory of %s" % name)

    def _tensors(self, trt: Any) -> Dict[str, Tuple[int, ...]]:
        """Name -> shape of every tensor at the border, in the engine's order."""
        engine, found = self.engine, {}
        for i in range(engine.num_io_tensors if self.named else engine.num_bindings):
            name = engine.get_tensor_name(i) if self.named else engine.get_binding_name(i)
            kind = engine.get_tensor_dtype(name) if self.named else engine.get_binding_dtype(i)
            shape = engine.get_tensor_shape(name) if self.named else engine.get_binding_shape(i)
            if kind != trt.DataType.FLOAT:
                raise Refused("%s is %s at the border of an engine, where float32 was asked for" % (name, kind))
            found[name] = tuple(shape)
        return found

    def _memory(self, name: str, tensors: Dict[str, Tuple[int, ...]]) -> Any:
        if name not in tensors:
            raise Refused("the engine has no tensor %s, it has %s" % (name, ", ".join(tensors)))
        return Memory(self.cuda, name, tensors[name])


def plan_of(path: str) -> str:
    """Where the engine of a graph lies."""
    return path[: -len(".onnx")] + ".plan"


class Memory:
    """A float32 tensor: memory of the GPU, and page-locked memory here from which copies need no detour."""

    def __init__(self, cuda: Any, name: str, shape: Tuple[int, ...]) -> None:
        self.name, self.n_bytes = name, 4 * int(np.prod(shape))
        device, host = ctypes.c_uint64(), ctypes.c_void_p()
        cuda.call("cuMemAlloc_v2", ctypes.byref(device), ctypes.c_size_t(self.n_bytes))
        cuda.call("cuMemAllocHost_v2", ctypes.byref(host), ctypes.c_size_t(self.n_bytes))
        self.address = int(device.value)
        self.host_address = int(host.value or 0)
        raw = (ctypes.c_char * self.n_bytes).from_address(self.host_address)  # type: Any
        self.host = np.frombuffer(raw, dtype=np.float32).reshape(shape)


class Cuda:
    """The CUDA driver, of which every machine with NVIDIA's GPU has the library; first GPU, its primary context, one stream.

    Source: NVIDIA, CUDA Driver API.
    """

    _open = None  # type: Any

    @classmethod
    def opened(cls) -> Any:
        """The one of this process."""
        cls._open = cls._open or cls()
        return cls._open

    def __init__(self) -> None:
        try:
            self.library = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise Refused("the CUDA driver cannot be opened (%s)" % error) from None
        device, context, stream = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
        self.call("cuInit", 0)
        self.call("cuDeviceGet", ctypes.byref(device), 0)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self.call("cuCtxSetCurrent", context)
        self.call("cuStreamCreate", ctypes.byref(stream), 1)  # CU_STREAM_NON_BLOCKING
        self.stream = int(stream.value or 0)
        name = ctypes.create_string_buffer(100)
        self.call("cuDeviceGetName", name, len(name), device)
        self.name = name.value.decode("utf-8", "replace")

    def call(self, function: str, *arguments: Any) -> None:
        """Refused with CUDA's own words unless it answers 0."""
        code = getattr(self.library, function)(*arguments)
        if code:
            words = ctypes.c_char_p()
            self.library.cuGetErrorString(code, ctypes.byref(words))
            raise Refused("CUDA: %s failed (%d, %s)" % (function, code, (words.value or b"unknown").decode()))

    def to_device(self, memory: Memory) -> None:
        """Begin to copy what lies in its host side."""
        self.call(
            "cuMemcpyHtoDAsync_v2", ctypes.c_uint64(memory.address), ctypes.c_void_p(memory.host_address),
            ctypes.c_size_t(memory.n_bytes), ctypes.c_void_p(self.stream),
        )  # fmt: skip

    def to_host(self, memory: Memory) -> None:
        """Begin to copy what lies on the GPU."""
        self.call(
            "cuMemcpyDtoHAsync_v2", ctypes.c_void_p(memory.host_address), ctypes.c_uint64(memory.address),
            ctypes.c_size_t(memory.n_bytes), ctypes.c_void_p(self.stream),
        )  # fmt: skip

    def wait(self) -> None:
        """Until all that was begun has ended."""
        self.call("cuStreamSynchronize", ctypes.c_void_p(self.stream))


ENGINES = {"onnxruntime": OnnxRuntime, "tensorrt": TensorRT}  # name -> class(path, segment, manifest, job) with run() and facts


class Net:
    """A bundle, opened: its segments by (first, stop, head)."""

    def __init__(self, folder: str, job: Dict[str, Any]) -> None:
        with open(os.path.join(folder, "manifest.json"), encoding="utf-8") as f:
            self.manifest = json.load(f)
        if self.manifest.get("kind") != "anytime bundle" or self.manifest.get("schema") != SCHEMA:
            raise Refused("%s is no bundle of schema %d: copy agent and bundle from one version of anytime" % (folder, SCHEMA))
        name = self.manifest["engine"]
        if name not in ENGINES:
            raise Refused("there is no engine %r; there is %s" % (name, ", ".join(sorted(ENGINES))))
        self.n_exits, self.restarts = self.manifest["n_exits"], self.manifest["restarts"]
        self.segments = {}  # type: Dict[Segment, Any]
        for said in self.manifest["segments"]:
            path = os.path.join(folder, os.path.basename(said["file"]))
            with open(path, "rb") as graph:
                if hashlib.sha256(graph.read()).hexdigest() != said["sha256"]:
                    raise Refused("%s is not as it was written (its sha256 differs): send the bundle again" % path)
            self.segments[said["first"], said["stop"], said["head"]] = ENGINES[name](path, said, self.manifest, job)

    def step(self, segment: Segment, entered: List[Any]) -> Tuple[List[Any], Any]:
        """State before the segment -> state after it, and logits where it has a head."""
        out = self.segments[segment].run(entered)
        if segment[2] is None:
            return out, None
        return (entered if self.restarts else out[1:]), out[0]

    @property
    def heads(self) -> List[Segment]:
        """Its segments with a head, in their order: what a plan runs."""
        return sorted((s for s in self.segments if s[2] is not None), key=lambda s: s[1])

    @property
    def facts(self) -> Dict[str, str]:
        return dict(next(iter(self.segments.values())).facts)
