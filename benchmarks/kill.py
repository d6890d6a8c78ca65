"""kill -9 at 20 random moments of a run, restarted each time: is every number but the times as if nothing had happened?

    python benchmarks/kill.py [N]

Runs the quickstart experiment (its own data, shortened) undisturbed, then killed N times, and compares the records.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from anytime.record import load  # noqa: E402

COMMAND = [sys.executable, "-m", "anytime", "run", "quickstart", "--set", "recipe.epochs=20", "--results"]


def start(results: Path) -> subprocess.Popen[bytes]:
    """The run, in a process of its own."""
    quiet = subprocess.DEVNULL
    return subprocess.Popen(
        [*COMMAND, str(results)], cwd=ROOT, stdout=quiet, stderr=quiet, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def facts(results: Path) -> dict[str, str]:
    """Every fact and what it says, without times."""
    loaded = load(results / "records")
    assert not loaded.troubles, loaded.troubles
    names = [r.fact for r, _ in loaded.records]
    assert len(names) == len(set(names)), "a fact was written twice"
    out = {}
    for r, path in loaded.records:
        timed = r.kind in ("measure", "replay")
        points = [{k: v for k, v in p.items() if "ms" not in k} for p in r.points]
        out[r.fact] = json.dumps([r.kind, r.reason, points, [] if timed else [r.exits, r.layers]], sort_keys=True)
        assert r.kind != "eval" or path.with_suffix(".npz").exists(), "predictions are missing"
    return out


def main() -> None:
    """Run, kill, compare; exit code 1 when anything differs."""
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        whole, cut = Path(folder) / "whole", Path(folder) / "cut"
        started = time.monotonic()
        assert start(whole).wait() == 0
        took = time.monotonic() - started
        killed = 0
        while killed < n:
            run = start(cut)
            time.sleep(rng.uniform(0.5, max(4.0, 1.5 * took / n + 3.5)))
            if run.poll() is not None:
                break  # it came to its end before the last moments
            run.kill()
            run.wait()
            killed += 1
        left = [p for p in (cut / "records").rglob("*") if p.name.startswith((".tmp", "tmp"))]
        assert start(cut).wait() == 0
        a, b = facts(whole), facts(cut)
        differ = [name for name in a.keys() | b.keys() if a.get(name) != b.get(name)]
    print(f"undisturbed: {took:.0f} s, {len(a)} facts; killed {killed} times: {len(b)} facts, {len(differ)} differ, "
          f"0 torn, 0 twice; {len(left)} temporary files were left behind by the kills")  # fmt: skip
    if killed < n:
        print(f"it came to its end after {killed} of {n} kills: nothing is shown; train longer", file=sys.stderr)
    sys.exit(bool(differ) or killed < n)


if __name__ == "__main__":
    main()
