"""trtexec: values by hand from genuine logs of every format, command lines per version, and what a cut makes of each."""

import json
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anytime.errors import AnytimeError, Unsupported
from anytime.nvidia.trtexec import (
    banner_digits,
    banner_version,
    banners,
    block,
    build_command,
    calibration_cache,
    kernels,
    outputs,
    profile,
    reading,
    summary,
    time_command,
    times,
)

LOGS = {p.stem.removeprefix("trtexec_"): p.read_text() for p in (Path(__file__).parent / "transcripts").glob("trtexec_*.txt")}
VERSIONS = [(7, 1, 3), (8, 0, 1), (8, 2, 1), (8, 4, 1), (8, 5, 2), (8, 6, 1), (10, 3, 0), (10, 16, 2), (11, 1, 0)]

# By hand from the texts: quantity -> (min, max, mean, median, percentiles)
BY_HAND = {
    "trt7_style": {
        "latency": (1.64058, 6.2915, 1.66069, 1.65601, {99: 1.67065}),
        "end_to_end": (1.66368, 7.65552, 3.00909, 3.01636, {99: 3.03931}),
    },
    "trt80_jp46_deepstream": {
        "end_to_end": (40.3104, 40.647, 40.4076, 40.3934, {99: 40.647}),
        "enqueue": (6.76562, 8.41187, 7.24886, 7.18372, {99: 8.41187}),
        "h2d": (0.471436, 0.553223, 0.476471, 0.474121, {99: 0.553223}),
        "compute": (39.795, 40.1282, 39.8877, 39.875, {99: 40.1282}),
        "d2h": (0.0292969, 0.0351562, 0.0311401, 0.03125, {99: 0.0351562}),
    },
    "trt82_xavier_nx_mnist": {
        "latency": (0.564209, 0.593018, 0.573891, 0.572998, {99: 0.587769}),
        "end_to_end": (0.574707, 0.606201, 0.586663, 0.585938, {99: 0.601685}),
        "enqueue": (0.126709, 0.282104, 0.140747, 0.134277, {99: 0.182129}),
        "h2d": (0.00610352, 0.00793457, 0.00656457, 0.0065918, {99: 0.00708008}),
        "compute": (0.554932, 0.58374, 0.564682, 0.564087, {99: 0.578552}),
        "d2h": (0.00219727, 0.00341797, 0.00265072, 0.00268555, {99: 0.00317383}),
    },
    "trt84_agx_xavier_mnist": {
        "latency": (0.387207, 0.447357, 0.402238, 0.401947, {99: 0.420288}),
        "enqueue": (0.0830078, 0.229004, 0.090497, 0.0871582, {99: 0.126099}),
        "h2d": (0.00622559, 0.0571899, 0.0104126, 0.00952148, {99: 0.0272217}),
        "compute": (0.375977, 0.403564, 0.388221, 0.388443, {99: 0.393188}),
        "d2h": (0.00195312, 0.00537109, 0.00360451, 0.00366211, {99: 0.00488281}),
    },
    "trt85_orin_nano_yolox": {
        "h2d": (0.299072, 0.373962, 0.316446, 0.310486, {90: 0.332031, 95: 0.345398, 99: 0.354126}),
        "compute": (10.0343, 10.3575, 10.1824, 10.1851, {90: 10.3206, 95: 10.338, 99: 10.356}),
        "d2h": (0.17041, 0.312134, 0.29821, 0.298584, {90: 0.302856, 95: 0.304077, 99: 0.310608}),
    },
    "trt85plus_full_summary_desktop": {
        "latency": (30.1348, 30.887, 30.7571, 30.7585, {90: 30.8303, 95: 30.8396, 99: 30.8523}),
        "enqueue": (29.4951, 31.1035, 30.2854, 30.2815, {90: 30.5007, 95: 30.7004, 99: 31.0061}),
        "h2d": (0.243774, 0.261108, 0.247712, 0.247559, {90: 0.24939, 95: 0.249756, 99: 0.255188}),
        "compute": (29.8193, 30.4572, 30.3322, 30.333, {90: 30.4037, 95: 30.4156, 99: 30.4204}),
        "d2h": (0.0695801, 0.187988, 0.177211, 0.177734, {90: 0.182312, 95: 0.184814, 99: 0.1875}),
    },
    "trt86_agx_orin_jp6dp": {  # its H2D line is cut
        "latency": (4.81763, 4.86572, 4.83767, 4.83752, {90: 4.84772, 95: 4.85034, 99: 4.85547}),
        "enqueue": (0.345459, 0.39978, 0.357979, 0.356689, {90: 0.365295, 95: 0.372803, 99: 0.384033}),
    },
    "trt1010_desktop_tail": {
        "compute": (6.12354, 7.72314, 6.75204, 6.78809, {90: 7.2366, 95: 7.51614, 99: 7.68307}),
        "d2h": (0.691162, 0.850952, 0.69323, 0.691895, {90: 0.693359, 95: 0.694397, 99: 0.715271}),
    },
    "trt_agx_orin32_igev": {
        "latency": (75.9753, 76.4476, 76.3344, 76.3436, {90: 76.4209, 95: 76.446, 99: 76.4476}),
        "enqueue": (75.5111, 76.2788, 75.8652, 75.8631, {90: 76.0249, 95: 76.0399, 99: 76.2788}),
    },
    "failed_banner": {}, "trt1016_orin_device_info": {}, "trt103_orin_nx_header": {}, "trt85_xavier_nx16_dumpProfile_no_summary": {},
}  # fmt: skip
TOTALS = {  # queries a second, wall time, compute time
    "trt7_style": (None, 3.00461, None),  # it says 0 qps, as 7.x does for an explicit batch
    "trt80_jp46_deepstream": (None, 4.04082, 3.98877),
    "trt82_xavier_nx_mnist": (27207, 3.00158, 2.88214),
    "trt84_agx_xavier_mnist": (41087.7, 3.00119, 2.99202),
    "trt85_orin_nano_yolox": (None, 3.0348, 3.02418),
    "trt85plus_full_summary_desktop": (32.7261, 3.08622, None),
    "trt86_agx_orin_jp6dp": (208.729, None, None),
    "trt1010_desktop_tail": (None, 3.00755, 2.43749),
    "trt_agx_orin32_igev": (12.9581, None, None),
}


