"""What a board is and in which state, as JSON: one file, Python 3.6, standard library only, so that it can be handed over through a pipe.

python3 machine.py          with its engines, each asked in a process of its own
python3 machine.py alone    without them
"""

import glob
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from typing import Any, Dict, List, Optional

JETSON = ("nvidia-l4t-core", "nvidia-jetpack", "tensorrt", "libnvinfer-bin", "libnvinfer7", "libnvinfer8", "libnvinfer10")


def state() -> Dict[str, Any]:
    """What this machine is and in which state: texts as they stand, for the host to read. JETSON_SYSROOT goes before every path."""
    root = os.environ.get("JETSON_SYSROOT", "")
    cpus = sorted(glob.glob(root + "/sys/devices/system/cpu/cpu[0-9]*/cpufreq"))
    gpus = [p for p in sorted(glob.glob(root + "/sys/class/devfreq/*")) if re.search(r"gpu|gv11b|gp10b|ga10b", p)]
    return {
        "model": read(root + "/proc/device-tree/model"),
        "compatible": read(root + "/proc/device-tree/compatible"),
        "nv_tegra_release": read(root + "/etc/nv_tegra_release"),
        "nvpmodel": _nvpmodel(root),
        "packages": _packages(root),
        "cuda": _cuda(root),
        "cpu_khz": [_limits(p, "scaling_%s_freq") for p in cpus],
        "gpu_hz": [_limits(p, "%s_freq") for p in gpus],
        "celsius": _temperatures(root),
        "throttling": _throttling(root),
        "pressure_us": stalled_us(),
        "emulated": _emulated(root),
        "cpu": _cpu(),
        "cores": _cores(),
        "machine": platform.machine(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "free_bytes": shutil.disk_usage(".").free,
        "tools": {name: tool(name) for name in ("trtexec", "tegrastats")},
    }


def engines() -> Dict[str, str]:
    """Engine -> its version and what it offers, "" where it is not there, or why it cannot be used.

    Asked in processes of their own: an import may crash. What trtexec says first, whatever it is asked, is its version: "v8502".
    """
    asked = {
        "numpy": "import numpy; print(numpy.__version__)",
        "onnxruntime": "import onnxruntime as o; print(o.__version__, *o.get_available_providers())",
        "tensorrt": "import tensorrt; print(tensorrt.__version__)",
    }
    said = {}
    for name, code in asked.items():
        words = _said_by([sys.executable, "-B", "-c", code])
        said[name] = "" if "ModuleNotFoundError" in words else words.split("\n")[-1]
    trtexec = tool("trtexec")
    words = _said_by([trtexec, "--help"]) if trtexec else ""
    version = re.search(r"^&&&& RUNNING TensorRT\.trtexec(?: \[TensorRT (v\d+)\])?", words, re.M)
    said["trtexec"] = (version.group(1) or "of an unnamed version") if version else words.split("\n")[-1]
    return said


def _said_by(command: List[str]) -> str:
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(), timeout=120)
    except subprocess.TimeoutExpired:
        return "broken: it took longer than 120 s to say its version"
    except OSError as error:
        return "broken: %s" % error
    words = (done.stderr if done.returncode else done.stdout).decode("utf-8", "replace").strip()
    return "broken: %s" % how_it_ended(done.returncode, words.split("\n")[-1]) if done.returncode else words


def how_it_ended(code: int, words: str) -> str:
    """A process's exit status and last words, as the end of a sentence."""
    said = ": %s" % words.strip() if words else ", without a word"
    if code >= 0:
        return "failed" + said
    try:
        return "was killed by %s%s" % (signal.Signals(-code).name, said)
    except ValueError:
        return "was killed by signal %d%s" % (-code, said)


def environment(**more: str) -> Dict[str, str]:
    """That of processes that import engines. ONNX Runtime 1.31 writes a device id and a data base of usage to the user's cache."""
    return dict(os.environ, ORT_DISABLE_TELEMETRY="1", **more)


def tool(name: str) -> str:
    """Where one of NVIDIA's tools lies; "" where it does not."""
    return shutil.which(name) or _there("/usr/src/tensorrt/bin/" + name)


def read(path: str) -> str:
    """A file's text without its ends; "" where it cannot be read."""
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
    for about in read(root + "/var/lib/dpkg/status").split("\n\n"):
        name, version = re.search(r"^Package: (\S+)$", about, re.M), re.search(r"^Version: (\S+)$", about, re.M)
        if name and version and name.group(1) in JETSON and "\nStatus: install ok installed" in about:
            found[name.group(1)] = version.group(1)
    return found


def _cuda(root: str) -> str:
    try:
        return str(json.loads(read(root + "/usr/local/cuda/version.json"))["cuda"]["version"])
    except (ValueError, KeyError):
        return read(root + "/usr/local/cuda/version.txt").replace("CUDA Version", "").strip()


def _limits(folder: str, name: str) -> List[str]:
    """Frequency now, least and largest; a clock that jetson_clocks has fixed has all three alike."""
    return [read(os.path.join(folder, name % which)) for which in ("cur", "min", "max")]


def _temperatures(root: str) -> Dict[str, float]:
    found = {}
    for zone in sorted(glob.glob(root + "/sys/class/thermal/thermal_zone*")):
        kind, milli = read(zone + "/type"), read(zone + "/temp")
        # A sensor that is off says -256; PMIC is a constant.
        if kind and re.match(r"-?\d+$", milli) and int(milli) > -200000 and not kind.startswith("PMIC"):
            found[kind] = int(milli) / 1e3
    return found


def _throttling(root: str) -> Dict[str, int]:
    """Cooling that is at work, but for fans, and how often a rail's current was over its limit since the start of the system."""
    found = {}
    for device in sorted(glob.glob(root + "/sys/class/thermal/cooling_device*")):
        kind, level = read(device + "/type"), read(device + "/cur_state")
        if level.isdigit() and int(level) and "fan" not in kind.lower():
            found[kind] = int(level)
    for count in sorted(glob.glob(root + "/sys/class/hwmon/hwmon*/oc*_event_cnt")):
        if read(count).isdigit() and int(read(count)):
            found[os.path.basename(count)] = int(read(count))
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
    said = re.search(r"^(?:model name|CPU part)\s*:\s*(.*)$", read("/proc/cpuinfo"), re.M)
    return said.group(1) if said else platform.processor()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def stalled_us() -> Optional[int]:
    """us since the start of the system in which some task waited for a CPU; None where the kernel does not say."""
    total = re.search(r"some .*total=(\d+)", read("/proc/pressure/cpu"))
    return int(total.group(1)) if total else None


if __name__ == "__main__":
    print(json.dumps(dict(state(), engines={} if "alone" in sys.argv else engines())))
