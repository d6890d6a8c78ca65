"""Runs on a board: networks of bundles on real samples, each task in a process of its own; finished results stay, whatever ends.

The files of this folder and stops.py, Python 3.6 syntax, standard library and numpy, no import of ours but each other: all are copied to
the board with the job (see ssh/job.py). It installs nothing, and writes nothing outside its folder but TensorRT's timing cache.

    python3 agent.py run             every task of ./job.json whose result is not in ./results
    python3 agent.py task NAME       one of them

A result is results/NAME.npz: arrays, and ``said``, JSON with the state of the board before and after. What cannot be done is
results/NAME.error, one sentence. Either is there whole or not at all.
"""

import gc
import json
import os
import select
import subprocess
import sys
import time
from typing import Any, Callable, Dict, List, Tuple

import machine
import numpy as np
import tools
from engines import Net, Refused

TURN, REFRESH = 8, 3  # samples of a turn; untimed ones before them; whose turn it is is drawn: as anytime/stopwatch.py does


# What a task does: a function of the job, the task, its networks and ``beat``, to call about once a second; answers arrays


class Links:
    """Times one network link by link: a row holds, per link, wall and CPU s of its stage, then of its head."""

    def __init__(self, net: Net) -> None:
        self.net, self.rows = net, []  # type: Net, List[Any]
        self.links = [((k, k + 1, None), (k + 1, k + 1, k)) for k in range(net.n_exits)]

    def go(self, sample: Any, keep: bool) -> None:
        step, wall, cpu = self.net.step, time.perf_counter, time.process_time
        state, row = None, []  # type: Any, List[float]
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
        for segment_read, logits in zip(self.plan, read):
            _finite(logits, "exit %d" % (int(segment_read[2] or 0) + 1))
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
    stalled, c0, w0 = machine.stalled_us(), time.process_time(), time.perf_counter()
    order = np.random.RandomState(0)
    for first in range(0, len(samples), TURN):
        for run in [runs[i] for i in order.permutation(len(runs))]:
            for r in range(first - REFRESH, first):
                run.go(samples[r % len(samples)], False)
            for sample in samples[first : first + TURN]:
                run.go(sample, True)
                beat()
    w1, c1, after = time.perf_counter(), time.process_time(), machine.stalled_us()
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


TASKS = {  # kind -> function(job, task, beat): arrays, what is said of them
    "time": timed, "predict": predicted, "build": tools.built, "trtexec": tools.run_by_trtexec, "power": tools.powered,
}  # fmt: skip


def _finite(logits: Any, where: str) -> Any:
    if not np.isfinite(logits).all():
        raise Refused("%s answers with logits that are not finite" % where)
    return logits


def do(name: str) -> None:
    """One task, in this process, which ends with its parent; its stdout is the pulse that the parent listens to."""
    tools.die_with_the_parent()
    beat, job = _pulse(), _job()
    task = next(t for t in job["tasks"] if t["name"] == name)
    try:
        before, began = machine.state(), time.time()
        arrays, said = TASKS[task["kind"]](job, task, beat)
        said.update(job=job["id"], task=name, before=before, after=machine.state(), began=began, ended=time.time())
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
    for task in job["tasks"]:
        name = task["name"]
        if any(os.path.exists("results/%s.%s" % (name, kind)) for kind in ("npz", "error")):
            continue
        died = _supervised(job, name)
        if died and not os.path.exists("results/%s.npz" % name) and not os.path.exists("results/%s.error" % name):
            _cannot(name, died)


def _supervised(job: Dict[str, Any], name: str) -> str:
    """Run task ``name`` in a fresh process, which dies with us; answer how it died, "" where it ended well."""
    command = [sys.executable, "-B", os.path.abspath(__file__), "task", name]
    env = machine.environment(OMP_NUM_THREADS=str(job["threads"]))
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
    finally:
        if silent:
            child.kill()
    child.wait()
    lines = [line for line in machine.read(name + ".words").split("\n") if line.strip()]
    os.unlink(name + ".words")
    if silent:
        return "gave no sign of life for %g s and was ended" % job["silence_s"]
    return machine.how_it_ended(child.returncode, lines[-1] if lines else "") if child.returncode else ""


def _job() -> Dict[str, Any]:
    with open("job.json", encoding="utf-8") as f:
        job = json.load(f)  # type: Dict[str, Any]
    return job


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
    if argv == ["run"]:
        run()
    elif argv[:1] == ["task"] and len(argv) == 2:
        do(argv[1])
    else:
        print("agent.py run | task NAME", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