def plain(said):
    return {name: tuple(stat) for name, stat in said.stats.items()}


def test_there_are_values_for_every_log():
    assert set(BY_HAND) == set(LOGS) and len(LOGS) == 13


@pytest.mark.parametrize("name", BY_HAND)
def test_every_log(name):
    said = reading(LOGS[name])
    assert plain(said) == BY_HAND[name]
    assert (said.throughput_qps, said.walltime_s, said.compute_s) == TOTALS.get(name, (None, None, None))


def test_a_whole_log_of_7():
    """The lines that the excerpt lacks, as samples/common/sampleReporting.cpp at 7.1.3 writes them."""
    rest = """\
[06/12/2022-22:34:00] [I] min: 0.9 ms
[06/12/2022-22:34:00] [I] max: 1.5 ms
[06/12/2022-22:34:00] [I] median: 0.94 ms
[06/12/2022-22:34:00] [I] GPU Compute
[06/12/2022-22:34:00] [I] min: 1.5 ms
[06/12/2022-22:34:00] [I] max: 6.1 ms
[06/12/2022-22:34:00] [I] mean: 1.56 ms
[06/12/2022-22:34:00] [I] median: 1.55 ms
[06/12/2022-22:34:00] [I] percentile: 1.58 ms at 99%
[06/12/2022-22:34:00] [I] total compute time: 2.9 s
&&&& PASSED TensorRT.trtexec # trtexec --onnx=a.onnx
"""
    said = reading(LOGS["trt7_style"] + rest)
    assert tuple(said.stats["enqueue"]) == (0.9, 1.5, None, 0.94, {})
    assert tuple(said.stats["compute"]) == (1.5, 6.1, 1.56, 1.55, {99: 1.58})
    assert plain(said)["latency"] == BY_HAND["trt7_style"]["latency"] and said.compute_s == 2.9
    assert summary(LOGS["trt7_style"] + rest) == said  # its banner names no version


