"""Runs on a board: networks of bundles on real samples, each task in a process of its own; finished results stay, whatever ends.

One file, Python 3.6 syntax, standard library and numpy, no import of ours but stops.py beside it: both are copied to the board with
the job (see ssh.py). It installs nothing and writes nothing outside its folder.

    python3 agent.py state [alone]   what this machine is and in which state, as JSON; alone: without its engines
    python3 agent.py run             every task of ./job.json whose result is not in ./results
    python3 agent.py task NAME       one of them

A result is results/NAME.npz: arrays, and ``said``, JSON with the state of the board before and after. What cannot be done is
results/NAME.error, one sentence. Either is there whole or not at all.
"""

import contextlib
import ctypes
import gc
import glob
import hashlib
import json
import os
import platform
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from typing import Any, Callable, Dict, List, Optional, Tuple

try:
    import numpy as np
except ImportError as _missing:  # ``state`` must be able to say so
    if "task" in sys.argv:
        raise _missing

SCHEMA = 1
TURN, REFRESH = 8, 3  # samples of a turn; untimed ones before them: as boards/host.py does
JETSON = ("nvidia-l4t-core", "nvidia-jetpack", "tensorrt", "libnvinfer-bin", "libnvinfer7", "libnvinfer8", "libnvinfer10")


class Refused(Exception):
    """A sentence: what is wrong with this job or this board."""


# The machine


