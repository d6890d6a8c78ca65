"""Small pictures of the test images that pages show, kept in results/pictures: pages are made where no data lie.

A file per test part: {"classes": [names], "images": {index: PNG in base64}}, named by the digest of the labels, which
predictions hold too.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from anytime import record
from anytime.errors import DataError
from anytime.files import write_atomically
from anytime.gather import gather
from anytime.page.data import decided, digest_of, groups

if TYPE_CHECKING:
    from anytime.config import Experiment

_BASE64 = re.compile(r"[A-Za-z0-9+/]*={0,2}")


class Pictures:
    """What is kept in ``results``, and which of it a page has shown: every picture is in the page once, as a CSS class."""

    def __init__(self, results: Path) -> None:
        self.folder = results / "pictures"
        self.kept: dict[str, dict[str, Any]] = {}
        self.shown: dict[tuple[str, int], str] = {}

    def html(self, digest: str, index: int) -> str:
        """The element of one image; empty where it is not kept."""
        if str(index) not in self.kept_of(digest)["images"]:
            return ""
        name = self.shown.setdefault((digest, index), f"p{len(self.shown)}")
        return f'<i class="picture {name}" role="img" aria-label="test image {index}"></i>'

    def label(self, digest: str, label: int) -> str:
        """The name of a class, else its number."""
        classes = self.kept_of(digest)["classes"]
        return str(classes[label]) if label < len(classes) else f"class {label}"

    def css(self) -> str:
        """The rules of the pictures shown."""
        rules = []
        for (digest, index), name in self.shown.items():
            text = self.kept_of(digest)["images"][str(index)]
            rules.append(f".{name}{{background-image:url(data:image/png;base64,{text})}}\n")
        return "".join(rules)

    def kept_of(self, digest: str) -> dict[str, Any]:
        """The file of these test samples; an empty one where there is none, or none of ours."""
        if digest not in self.kept:
            try:
                said = json.loads((self.folder / f"{digest}.json").read_text())
                fine = isinstance(said["classes"], list) and all(_BASE64.fullmatch(text) for text in said["images"].values())
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                fine = False
            self.kept[digest] = said if fine else {"classes": [], "images": {}}
        return self.kept[digest]


def keep(exp: Experiment, results: Path) -> list[Path]:
    """Keep the pictures that the page of ``exp`` shows and that are not kept yet; the files that were written.

    Data are read only where something lacks. Raises WriteError when a file cannot be written.
    """
    wanted: dict[str, set[int]] = defaultdict(set)
    for found in filter(None, map(decided, groups(gather(record.load(results / "records", exp.name).records, [])))):
        wanted[found.digest] |= {int(i) for indices in found.shown for i in indices}
    pictures, written = Pictures(results), []
    lacking = {
        name for name, indices in wanted.items() if not {str(i) for i in indices} <= pictures.kept_of(name)["images"].keys()
    }
    for suite in exp.suites if lacking else ():
        try:
            data = suite.data.load(exp.seeds[0])
        except DataError:
            continue  # the page says that pictures are not kept
        name = digest_of(np.asarray(data.test.y))
        if name in lacking and data.test.x.ndim == 4:
            p = data.preprocessing
            pixels = np.asarray(data.test.x) * np.reshape(p.std, (-1, 1, 1)) + np.reshape(p.mean, (-1, 1, 1))
            images = pictures.kept_of(name)["images"] | {str(i): _png(pixels[i]) for i in sorted(wanted[name])}
            written.append(results / "pictures" / f"{name}.json")
            said = {"classes": list(data.classes), "images": images}
            write_atomically(written[-1], (json.dumps(said, indent=0, sort_keys=True) + "\n").encode())
    return written


def _png(pixels: Any) -> str:
    """Pixels [C, H, W] in [0, 1]: of 3 channels colours, else the first as grey."""
    from PIL import Image

    body, shown = io.BytesIO(), np.rint(np.clip(pixels, 0, 1) * 255).astype(np.uint8).transpose(1, 2, 0)
    Image.fromarray(shown if shown.shape[-1] == 3 else shown[..., 0]).save(body, "PNG", optimize=True)
    return base64.b64encode(body.getvalue()).decode()
