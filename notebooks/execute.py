"""Execute the notebooks and write them with what execution gave; with --check compare instead.

    python notebooks/execute.py [--check] [NAME ...]     (make notebooks)

Each runs beside a copy of results/ that holds records and zoo only, so nothing of this machine's cache gets in. A cell with the
tag ``varies`` shows times or what was trained on this machine: of its output only the words are compared. A notebook whose
outputs say what they said before is not written.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "results"
LIMIT_S = 900  # of one cell
COMPARED = ("text/plain", "text/html")  # pictures differ between versions of matplotlib


def executed(path: Path) -> Any:
    """The notebook with its outputs made anew; raises CellExecutionError."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as root:
        (folder := Path(root) / "notebooks").mkdir()
        (Path(root) / "results").mkdir()
        for name in ("records", "zoo"):
            (Path(root) / "results" / name).symlink_to(RESULTS / name)
        NotebookClient(
            notebook, timeout=LIMIT_S, record_timing=False, resources={"metadata": {"path": str(folder)}},
            extra_arguments=["--log-level=ERROR"],  # else it warns that it talks to us in plain text
        ).execute(env=os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"})  # fmt: skip
    # What of the metadata depends on the machine is nobody's result.
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return notebook


def differences(old: Any, new: Any) -> list[str]:
    """A sentence per code cell whose output is not what it was."""
    said = []
    for i, (before, after) in enumerate(zip(old.cells, new.cells, strict=True)):
        if after.cell_type == "code" and (was := _words(before)) != (now := _words(after)):
            said.append(f"cell {i + 1} ({after.source.splitlines()[-1]}) says\n{now}\nwhere it said\n{was}")
    return said


def _words(cell: Any) -> str:
    """What a cell shows, as text; without its numbers where they vary."""
    shown = []
    for output in cell.outputs:
        shown += [output.text] if output.output_type == "stream" else [output.data.get(kind, "") for kind in COMPARED]
    text = "\n".join(shown)
    return re.sub(r"[-+]?\d[\d.]*(e-?\d+)?|[\s-]+", " ", text) if "varies" in cell.metadata.get("tags", ()) else text


def main() -> int:
    """Answer 1 where a notebook fails, or with --check differs."""
    top = argparse.ArgumentParser(description="execute the notebooks and write what they give")
    top.add_argument("names", nargs="*", metavar="NAME", help="as 01_your_first_table; default: all")
    top.add_argument("--check", action="store_true", help="compare with what is committed, write nothing")
    asked = top.parse_args()
    bad = False
    for path in [HERE / f"{name}.ipynb" for name in asked.names] or sorted(HERE.glob("*.ipynb")):
        try:
            new = executed(path)
        except (CellExecutionError, OSError) as error:
            print(f"{path.name} fails: {error}", file=sys.stderr)
            bad = True
            continue
        said = differences(nbformat.read(path, as_version=4), new)
        if said and not asked.check:
            nbformat.write(new, path)
        bad |= bool(said) and asked.check
        print(f"{path.name}: {'differs' if said and asked.check else 'written' if said else 'as it was'}")
        if asked.check:
            print(*said, sep="\n", end="")
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
