"""Builds one engine with TensorRT's own Python, 7.1 to 11, as trtexec would: a process of its own, whose output is what went wrong.

    python3 build.py OPTIONS

OPTIONS is JSON: ``onnx`` and ``engine``, paths; ``flags`` of the builder; ``typed``, strongly; ``calibration`` and ``timing_cache``, paths
or ""; ``workspace_mib``. Beside the engine it writes what the engine says of its layers, from 8.2 on.
Source: NVIDIA/TensorRT, samples/common/sampleEngines.cpp (what trtexec sets), python/src/infer (from which version on).
"""

import json
import os
import sys
from typing import Any, Dict


def built(trt: Any, said: Dict[str, Any]) -> bytes:
    """The engine, serialized."""
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    version = [int(part) for part in trt.__version__.split(".")[:2]]
    creation = trt.NetworkDefinitionCreationFlag
    flags = 1 << int(creation.EXPLICIT_BATCH) if version < [10, 0] else 0
    if said["typed"] and version < [11, 0]:  # 11 knows nothing else
        flags |= 1 << int(creation.STRONGLY_TYPED)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, logger)
    with open(said["onnx"], "rb") as f:
        if not parser.parse(f.read()):
            why = parser.get_error(0).desc() if parser.num_errors else "it does not say why"
            sys.exit("TensorRT %s cannot read the graph: %s" % (trt.__version__, why))
    config = builder.create_builder_config()
    if hasattr(config, "set_memory_pool_limit"):  # 8.4
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, said["workspace_mib"] << 20)
    else:
        config.max_workspace_size = said["workspace_mib"] << 20
    config.clear_flag(trt.BuilderFlag.TF32)
    for flag in said["flags"]:
        config.set_flag(getattr(trt.BuilderFlag, flag))
    if version >= [8, 2]:
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if version >= [8, 6]:
        config.builder_optimization_level = 3
    if said["calibration"]:
        config.int8_calibrator = calibrator(trt, said["calibration"])
    if version < [8, 0]:
        engine = builder.build_engine(network, config)
        if engine is None:
            sys.exit("TensorRT %s built no engine and does not say why" % trt.__version__)
        return bytes(engine.serialize())
    if said["timing_cache"]:
        kept = b""
        if os.path.exists(said["timing_cache"]):
            with open(said["timing_cache"], "rb") as f:
                kept = f.read()
        config.set_timing_cache(config.create_timing_cache(kept), False)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        sys.exit("TensorRT %s built no engine and does not say why" % trt.__version__)
    if said["timing_cache"]:
        with open(said["timing_cache"], "wb") as f:
            f.write(config.get_timing_cache().serialize())
    return bytes(plan)


def calibrator(trt: Any, path: str) -> Any:
    """One that has seen no sample: it hands over the cache that was written for it."""

    class Kept(trt.IInt8EntropyCalibrator2):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IInt8EntropyCalibrator2.__init__(self)

        def get_batch_size(self) -> int:
            return 1

        def get_batch(self, names: Any) -> None:
            return None

        def read_calibration_cache(self) -> bytes:
            with open(path, "rb") as f:
                return f.read()

        def write_calibration_cache(self, cache: Any) -> None:
            pass

    return Kept()


def layers(trt: Any, plan: bytes) -> str:
    """What the engine says of its layers, as trtexec's --exportLayerInfo; "" before 8.2."""
    if not hasattr(trt, "LayerInformationFormat"):
        return ""
    runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        return ""  # whoever runs it says so
    return str(engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON))


def main(said: Dict[str, Any]) -> None:
    """Build, and write both files."""
    import tensorrt as trt

    plan = built(trt, said)
    with open(said["engine"], "wb") as f:
        f.write(plan)
    about = layers(trt, plan)
    if about:
        with open(said["engine"] + ".layers", "w", encoding="utf-8") as text:
            text.write(about)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
