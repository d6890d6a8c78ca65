"""Trainings that go on on another machine: what is packed comes back, whole."""

import shutil
import subprocess
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "scripts" / "unfinished.sh"


def test_what_was_packed_is_restored_and_what_is_finished_is_left_alone(tmp_path):
    cache, files = tmp_path / "results" / "cache" / "trained", {
        "a-base/weights.safetensors": b"w" * 5_000_000, "a-base/weights.sha256": b"digest", "b-c-u8s8/checkpoint.pt": b"half way",
    }  # fmt: skip

    def run(what):
        (tmp_path / "scripts").mkdir(exist_ok=True)
        script = shutil.copy(SCRIPT, tmp_path / "scripts")
        return subprocess.run([script, what], check=True, capture_output=True, text=True).stdout

    for name, body in files.items():
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        (cache / name).write_bytes(body)
    run("pack")
    assert max(p.stat().st_size for p in (tmp_path / "results" / "unfinished").rglob("*.part")) < 5_000_000
    shutil.rmtree(cache)
    assert sorted(run("restore").splitlines()) == ["restored a-base", "restored b-c-u8s8"]
    assert {str(p.relative_to(cache)): p.read_bytes() for p in cache.rglob("*") if p.is_file()} == files
    (cache / "b-c-u8s8" / "checkpoint.pt").write_bytes(b"further")
    assert sorted(run("restore").splitlines()) == ["a-base is there already", "b-c-u8s8 is there already"]
    assert (cache / "b-c-u8s8" / "checkpoint.pt").read_bytes() == b"further"
