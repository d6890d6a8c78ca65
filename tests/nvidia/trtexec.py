"""trtexec of the version $FAKE_TENSORRT: builds and times with the module beside it, and says what genuine logs say.

options.json beside it lists what this version knows; $FAKE_LOG is the log of a run that passed, $FAKE_FAILED one that did not.
"""

import json
import os
import pickle
import sys
from pathlib import Path

import tensorrt as trt

HERE = Path(__file__).parent
FOLLOWS = "# " + " ".join(sys.argv)


def banner(verdict):
    print(f"&&&& {verdict} TensorRT.trtexec [TensorRT v{trt.DIGITS}] {FOLLOWS}", flush=True)


def main(said):
    banner("RUNNING")
    if "--help" in said:
        print("=== Model Options ===")
        return 0
    unknown = set(said) - set(json.loads((HERE / "options.json").read_text()))
    if unknown or "FAKE_FAILED" in os.environ:
        words = f"[11/20/2026-08:00:00] [E] Unknown option: {unknown}"
        print(words if unknown else Path(os.environ["FAKE_FAILED"]).read_text())
        banner("FAILED")
        return 1
    if "--onnx" in said:
        return build(said)
    trt.crash("run")
    version, body, _ = pickle.loads(Path(said["--loadEngine"]).read_bytes())
    assert version == trt.V
    trt.told(timed=said)
    # A query every 2 ms; up to 8.4 with those of the warm-up, which here are far off.
    begin = 0 if trt.V < (8, 5) else 1000
    row = {"h2dMs": 0.25, "computeMs": 0.5, "d2hMs": 0.125, "latencyMs": 0.875}
    times = [
        {"startComputeMs": float(t), **row, "computeMs": 99.0 if t < 1000 else 0.5 + t % 4 / 8} for t in range(begin, 3400, 2)
    ]
    Path(said["--exportTimes"]).write_text(json.dumps(times))
    if "--exportLayerInfo" in said:
        Path(said["--exportLayerInfo"]).write_text(trt.layer_information(body))
    print(Path(os.environ["FAKE_LOG"]).read_text())
    banner("PASSED")
    return 0


def build(said):
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    network = builder.create_network(2 if "--stronglyTyped" in said else 0)
    trt.OnnxParser(network, logger).parse(Path(said["--onnx"]).read_bytes())
    config = builder.create_builder_config()
    config.flags = {flag.strip("-").upper() for flag in ("--int8", "--fp16") if flag in said}
    if "--calib" in said:

        class Kept(trt.IInt8EntropyCalibrator2):
            def read_calibration_cache(self):
                return Path(said["--calib"]).read_bytes()

            def get_batch(self, names):
                return None

        config.int8_calibrator = Kept()
    cache = Path(said["--timingCacheFile"])
    config.cache = trt.TimingCache(cache.read_bytes() if cache.exists() else b"")
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        banner("FAILED")
        return 1
    cache.write_bytes(config.cache.body + b"!")
    Path(said["--saveEngine"]).write_bytes(plan)
    banner("PASSED")
    return 0


if __name__ == "__main__":
    sys.exit(main(dict(option.partition("=")[::2] for option in sys.argv[1:])))