@pytest.mark.parametrize(
    "name", ["trt80_jp46_deepstream", "trt84_agx_xavier_mnist", "trt85_orin_nano_yolox", "trt1010_desktop_tail"]
)
def test_runs_that_passed_have_a_summary(name):
    assert summary(LOGS[name]) == reading(LOGS[name])


def test_warnings_are_kept():
    assert (
        "GPU compute time is unstable, with coefficient of variance = 5.58977%."
        in summary(LOGS["trt1010_desktop_tail"]).warnings[0]
    )


@pytest.mark.parametrize(
    "name, said",
    [
        ("failed_banner", "trtexec failed: Engine set up failed"),
        ("trt86_agx_orin_jp6dp", r"cut off, it ends with .*percentile\(99"),
        ("trt82_xavier_nx_mnist", "cut off"),
        ("trt85_xavier_nx16_dumpProfile_no_summary", "no times when its profiler is on: add --separateProfileRun"),
    ],
)
def test_what_is_no_summary_says_why(name, said):
    with pytest.raises(AnytimeError, match=said):
        summary(LOGS[name])


def test_a_build_is_no_run():
    with pytest.raises(AnytimeError, match="no GPU compute time"):
        summary("[11/20/2026-08:32:52] [I] Engine built in 3 sec.\n&&&& PASSED TensorRT.trtexec [TensorRT v8502] # trtexec\n")


@given(st.sampled_from(sorted(LOGS)), st.data())
def test_a_prefix_is_an_error_or_says_the_same(name, data):
    log = LOGS[name]
    cut = log[: data.draw(st.integers(0, len(log)))]
    part, whole = reading(cut), reading(log)
    for quantity, (low, high, mean, median, per_cents) in part.stats.items():
        want = whole.stats[quantity]
        assert (low, high, median) == (want.min, want.max, want.median) and mean in (None, want.mean)
        assert per_cents.items() <= want.percentiles.items()
    for got, want in zip(part[1:4], whole[1:4], strict=True):
        assert got in (None, want)
    assert banners(cut) == banners(log)[: len(banners(cut))]
    assert block(cut, "Device Information").items() <= block(log, "Device Information").items()
    try:
        strict = summary(cut)
    except AnytimeError:
        return
    assert strict.stats == whole.stats and strict[1:4] == whole[1:4]


def test_banners_and_blocks():
    (running,) = banners(LOGS["trt103_orin_nx_header"])
    assert (running.verdict, running.version, running.build) == ("RUNNING", (10, 3, 0), None)
    assert banners(LOGS["trt1010_desktop_tail"])[0][:3] == ("PASSED", (10, 10, 0), "31")
    assert [b.verdict for b in banners(LOGS["trt85_xavier_nx16_dumpProfile_no_summary"])] == ["RUNNING", "PASSED"]
    device = block(LOGS["trt1016_orin_device_info"], "Device Information")
    assert (device["Selected Device"], device["Compute Capability"], device["TensorRT version"]) == ("Orin", "8.7", "10.16.2")
    assert device["Application Compute Clock Rate"] == "1.173 GHz"
    options = block(LOGS["trt103_orin_nx_header"], "Inference Options")
    assert (options["Data transfers"], options["Spin-wait"]) == ("Enabled", "Disabled")  # what time_command brings 11 back to


@pytest.mark.parametrize(
    "digits, version",
    [("7103", (7, 1, 3)), ("8001", (8, 0, 1)), ("8400", (8, 4, 0)), ("8502", (8, 5, 2)), ("100300", (10, 3, 0)),
     ("101000", (10, 10, 0)), ("101602", (10, 16, 2)), ("110100", (11, 1, 0))],
)  # fmt: skip
def test_versions_as_banners_write_them(digits, version):
    assert banner_version(digits) == version and banner_digits(version) == digits


# Command lines