def state() -> Dict[str, Any]:
    """What this machine is and in which state: texts as they stand, for the host to read. JETSON_SYSROOT goes before every path."""
    root = os.environ.get("JETSON_SYSROOT", "")
    cpus = sorted(glob.glob(root + "/sys/devices/system/cpu/cpu[0-9]*/cpufreq"))
    gpus = [p for p in sorted(glob.glob(root + "/sys/class/devfreq/*")) if re.search(r"gpu|gv11b|gp10b|ga10b", p)]
    return {
        "model": _read(root + "/proc/device-tree/model"),
        "compatible": _read(root + "/proc/device-tree/compatible"),
        "nv_tegra_release": _read(root + "/etc/nv_tegra_release"),
        "nvpmodel": _nvpmodel(root),
        "packages": _packages(root),
        "cuda": _cuda(root),
        "cpu_khz": [_limits(p, "scaling_%s_freq") for p in cpus],
        "gpu_hz": [_limits(p, "%s_freq") for p in gpus],
        "celsius": _temperatures(root),
        "throttling": _throttling(root),
        "pressure_us": _stalled_us(),
        "emulated": _emulated(root),
        "cpu": _cpu(),
        "cores": _cores(),
        "machine": platform.machine(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "free_bytes": shutil.disk_usage(".").free,
        "tools": {tool: shutil.which(tool) or _there("/usr/src/tensorrt/bin/" + tool) for tool in ("trtexec", "tegrastats")},
    }


def engines() -> Dict[str, str]:
    """Package -> its version and what it offers, or why it cannot be used; asked in processes of their own: an import may crash."""
    asked = {
        "numpy": "import numpy; print(numpy.__version__)",
        "onnxruntime": "import onnxruntime as o; print(o.__version__, *o.get_available_providers())",
        "tensorrt": "import tensorrt; print(tensorrt.__version__)",
    }
    said = {}
    for package, code in asked.items():
        try:
            done = subprocess.run(
                [sys.executable, "-B", "-c", code],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=_environment(),
                timeout=120,
            )
        except subprocess.TimeoutExpired:
            said[package] = "broken: its import took longer than 120 s"
            continue
        words = (done.stdout if done.returncode == 0 else done.stderr).decode("utf-8", "replace").strip().split("\n")
        said[package] = words[-1] if done.returncode == 0 else "broken: %s" % _how_it_ended(done.returncode, words[-1])
        if "ModuleNotFoundError" in words[-1]:
            said[package] = ""
    return said


def _environment(**more: str) -> Dict[str, str]:
    """That of processes that import engines. ONNX Runtime 1.31 writes a device id and a data base of usage to the user's cache."""
    return dict(os.environ, ORT_DISABLE_TELEMETRY="1", **more)


def _read(path: str) -> str:
    try:
        with open(path, "rb") as f:
            return f.read().decode("utf-8", "replace").replace("\0", " ").strip()
    except OSError:
        return ""


def _there(path: str) -> str:
    return path if os.path.exists(path) else ""


def _nvpmodel(root: str) -> str:
    tool = _there(root + "/usr/sbin/nvpmodel") or ("" if root else shutil.which("nvpmodel") or "")
    if not tool:
        return ""
    try:
        done = subprocess.run(
            [tool, "-q"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return "NVPM ERROR: %s\n" % error
    return done.stdout.decode("utf-8", "replace")


def _packages(root: str) -> Dict[str, str]:
    found = {}
    for about in _read(root + "/var/lib/dpkg/status").split("\n\n"):
        name, version = re.search(r"^Package: (\S+)$", about, re.M), re.search(r"^Version: (\S+)$", about, re.M)
        if name and version and name.group(1) in JETSON and "\nStatus: install ok installed" in about:
            found[name.group(1)] = version.group(1)
    return found


def _cuda(root: str) -> str:
    try:
        return str(json.loads(_read(root + "/usr/local/cuda/version.json"))["cuda"]["version"])
    except (ValueError, KeyError):
        return _read(root + "/usr/local/cuda/version.txt").replace("CUDA Version", "").strip()


def _limits(folder: str, name: str) -> List[str]:
    """Frequency now, least and largest; a clock that jetson_clocks has fixed has all three alike."""
    return [_read(os.path.join(folder, name % which)) for which in ("cur", "min", "max")]


def _temperatures(root: str) -> Dict[str, float]:
    found = {}
    for zone in sorted(glob.glob(root + "/sys/class/thermal/thermal_zone*")):
        kind, milli = _read(zone + "/type"), _read(zone + "/temp")
        # A sensor that is off says -256; PMIC is a constant.
        if kind and re.match(r"-?\d+$", milli) and int(milli) > -200000 and not kind.startswith("PMIC"):
            found[kind] = int(milli) / 1e3
    return found


def _throttling(root: str) -> Dict[str, int]:
    """Cooling that is at work, but for fans, and how often a rail's current was over its limit since the start of the system."""
    found = {}
    for device in sorted(glob.glob(root + "/sys/class/thermal/cooling_device*")):
        kind, level = _read(device + "/type"), _read(device + "/cur_state")
        if level.isdigit() and int(level) and "fan" not in kind.lower():
            found[kind] = int(level)
    for count in sorted(glob.glob(root + "/sys/class/hwmon/hwmon*/oc*_event_cnt")):
        if _read(count).isdigit() and int(_read(count)):
            found[os.path.basename(count)] = int(_read(count))
    return found


def _emulated(root: str) -> str:
    """Why this is no real board; "" where nothing says so. The interpreter of an emulated process is seen from its child."""
    if root:
        return "its identity is read from %s" % root
    try:
        asked = ["readlink", "/proc/%d/exe" % os.getpid()]
        interpreter = subprocess.check_output(asked, stderr=subprocess.DEVNULL, timeout=10).decode("utf-8", "replace").strip()
    except (OSError, subprocess.SubprocessError):
        interpreter = ""
    return "its processes run in %s" % interpreter if "qemu" in interpreter else ""


def _cpu() -> str:
    said = re.search(r"^(?:model name|CPU part)\s*:\s*(.*)$", _read("/proc/cpuinfo"), re.M)
    return said.group(1) if said else platform.processor()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _stalled_us() -> Optional[int]:
    """us since the start of the system in which some task waited for a CPU; None where the kernel does not say."""
    total = re.search(r"some .*total=(\d+)", _read("/proc/pressure/cpu"))
    return int(total.group(1)) if total else None


# Engines: a class each, chosen by name. Inputs in the graph's order -> outputs in the graph's order


class OnnxRuntime:
    """A graph in a session of ONNX Runtime; it must run where the job wants it, and not fall back in silence."""

    def __init__(self, path: str, manifest: Dict[str, Any], job: Dict[str, Any]) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = job["threads"], 1
        options.log_severity_level = 3
        # See anytime/engine.py: it would quantize what was kept in float on purpose.
        off = [] if manifest["float_biases"] else ["WeightBiasQuantization"]
        wanted = job["provider"]
        self.session = onnxruntime.InferenceSession(path, options, providers=[wanted], disabled_optimizers=off)
        got = self.session.get_providers()
        if not got or got[0] != wanted:
            raise Refused("ONNX Runtime runs on %s here, not on %s as was asked for" % (" and ".join(got) or "nothing", wanted))
        self.inputs = [i.name for i in self.session.get_inputs()]
        self.outputs = [o.name for o in self.session.get_outputs()]
        self.facts = {"engine": "onnxruntime %s" % onnxruntime.__version__, "provider": got[0]}

    def run(self, inputs: List[Any]) -> List[Any]:
        return list(self.session.run(self.outputs, dict(zip(self.inputs, inputs))))


ENGINES = {"onnxruntime": OnnxRuntime}  # name -> class(path, manifest, job) with run() and facts


class Net:
    """A bundle, opened: its segments by (first, stop, head)."""

    def __init__(self, folder: str, job: Dict[str, Any]) -> None:
        with open(os.path.join(folder, "manifest.json"), encoding="utf-8") as f:
            self.manifest = json.load(f)
        if self.manifest.get("kind") != "anytime bundle" or self.manifest.get("schema") != SCHEMA:
            raise Refused("%s is no bundle of schema %d: copy agent and bundle from one version of anytime" % (folder, SCHEMA))
        name = job["engine"]
        if name not in ENGINES:
            raise Refused("there is no engine %r; there is %s" % (name, ", ".join(sorted(ENGINES))))
        self.n_exits, self.restarts = self.manifest["n_exits"], self.manifest["restarts"]
        self.segments = {}  # type: Dict[Tuple[int, int, Optional[int]], Any]
        for said in self.manifest["segments"]:
            path = os.path.join(folder, os.path.basename(said["file"]))
            with open(path, "rb") as graph:
                if hashlib.sha256(graph.read()).hexdigest() != said["sha256"]:
                    raise Refused("%s is not as it was written (its sha256 differs): send the bundle again" % path)
            self.segments[said["first"], said["stop"], said["head"]] = ENGINES[name](path, self.manifest, job)

    def step(self, segment: Tuple[int, int, Optional[int]], entered: List[Any]) -> Tuple[List[Any], Any]:
        """State before the segment -> state after it, and logits where it has a head."""
        out = self.segments[segment].run(entered)
        if segment[2] is None:
            return out, None
        return (entered if self.restarts else out[1:]), out[0]

    @property
    def heads(self) -> List[Tuple[int, int, Optional[int]]]:
        """Its segments with a head, in their order: what a plan runs."""
        return sorted((s for s in self.segments if s[2] is not None), key=lambda s: s[1])

    @property
    def facts(self) -> Dict[str, str]:
        return dict(next(iter(self.segments.values())).facts)


# What a task does: a function of the job, the task, its networks and ``beat``, to call about once a second; answers arrays


class Links:
    """Times one network link by link: a row holds, per link, wall and CPU s of its stage, then of its head."""

    def __init__(self, net: Net) -> None:
        self.net, self.rows = net, []  # type: Net, List[Any]
        self.links = [((k, k + 1, None), (k + 1, k + 1, k)) for k in range(net.n_exits)]

    def go(self, sample: Any, keep: bool) -> None:
        step, wall, cpu = self.net.step, time.perf_counter, time.process_time
        state, row = None, []  # type: Optional[List[Any]], List[float]
        for stage, head in self.links:
            c0, w0 = cpu(), wall()
            if state is None or self.net.restarts:
                state = [np.ascontiguousarray(sample, dtype=np.float32)]
            state, _ = step(stage, state)
            w1, c1 = wall(), cpu()
            c2, w2 = cpu(), wall()
            step(head, state)
            w3, c3 = wall(), cpu()
            row += [w1 - w0, c1 - c0, w3 - w2, c3 - c2]
        if keep:
            self.rows.append(row)

    def arrays(self) -> Dict[str, Any]:
        ms = 1e3 * np.array(self.rows).reshape(len(self.rows), -1, 4)
        return {name: ms[:, :, i].T for i, name in enumerate(("stage_ms", "stage_cpu_ms", "head_ms", "head_cpu_ms"))}


class Replay:
    """Executes one policy on its network's plan, from the sample to the class of the exit taken."""

    def __init__(self, net: Net, policy: Dict[str, Any]) -> None:
        import stops

        self.net, self.plan = net, net.heads
        self.rows, self.read, self.now = [], [], []  # type: List[List[float]], List[Any], List[Any]
        self.tests = [
            (getattr(stops, t["test"]), {k: np.array(v) if isinstance(v, list) else v for k, v in t["arguments"].items()})
            for t in policy["tests"]
        ]
        heads = [segment[2] for segment in self.plan]
        if heads != policy["uses"] or len(self.tests) != len(heads) - 1:
            raise Refused(
                "the policy reads exits %s, the bundle holds %s: send the one that belongs to it" % (policy["uses"], heads)
            )
        self.temperatures = [policy["temperatures"][k] for k in heads] if policy["temperatures"] else []
        self.tempered = stops.tempered

    def go(self, sample: Any, keep: bool) -> None:
        last, read = len(self.plan) - 1, []  # type: int, List[Any]
        c0, w0 = time.process_time(), time.perf_counter()
        state = [np.ascontiguousarray(sample, dtype=np.float32)]
        for i, segment in enumerate(self.plan):
            state, logits = self.net.step(segment, state)
            read.append(logits)
            if i == last:
                break
            seen = np.stack(read)
            if self.temperatures:
                seen = self.tempered(seen, tuple(self.temperatures[: i + 1]))
            test, arguments = self.tests[i]
            if test(seen, **arguments)[0]:
                break
        said = int(read[-1][0].argmax())
        w1, c1 = time.perf_counter(), time.process_time()
        _finite(read[-1], "exit %d" % (int(segment[2] or 0) + 1))
        if keep:
            self.rows.append([1e3 * (w1 - w0), 1e3 * (c1 - c0), float(segment[2] or 0), float(said)])
            self.read.append(read)

    def arrays(self) -> Dict[str, Any]:
        wall, cpu, exits, answers = np.array(self.rows).T
        logits = np.full((self.net.n_exits, len(self.read), self.read[0][0].shape[-1]), np.nan, np.float32)
        for r, read in enumerate(self.read):
            for segment, z in zip(self.plan, read):
                logits[segment[2], r] = z[0]
        return {"wall_ms": wall, "cpu_ms": cpu, "exits": exits.astype(int), "answers": answers.astype(int), "logits": logits}


def timed(job: Dict[str, Any], task: Dict[str, Any], beat: Callable[[], None]) -> Tuple[Dict[str, Any], Dict[str, Any]]:
    """Networks take turns over the samples, one at a time: link by link, or under the policies of the task."""
    x, opened = np.load(task["x"]), {}  # type: Any, Dict[str, Net]
    runs = []  # type: List[Any]
    for asked in task["nets"]:
        if asked["folder"] not in opened:
            opened[asked["folder"]] = Net(asked["folder"], job)
            beat()
        net = opened[asked["folder"]]
        runs.append(Replay(net, asked["policy"]) if "policy" in asked else Links(net))
    samples = [x[r : r + 1] for r in range(len(x))]
    for run in runs:
        for r in range(max(1, job["warmup"])):
            run.go(samples[r % len(samples)], False)
            beat()
    gc.collect()
    gc.disable()
    stalled, c0, w0 = _stalled_us(), time.process_time(), time.perf_counter()
    for round, first in enumerate(range(0, len(samples), TURN)):
        for turn in range(len(runs)):
            run = runs[(round + turn) % len(runs)]
            for r in range(first - REFRESH, first):
                run.go(samples[r % len(samples)], False)
            for sample in samples[first : first + TURN]:
                run.go(sample, True)
                beat()
    w1, c1, after = time.perf_counter(), time.process_time(), _stalled_us()
    gc.enable()
    said = {
        "wall_s": w1 - w0, "cpu_s": c1 - c0,
        "stalled_us": None if stalled is None or after is None else after - stalled,
        "engines": [run.net.facts for run in runs],
    }  # fmt: skip
    return {"%d.%s" % (i, k): a for i, run in enumerate(runs) for k, a in run.arrays().items()}, said


def predicted(job: Dict[str, Any], task: Dict[str, Any], beat: Callable[[], None]) -> Tuple[Dict[str, Any], Dict[str, Any]]:
    """Logits [E, N, K] of samples first:stop, ``batch`` at a time; exits that the bundle does not hold are left out."""
    net, x = Net(task["folder"], job), np.load(task["x"], mmap_mode="r")[task["first"] : task["stop"]]
    blocks = []
    for i in range(0, len(x), task["batch"]):
        state, rows = [np.ascontiguousarray(x[i : i + task["batch"]], dtype=np.float32)], []
        for segment in net.heads:
            state, logits = net.step(segment, state)
            rows.append(_finite(logits, "exit %d" % (int(segment[2] or 0) + 1)))
        blocks.append(np.stack(rows))
        beat()
    return {"logits": np.concatenate(blocks, axis=1)}, {"engines": [net.facts]}


TASKS = {"time": timed, "predict": predicted}  # kind -> function(job, task, beat): arrays, what is said of them


def _finite(logits: Any, where: str) -> Any:
    if not np.isfinite(logits).all():
        raise Refused("%s answers with logits that are not finite" % where)
    return logits


def do(name: str) -> None:
    """One task, in this process, which ends with its parent; its stdout is the pulse that the parent listens to."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: an orphan would disturb who is timed next
    beat, job = _pulse(), _job()
    task = next(t for t in job["tasks"] if t["name"] == name)
    try:
        before, began = state(), time.time()
        arrays, said = TASKS[task["kind"]](job, task, beat)
        said.update(job=job["id"], task=name, before=before, after=state(), began=began, ended=time.time())
    except Refused as sentence:
        _cannot(name, str(sentence))
        return
    arrays["said"] = np.array(json.dumps(said))
    _write("results/%s.npz" % name, lambda f: np.savez(f, **arrays))


# The parent of all tasks


def run() -> None:
    """Every task that has no result yet; what a task's process dies of is its result."""
    job = _job()
    os.makedirs("results", exist_ok=True)
    for i, task in enumerate(job["tasks"]):
        name = task["name"]
        if any(os.path.exists("results/%s.%s" % (name, kind)) for kind in ("npz", "error")):
            continue
        _progress(job, i, 0)
        died = _supervised(job, i)
        if died and not os.path.exists("results/%s.npz" % name) and not os.path.exists("results/%s.error" % name):
            _cannot(name, died)
    _progress(job, len(job["tasks"]), 0)


def _supervised(job: Dict[str, Any], i: int) -> str:
    """Run task ``i`` in a fresh process, which dies with us; answer how it died, "" where it ended well."""
    name, beats = job["tasks"][i]["name"], 0
    command = [sys.executable, "-B", os.path.abspath(__file__), "task", name]
    env = _environment(OMP_NUM_THREADS=str(job["threads"]))
    with open(name + ".words", "wb") as words:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=words, env=env)
    assert child.stdout is not None
    silent = False
    try:
        while True:
            if not select.select([child.stdout], [], [], job["silence_s"])[0]:
                silent = True
                break
            if not os.read(child.stdout.fileno(), 4096):
                break
            beats += 1
            _progress(job, i, beats)
    finally:
        if silent:
            child.kill()
    child.wait()
    lines = [line for line in _read(name + ".words").split("\n") if line.strip()]
    os.unlink(name + ".words")
    if silent:
        return "gave no sign of life for %g s and was ended" % job["silence_s"]
    return _how_it_ended(child.returncode, lines[-1] if lines else "") if child.returncode else ""


def _how_it_ended(code: int, words: str) -> str:
    said = ": %s" % words.strip() if words else ", without a word"
    if code >= 0:
        return "failed" + said
    try:
        return "was killed by %s%s" % (signal.Signals(-code).name, said)
    except ValueError:
        return "was killed by signal %d%s" % (-code, said)


def _job() -> Dict[str, Any]:
    with open("job.json", encoding="utf-8") as f:
        job = json.load(f)  # type: Dict[str, Any]
    return job


def _progress(job: Dict[str, Any], i: int, beats: int) -> None:
    name = job["tasks"][i]["name"] if i < len(job["tasks"]) else ""
    said = json.dumps({"task": name, "done": i, "of": len(job["tasks"]), "beats": beats})
    _write("progress.json", lambda f: f.write(said.encode("utf-8")))


def _cannot(name: str, sentence: str) -> None:
    _write("results/%s.error" % name, lambda f: f.write(sentence.encode("utf-8")))


def _write(path: str, write: Callable[[Any], Any]) -> None:
    """Whole or not at all, and there after a loss of power."""
    part = "%s.%d.part" % (path, os.getpid())
    with open(part, "wb") as f:
        write(f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(part, path)


def _pulse() -> Callable[[], None]:
    last = [0.0]

    def beat() -> None:
        # Without a parent the write fails, and we end.
        if time.time() - last[0] > 1 or time.time() < last[0]:
            os.write(1, b".")
            last[0] = time.time()

    beat()
    return beat


def main(argv: List[str]) -> int:
    """Do what the host asks, by the words of the command line; answer the exit code."""
    if argv[:1] == ["state"]:
        print(json.dumps(dict(state(), engines={} if "alone" in argv else engines())))
    elif argv == ["run"]:
        run()
    elif argv[:1] == ["task"] and len(argv) == 2:
        do(argv[1])
    else:
        print("agent.py state [alone] | run | task NAME", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
