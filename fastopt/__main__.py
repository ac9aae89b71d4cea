"""The command line: ``fastopt info``, ``fastopt demo`` and ``fastopt bench``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import fastopt


def png(text: str) -> Path:
    if not text.lower().endswith(".png"):
        raise argparse.ArgumentTypeError(f"must end in .png, got {text!r}")
    return Path(text)


def at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            wanted = f"must be an integer >= {least}"
            raise argparse.ArgumentTypeError(f"{wanted}, got {text!r}")
        return int(text)

    return number


def size(text: str) -> int:
    """Such as 1000 or 1e3."""
    try:
        number = float(text)
    except ValueError:
        number = 0
    if number < 1 or not number.is_integer():
        raise argparse.ArgumentTypeError(f"must be an integer >= 1, got {text!r}")
    return int(number)


def tensors(text: str) -> tuple[int, int]:
    count, x, elements = text.partition("x")
    if not x:
        raise argparse.ArgumentTypeError(
            f"must be tensors x elements, such as 100x1000, got {text!r}"
        )
    return size(count), size(elements)


def check_writable(path: Path) -> None:
    """Raise OSError now rather than after the training."""
    existed = path.exists()
    path.open("ab").close()
    if not existed:
        path.unlink()


def run_info() -> None:
    from fastopt.cli.info import info

    info()


RULES = [rule.name for rule in fastopt.RULES]


def run_demo(output: Path, epochs: int, seed: int) -> None:
    try:
        from fastopt.cli.demo import demo
    except ImportError as error:
        sys.exit(f"fastopt demo: {error}; pip install '.[demo]' in fastopt's folder")
    try:
        check_writable(output)
    except OSError as error:
        sys.exit(f"fastopt demo: cannot write {output}: {error.strerror}")
    demo(output, epochs, seed)


def run_bench(
    rules: list[str] | None,
    sizes: list[int] | None,
    tensors: list[tuple[int, int]] | None,
    dtypes: list[str] | None,
    against: list[str] | None,
    loop: bool,
    rounds: int | None,
    quick: bool,
    output: Path,
) -> None:
    from fastopt.bench import cases, contender, loop_contender

    try:
        from fastopt.bench import loop as loops
        from fastopt.bench.run import bench
    except ImportError as error:
        sys.exit(f"fastopt bench: {error}; pip install '.[bench]' in fastopt's folder")
    of_steps = {"rules": rules, "sizes": sizes, "tensors": tensors, "dtypes": dtypes}
    given = [f"--{name}" for name, value in of_steps.items() if value is not None]
    if loop and given:
        sys.exit(
            f"fastopt bench: --loop measures Adam in float32 over networks of its own; "
            f"leave out {' and '.join(given)}"
        )
    known = list(loop_contender.LOOPS if loop else contender.CONTENDERS)
    for name in against or ():
        if name not in known:
            names = ", ".join(map(repr, known))
            sys.exit(f"fastopt bench: unknown contender {name!r}; there are {names}")
    # fastopt is what ratios refer to, and the floor what they are judged by.
    chosen = {"fastopt", "floor", *(known if against is None else against)}
    try:
        output.mkdir(exist_ok=True)
        check_writable(output / ("loop.json" if loop else "bench.json"))
    except OSError as error:
        sys.exit(f"fastopt bench: cannot write to {output}: {error.strerror}")
    if sizes is None:
        sizes = list(cases.QUICK_SIZES if quick else cases.SIZES)
    if tensors is None:
        tensors = [] if quick else list(cases.TENSORS)
    rounds = rounds or (5 if quick else 15)
    try:
        if loop:
            models = loop_contender.MODELS[:1] if quick else loop_contender.MODELS
            loops.bench(loops.loops(models), loops.contenders(against), rounds, output)
        else:
            bench(
                cases.cases(rules or RULES, sizes, tensors, dtypes or ["float32"]),
                [name for name in known if name in chosen],
                rounds,
                output,
            )
    except KeyboardInterrupt:
        print("fastopt bench: interrupted; nothing is written", file=sys.stderr)
        sys.exit(130)


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
        "--epochs",
        type=at_least(1),
        default=100,
        help="passes over the training images",
    )
    command.add_argument(
        "--seed",
        type=at_least(0),
        default=0,
        help="for the first weights and the batches",
    )
    command.set_defaults(run=run_demo)

    about = "measure a step beside NumPy, torch, DeepSpeed, optax and bitsandbytes"
    command = commands.add_parser(
        "bench",
        help=about,
        description=f"{about}: those of them that are installed. A full run takes "
        "long, and wants a machine that does nothing else.",
    )
    command.add_argument(
        "--rules",
        nargs="+",
        choices=RULES,
        metavar="RULE",
        help="with their variants (default: all)",
    )
    command.add_argument(
        "--sizes",
        nargs="+",
        type=size,
        metavar="N",
        help="elements of a single tensor (default: 1e3 to 1e8)",
    )
    command.add_argument(
        "--tensors",
        nargs="*",
        type=tensors,
        metavar="COUNTxN",
        help="cases of many tensors (default: 100x1000 150x333333)",
    )
    command.add_argument(
        "--dtypes",
        nargs="+",
        choices=["float32", "bfloat16", "float16"],
        help="of parameters and gradients (default: float32)",
    )
    command.add_argument(
        "--against",
        nargs="+",
        metavar="NAME",
        help='beside fastopt and the floor, such as "torch fused" (default: all); with '
        '--loop, beside the first of each library, such as "optax"',
    )
    command.add_argument(
        "--loop",
        action="store_true",
        help="measure training loops with Adam in float32 instead of steps alone",
    )
    command.add_argument("--rounds", type=at_least(1), help="(default: 15)")
    command.add_argument(
        "--quick",
        action="store_true",
        help="1e3, 1e5 and 1e6 only, in 5 rounds; with --loop, the first network",
    )
    command.add_argument(
        "--output",
        type=Path,
        default=Path("fastopt-bench"),
        metavar="FOLDER",
        help="for bench.json and the pictures (default: %(default)s)",
    )
    command.set_defaults(run=run_bench)

    chosen = vars(parser.parse_args(arguments))
    try:
        chosen.pop("run")(**chosen)
        sys.stdout.flush()
    except BrokenPipeError:  # as of `fastopt info | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


if __name__ == "__main__":
    main()