# Options that samples/common/sampleOptions.cpp of NVIDIA/TensorRT knows, by tag: [first, last] that we saw it in.
OPTIONS = {
    **dict.fromkeys(("--onnx", "--saveEngine", "--loadEngine", "--noTF32", "--exportTimes", "--exportProfile", "--exportOutput"), (0, 99)),
    **dict.fromkeys(("--warmUp", "--duration", "--iterations", "--avgRuns", "--percentile", "--loadInputs"), (0, 99)),
    **{"--fp16": (0, (10, 16, 2)), "--int8": (0, (10, 16, 2)), "--calib": (0, (10, 16, 2)), "--explicitBatch": (0, (8, 6, 1))},
    **{"--workspace": (0, (8, 6, 1)), "--memPoolSize": ((8, 4, 1), 99), "--stronglyTyped": ((10, 3, 0), 99)},
    **{"--timingCacheFile": ((8, 0, 1), 99), "--profilingVerbosity": ((8, 2, 1), 99), "--exportLayerInfo": ((8, 2, 1), 99)},
    **{"--buildOnly": (0, (8, 6, 1)), "--skipInference": ((8, 6, 1), 99), "--separateProfileRun": ((8, 0, 1), 99)},
    **{"--builderOptimizationLevel": ((8, 6, 1), 99)},
    **dict.fromkeys(("--noCudaGraph", "--noSpinWait", "--includeDataTransfers"), ((11, 1, 0), 99)),
}  # fmt: skip


@pytest.mark.parametrize("version", VERSIONS, ids=str)
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_no_version_meets_an_option_that_it_does_not_know(version, precision):
    calibration = "c" if precision == "int8" and version < (8, 0, 0) else ""
    lines = [
        build_command(version, "a.onnx", "a.plan", precision, calibration, "cache"),
        time_command(version, "a.plan", "t.json", "p.json", "l.json", {"x": "x.bin"}, "o.json"),
    ]
    for program, *options in lines:
        assert program == "trtexec"
        for option in options:
            first, last = OPTIONS[option.partition("=")[0]]
            assert first == 0 or version >= first, option
            assert last == 99 or version <= last, option


def test_commands_by_hand():
    assert build_command((8, 5, 2), "a.onnx", "a.plan", "int8", timing_cache="t", trtexec="/usr/src/tensorrt/bin/trtexec") == [
        "/usr/src/tensorrt/bin/trtexec", "--onnx=a.onnx", "--saveEngine=a.plan", "--int8", "--fp16", "--noTF32",
        "--memPoolSize=workspace:1024", "--timingCacheFile=t", "--profilingVerbosity=detailed", "--buildOnly",
    ]  # fmt: skip
    for version, typed in (((10, 3, 0), ["--stronglyTyped"]), ((11, 1, 0), [])):
        assert build_command(version, "a.onnx", "a.plan", "int8")[3:-5] == typed
    assert "--int8" in build_command((10, 3, 0), "a.onnx", "a.plan", "int8", "cache")  # a calibrator is weakly typed
    assert "--stronglyTyped" not in build_command((10, 3, 0), "a.onnx", "a.plan", "int8", "cache")
    assert "--exportProfile=p" not in time_command((7, 1, 3), "a.plan", "t", "p")  # no run of its own for it
    assert "--separateProfileRun" in time_command((10, 3, 0), "a.plan", "t", "p")


def test_10_and_11_measure_the_same():
    """11 flips three defaults; all else that times is said in the same words."""
    ten, eleven = (time_command(v, "a.plan", "t") for v in ((10, 16, 2), (11, 1, 0)))
    assert set(eleven) - set(ten) == {"--noCudaGraph", "--noSpinWait", "--includeDataTransfers"} and set(ten) <= set(eleven)


