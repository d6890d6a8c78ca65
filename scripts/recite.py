"""Put the numbers that the pages' citations give in the place of those before them, and print what changed.

    python scripts/recite.py [results/README.md ...]

For after a report: tests/test_numbers.py says which numbers are no longer those of the records, this writes them. Words around
them are for you to read again.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.test_numbers import NUMBER, PAGES, SOURCE, cited, measured  # noqa: E402


def like(old, value):
    """``value`` with the digits and the sign's form of ``old``; ``old`` itself where it says as much."""
    sign, digits = old[1], old[2]
    decimals = len(digits.partition(".")[2])
    was = float(digits.replace(",", "")) * (-1 if sign in ("-", "−") else 1)
    if abs(was - value) <= 0.5000001 * 10**-decimals:
        return sign + digits
    said = f"{abs(value):{',' if ',' in digits else ''}.{decimals}f}"
    zero = not float(said.replace(",", ""))
    return ("" if zero else "−" if value < 0 else "+" if sign == "+" else "") + said


def recited(page):
    """The text of a page with its cited numbers as the tables have them."""
    text, done, at = page.read_text(), [], 0
    for source in SOURCE.finditer(text):
        since = text[at : source.start()]
        begins = max(since.rfind(mark) for mark in ("\n\n", "\n|", "\n- ", "\n**"))
        before, said = (since[:begins], since[begins:]) if begins >= 0 else ("", since)
        bare = re.sub(r"`[^`]*`|https?://\S+|\]\([^)]*\)", lambda m: "x" * len(m.group()), said)
        numbers = [m for m in NUMBER.finditer(bare) if measured(m, bare)]
        try:
            values = cited(*source.groups(), ROOT / "results")
        except (ValueError, KeyError, OSError, AttributeError) as error:
            print(f"{page.relative_to(ROOT)}: {source.group()} cannot be read: {error}")
            values = []
        for old, value in reversed(list(zip(numbers, values, strict=bool(values)))):
            new, end = like(old, value), old.end(2)
            if new != said[old.start() : end]:
                line = text[: source.start()].count("\n") + 1
                print(f"{page.relative_to(ROOT)}, line {line}: {said[old.start() : end]} -> {new} ({source[1]}: {source[2]})")
                said = said[: old.start()] + new + said[end:]
        done += [before, said, source.group()]
        at = source.end()
    return "".join([*done, text[at:]])


if __name__ == "__main__":
    for name in sys.argv[1:] or PAGES:
        place = ROOT / name
        place.write_text(recited(place))
