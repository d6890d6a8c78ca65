"""A module with the names of NVIDIA's tensorrt of the version $FAKE_TENSORRT, and no others; ONNX Runtime answers in its place.

Which name exists from and up to which version: NVIDIA/TensorRT, python/src/infer and python/src/parsers at 8.0.1, 8.2.1, 8.4.1, 8.5.2,
v8.6.1, v10.3.0, v10.16 and v11.1. It says what it was told (JSON lines in $FAKE_TOLD) and crashes where $FAKE_CRASH says so.
"""

import ctypes
import json
import os
import pickle
import signal
import sys
from enum import IntEnum

import numpy as np

V = tuple(int(part) for part in os.environ["FAKE_TENSORRT"].split("."))
DIGITS = V[0] * (1000 if V[0] < 10 else 10000) + V[1] * 100 + V[2]
__version__ = os.environ["FAKE_TENSORRT"] + ".1"


def crash(where):
    if os.environ.get("FAKE_CRASH") == where:
        os.kill(os.getpid(), signal.SIGSEGV)


def told(**said):
    if "FAKE_TOLD" in os.environ:
        with open(os.environ["FAKE_TOLD"], "a") as f:
            f.write(json.dumps(said) + "\n")


def failed(words):
    print("[TRT] [E] %s" % words, file=sys.stderr, flush=True)


crash("import")


def names(kind, **said):
    return IntEnum(kind, {name: value for name, (value, there) in said.items() if there})


class Logger:
    INTERNAL_ERROR, ERROR, WARNING = 0, 1, 2

    def __init__(self, severity):
        pass


NetworkDefinitionCreationFlag = names(
    "NetworkDefinitionCreationFlag", EXPLICIT_BATCH=(0, V < (11,)), STRONGLY_TYPED=(1, V >= (10,)), OTHER=(5, True)
)
BuilderFlag = names("BuilderFlag", FP16=(0, V < (11,)), INT8=(1, V < (11,)), TF32=(7, True))
DataType = names("DataType", FLOAT=(0, True), HALF=(1, True))
ProfilingVerbosity = names("ProfilingVerbosity", NONE=(1, True), DETAILED=(2, V >= (8, 2)))
if V >= (8, 4):
    MemoryPoolType = names("MemoryPoolType", WORKSPACE=(0, True))
if V >= (8, 2):
    LayerInformationFormat = names("LayerInformationFormat", JSON=(1, True))
if V < (11,):

    class IInt8EntropyCalibrator2:
        pass


class Network:
    def __init__(self, flags):
        self.flags, self.body = flags, None


class Fault:
    def desc(self):
        return "In node 0 (parseGraph): INVALID_NODE"


class OnnxParser:
    num_errors = 1

    def __init__(self, network, logger):
        self.network = network

    def parse(self, body):
        self.network.body = body
        return b"no graph" not in body

    def get_error(self, i):
        return Fault()


class Memory(bytes):
    """IHostMemory: only its buffer is asked for."""


class TimingCache:
    def __init__(self, body):
        self.body = body

    def serialize(self):
        return Memory(self.body)


class Config:
    """A class of pybind11 takes no attribute that it does not have."""

    _takes = {"flags": True, "pool": True, "cache": True, "max_workspace_size": V < (10,), "profiling_verbosity": True}
    _takes.update({"builder_optimization_level": V >= (8, 6), "int8_calibrator": V < (11,)})

    def __init__(self):
        self.flags, self.pool, self.cache = {"TF32"}, None, None

    def __setattr__(self, name, value):
        if not self._takes.get(name):
            raise AttributeError(name)
        object.__setattr__(self, name, value)

    def set_flag(self, flag):
        self.flags.add(BuilderFlag(flag).name)

    def clear_flag(self, flag):
        self.flags.discard(BuilderFlag(flag).name)

    if V >= (8, 4):

        def set_memory_pool_limit(self, pool, size):
            self.pool = size

    def create_timing_cache(self, body):
        return TimingCache(body)

    def set_timing_cache(self, cache, ignore_mismatch):
        self.cache = cache
        return True

    def get_timing_cache(self):
        return TimingCache(self.cache.body + b"!")


class Builder:
    def __init__(self, logger):
        pass

    def create_network(self, flags=0):
        return Network(flags)

    def create_builder_config(self):
        return Config()

    def build_serialized_network(self, network, config):
        crash("build")
        typed = bool(network.flags & 2) or V >= (11,)
        explicit = b"QuantizeLinear" in network.body
        scales = None
        if getattr(config, "int8_calibrator", None) is not None:
            lines = config.int8_calibrator.read_calibration_cache().decode().splitlines()
            if lines[0] != "TRT-%d-EntropyCalibration2" % DIGITS or config.int8_calibrator.get_batch(["x"]) is not None:
                return failed("Calibration failure occurred with no scaling factors detected.")
            scales = {line.rpartition(": ")[0]: line.rpartition(": ")[2] for line in lines[1:]}
        if typed and config.flags & {"FP16", "INT8"}:
            return failed("Error Code 4: API Usage Error (precision flags in a strongly typed network)")
        if explicit and not typed and "INT8" not in config.flags:
            return failed("Error Code 4: Internal Error (Int8 precision has been set for a layer but int8 is not configured)")
        said = {
            "flags": sorted(config.flags), "typed": typed, "workspace": config.pool or getattr(config, "max_workspace_size", None),
            "verbosity": int(getattr(config, "profiling_verbosity", 0)), "scales": scales, "explicit_batch": bool(network.flags & 1),
            "timing_cache": None if config.cache is None else config.cache.body.decode(),
        }  # fmt: skip
        told(**said)
        return Memory(pickle.dumps((V, network.body, said)))


