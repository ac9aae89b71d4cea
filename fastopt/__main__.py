"""The command line: ``fastopt info`` and ``fastopt demo``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import fastopt


def png(text: str) -> Path:
    if not text.lower().endswith(".png"):
        raise argparse.ArgumentTypeError(f"must end in .png, got {text!r}")
    return Path(text)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer >= 1, got {text!r}")
    return int(text)


def seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be an integer >= 0, got {text!r}")
    return int(text)


def check_writable(path: Path) -> None:
    """Raise OSError now rather than after the training."""
    existed = path.exists()
    path.open("ab").close()
    if not existed:
        path.unlink()


def run_info() -> None:
    from fastopt.info import info

    info()


def run_demo(output: Path, epochs: int, seed: int) -> None:
    try:
        from fastopt.demo import demo
    except ImportError as error:
        sys.exit(f"fastopt demo: {error}; pip install '.[demo]' in fastopt's folder")
    try:
        check_writable(output)
    except OSError as error:
        sys.exit(f"fastopt demo: cannot write {output}: {error.strerror}")
    demo(output, epochs, seed)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="fastopt",
        description="Optimizers written once, at memory speed everywhere, with the "
        "same bits.",
    )
    parser.add_argument(
        "--version", action="version", version=f"fastopt {fastopt.__version__}"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    about = "say what is installed, what a step will use, and why"
    commands.add_parser("info", help=about, description=about).set_defaults(
        run=run_info
    )

    about = "train a small network with five optimizers; compare them and their speed"
    command = commands.add_parser(
        "demo",
        help=about,
        description=about,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.add_argument(
        "--output", type=png, default="demo.png", help="the picture to write"
    )
    command.add_argument(
        "--epochs", type=positive, default=100, help="passes over the training images"
    )
    command.add_argument(
        "--seed", type=seed, default=0, help="for the first weights and the batches"
    )
    command.set_defaults(run=run_demo)

    chosen = vars(parser.parse_args(arguments))
    chosen.pop("run")(**chosen)


if __name__ == "__main__":
    main()