@pytest.mark.parametrize(
    "version, precision, calibration, said",
    [
        ((7, 1, 3), "int8", "", "7.1.3 cannot read Q/DQ graphs"),
        ((11, 1, 0), "int8", "cache", "11.1.0 has no calibrators"),
        ((8, 5, 2), "fp16", "cache", "calibration cache is for int8, not fp16"),
        ((6, 0, 1), "fp32", "", "begin with 7.1"),
    ],
)
def test_what_a_version_cannot_take_is_refused(version, precision, calibration, said):
    with pytest.raises(Unsupported, match=said):
        build_command(version, "a", "b", precision, calibration)


# Calibration caches


def test_a_calibration_cache_is_nvidias():
    """The form of NVIDIA's example (sampleINT8's README); 3c010204 is 1 / 127, as in a cache of TensorRT 10.3 for images in [0, 1]."""
    text = calibration_cache({"x": 1 / 127, "stages.0.0:out": 2.0, "(Unnamed Layer* 4)": 0.5}, (8, 5, 2))
    assert text == "TRT-8502-EntropyCalibration2\nx: 3c010204\nstages.0.0:out: 40000000\n(Unnamed Layer* 4): 3f000000\n"
    assert calibration_cache({}, (10, 16, 2)) == "TRT-101602-EntropyCalibration2\n"


@given(st.dictionaries(st.text("abc.:/_ ()*", min_size=1), st.floats(2.0**-40, 2.0**40, width=32), max_size=5))
def test_trtexec_reads_back_what_was_written(scales):
    """As readScalesFromCalibrationCache does: the last colon, then eight digits two characters on."""
    found = {}
    for line in calibration_cache(scales, (8, 5, 2)).splitlines()[1:]:
        colon = line.rindex(":")
        found[line[:colon]] = struct.unpack(">f", bytes.fromhex(line[colon + 2 : colon + 10]))[0]
    assert found == scales


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_none_is_refused(scale):
    with pytest.raises(AnytimeError, match="scale of 'x'"):
        calibration_cache({"x": scale}, (8, 5, 2))


# Exported files: NVIDIA/TensorRT v8.6.1, tools/experimental/trt-engine-explorer/examples/pytorch/resnet/A100 (Apache-2.0), shortened

TIMES = """[
{ "startEnqMs": 2.67333, "endEnqMs": 2.70722, "startH2dMs": 2.57741, "endH2dMs": 2.57741, "startComputeMs": 2.57741,
"endComputeMs": 3.45088, "startD2hMs": 3.45088, "endD2hMs": 3.45088, "h2dMs": 0, "computeMs": 0.873472, "d2hMs": 0, "latencyMs": 0.873472 },
{ "startEnqMs": 2.71417, "endEnqMs": 2.72443, "startH2dMs": 3.45702, "endH2dMs": 3.45702, "startComputeMs": 3.45702,
"endComputeMs": 4.30182, "startD2hMs": 4.30182, "endD2hMs": 4.30182, "h2dMs": 0, "computeMs": 0.8448, "d2hMs": 0, "latencyMs": 0.8448 }
]"""
PROFILE = """
[
  { "count" : 1 }
, { "name" : "Reformatting CopyNode for Input Tensor 0 to Conv_0 + Relu_1"
, "timeMs" : 0.080896, "averageMs" : 0.080896, "medianMs" : 0.080896, "percentage" : 7.95569 }
, { "name" : "Conv_0 + Relu_1", "timeMs" : 0.111616, "averageMs" : 0.111616, "percentage" : 10.9768 }
]
"""
LAYERS = """{"Layers": [
{"Name": "QuantizeLinear_2", "LayerType": "Reformat", "Inputs": [{"Name": "input.1", "Format/Datatype": "Row major linear FP32"}],
 "Outputs": [{"Name": "a", "Format/Datatype": "Four wide channel vectorized row major Int8 format"}], "Origin": "QDQ"},
{"Name": "conv1.weight + QuantizeLinear_7 + Conv_9", "LayerType": "CaskConvolution",
 "Inputs": [{"Name": "a", "Format/Datatype": "Four wide channel vectorized row major Int8 format"}],
 "Outputs": [{"Name": "b", "Format/Datatype": "Row major linear FP32"}], "Weights": {"Type": "Int8", "Count": 9408}},
{"Name": "GlobalAveragePool_246", "LayerType": "TiledPooling",
 "Inputs": [{"Name": "c", "Format/Datatype": "Two wide channel vectorized row major FP16 format"}], "Outputs": []}
], "Bindings": ["input.1", "422"]}"""