class Runtime:
    def __init__(self, logger):
        pass

    def deserialize_cuda_engine(self, plan):
        try:
            version, body, said = pickle.loads(plan)
        except Exception:
            return failed("Error Code 1: Serialization (Serialization assertion magicTagRead == kMAGIC_TAG failed)")
        return Engine(body, said) if version == V else failed("Error Code 6: The engine plan file is not compatible")


class Engine:
    def __init__(self, body, said):
        self._said, self._body = said, body

    def _open(self):
        import onnxruntime  # whoever only builds can do without

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.x64quantprecision", "1")
        # As anytime/engine.py: what was kept in float on purpose stays so.
        off = ["WeightBiasQuantization"]
        session = onnxruntime.InferenceSession(self._body, options, providers=["CPUExecutionProvider"], disabled_optimizers=off)
        self._ports = [*((p, True) for p in session.get_inputs()), *((p, False) for p in session.get_outputs())]
        self._session, self._by = session, {p.name: p for p, _ in self._ports}

    def create_execution_context(self):
        self._open()
        return Context(self)

    if V >= (8, 5):

        @property
        def num_io_tensors(self):
            return len(self._ports)

        def get_tensor_name(self, i):
            return self._ports[i][0].name

        def get_tensor_dtype(self, name):
            return DataType.HALF if os.environ.get("FAKE_HALF") == name else DataType.FLOAT

        def get_tensor_shape(self, name):
            return tuple(self._by[name].shape)

    if V < (10,):

        @property
        def num_bindings(self):
            return len(self._ports)

        def get_binding_name(self, i):
            return self._ports[i][0].name

        def get_binding_dtype(self, i):
            return DataType.FLOAT

        def get_binding_shape(self, i):
            return tuple(self._ports[i][0].shape)

    if V >= (8, 2):

        def create_engine_inspector(self):
            return Inspector(self)


class Context:
    def __init__(self, engine):
        self.engine, self.addresses = engine, {}

    if V >= (8, 5):

        def set_tensor_address(self, name, address):
            self.addresses[name] = address
            return name in self.engine._by

        def execute_async_v3(self, stream_handle):
            return self._run(stream_handle)

    if V < (10,):

        def execute_async_v2(self, bindings, stream_handle):
            self.addresses = {port.name: address for (port, _), address in zip(self.engine._ports, bindings)}
            return self._run(stream_handle)

    def _run(self, stream):
        crash("run")
        if stream != 0x57 or os.environ.get("FAKE_CRASH") == "enqueue":
            return False

        def at(port):
            n = int(np.prod(port.shape))
            return np.frombuffer((ctypes.c_float * n).from_address(self.addresses[port.name]), np.float32).reshape(port.shape)

        inputs = {port.name: at(port) for port, enters in self.engine._ports if enters}
        outputs = [port for port, enters in self.engine._ports if not enters]
        for port, value in zip(outputs, self.engine._session.run([p.name for p in outputs], inputs)):
            at(port)[...] = value
        return True


class Inspector:
    def __init__(self, engine):
        self.engine = engine

    def get_engine_information(self, form):
        return layer_information(self.engine._body)


def layer_information(body):
    """In the form of NVIDIA/TensorRT v8.6.1's example (see test_trtexec.py), from 11 on as its migration guide says."""
    import onnx

    graph = onnx.ModelProto.FromString(body).graph
    made = {out: node for node in graph.node for out in node.output}
    kinds = {c.name: (c.data_type, int(np.prod(c.dims))) for c in graph.initializer}

    def tensor(name, kind):
        if V >= (11,):
            return {"Name": name, "Format": "LINEAR", "DataType": kind}
        return {"Name": name, "Location": "Device", "Format/Datatype": "Row major linear " + kind}

    found = []
    for node in graph.node:
        if node.op_type not in ("Conv", "Gemm"):
            continue
        weight = node.input[1]
        integers = weight in made
        while weight in made:
            weight = made[weight].input[0]
        data_type, count = kinds[weight]
        kind = "INT8" if integers else "FP16" if data_type == 10 else "FP32"
        if integers:
            found.append(
                {"Name": node.input[0] + "/Q", "LayerType": "Reformat", "Inputs": [tensor("x", "FP32")], "Origin": "QDQ"}
            )
        about = {
            "Inputs": [tensor(node.input[0], kind)],
            "Weights": {"Type": {"FP32": "Float", "FP16": "Half", "INT8": "Int8"}[kind]},
        }
        about["Weights"]["Count"] = count
        name = "%s + %s" % (weight, node.name)
        if V >= (8, 6):
            name, about["Metadata"] = node.name + "_myl0", "[ONNX Layer: %s]" % node.name
        found.append({"Name": name, "LayerType": "CaskConvolution", **about})
    return json.dumps({"Layers": found, "I/O Tensors" if V >= (11,) else "Bindings": []})
