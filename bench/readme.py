"""The README's table of speed, from the committed measurement.

    python bench/readme.py            write it
    python bench/readme.py --check    exit 1 if it is not what the measurement says

The table stands between two comments, the first of which names the measurement, a file
that ``fastopt bench`` wrote.
"""

import argparse
import re
import sys
from pathlib import Path

from fastopt.bench import report
from fastopt.bench.cases import title

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
MARKED = re.compile(
    r"(<!-- speed: made by bench/readme\.py from (\S+) -->\n).*?(\n<!-- /speed -->)",
    re.S,
)


def measurement(text: str) -> Path:
    """The file that the README's comment names."""
    marked = MARKED.search(text)
    if not marked:
        raise ValueError(f"{README.name} has no <!-- speed: ... --> to fill")
    return ROOT / marked[2]


def filled(text: str) -> str:
    """The README with the table as it was measured."""
    measured = report.read(measurement(text)).measured
    table = report.markdown([m for m in measured if title(m.case) == "adamw"])
    return MARKED.sub(lambda marked: f"{marked[1]}{table}{marked[3]}", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    text = README.read_text(encoding="utf-8")
    wanted = filled(text)
    if options.check and text != wanted:
        sys.exit("README.md differs from the measurement; run python bench/readme.py")
    if not options.check:
        README.write_text(wanted, encoding="utf-8")


if __name__ == "__main__":
    main()