def test_exported_times():
    got = times(TIMES, (8, 6, 1))
    assert got == {"latency": [0.873472, 0.8448], "compute": [0.873472, 0.8448], "h2d": [0, 0], "d2h": [0, 0]}
    assert times(TIMES, (8, 4, 1), warm_up_ms=3)["compute"] == [0.8448]  # which writes the warm-up too
    older = '[ { "startComputeMs" : 1200, "inMs" : 0.1, "computeMs" : 2, "outMs" : 0.3, "latencyMs" : 2.4, "endToEndMs" : 3 } ]'
    assert times(older, (7, 1, 3)) == {"h2d": [0.1], "compute": [2], "d2h": [0.3], "latency": [2.4]}


def test_exported_profile():
    first, second = profile(PROFILE)
    assert (first.total_ms, first.median_ms, first.share) == (0.080896, 0.080896, pytest.approx(0.0795569))
    assert second.name == "Conv_0 + Relu_1" and second.median_ms is None  # before 8.4


def test_exported_layers():
    q, conv, pool = kernels(LAYERS)
    assert (q.reformat, q.precision, q.weights) == (True, "fp32", None)
    assert (conv.precision, conv.weights, conv.reformat) == ("int8", 9408, False)
    assert conv.nodes == ("conv1.weight", "QuantizeLinear_7", "Conv_9")
    assert pool.precision == "fp16"
    eleven = {
        "Layers": [
            {"Name": "k", "LayerType": "gemm", "Metadata": "[ONNX Layer: heads.0.2]\x1e[ONNX Layer: logits]",
             "Inputs": [{"Format": "LINEAR", "DataType": "FP16"}], "Weights": {"Type": "Half", "Count": 3}},
            {"Name": "float in", "Inputs": [{"DataType": "FP32"}], "Weights": {"Type": "Int8", "Count": 3}},
            "names only",
        ],
        "I/O Tensors": [],
    }  # fmt: skip
    gemm, half, bare = kernels(json.dumps(eleven))
    assert (gemm.precision, gemm.nodes) == ("fp16", ("heads.0.2", "logits", "k"))
    assert half.precision == "fp32"  # integers on one side only are not multiplied as integers
    assert (bare.name, bare.precision) == ("names only", None)


def test_exported_outputs():
    text = '[\n  { "name" : "logits"\n  , "dimensions" : "1x3"\n  , "values" : [ 0.5, -1, 2e-3 ]\n  }\n]\n'
    assert outputs(text) == {"logits": ([1, 3], [0.5, -1, 0.002])}


@pytest.mark.parametrize(
    "parse", [lambda t: times(t, (8, 6, 1)), profile, kernels, outputs], ids=["times", "profile", "layers", "outputs"]
)
@given(st.data())
def test_a_cut_file_is_an_error(parse, data):
    text = data.draw(st.sampled_from([TIMES, PROFILE, LAYERS])).strip()
    with pytest.raises(AnytimeError, match="cut off or broken"):
        parse(text[: data.draw(st.integers(0, len(text) - 1))])


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda: times("[]", (8, 6, 1)), "no query after the warm-up"),
        (lambda: times('[{"startMs": 1}]', (8, 6, 1)), "no computeMs"),
        (lambda: times('[{"computeMs": -1}]', (8, 6, 1)), "computeMs = -1"),
        (lambda: times('[{"computeMs": NaN}]', (8, 6, 1)), "computeMs = nan"),
        (lambda: profile('[{"name": "a"}]'), "does not begin with a count"),
        (lambda: kernels("{}"), "has no Layers"),
        (lambda: kernels("[]"), "not known here"),
        (lambda: outputs('[{"name": "a"}]'), "not known here"),
    ],
)
def test_another_form_is_refused(call, said):
    with pytest.raises(AnytimeError, match=said):
        call()
