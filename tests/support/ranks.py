"""Processes of torch.distributed that stay alive between tests, because starting one
takes seconds."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

TIMEOUT = 120  # seconds, for a function to return


def serve(rank: int, count: int, store: str, pipe: Any) -> None:
    """Run functions that come through a pipe, and send back what they return."""
    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=count
    )
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            os._exit(0)  # the others may be gone
        try:
            pipe.send((True, function(*arguments)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


class Ranks:
    """So many processes, which are the ranks of the default group, with gloo."""

    def __init__(self, count: int, folder: Path):
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=serve,
                args=(rank, count, str(folder / f"store{count}"), theirs),
                daemon=True,
            )
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Return what the function returns in each process."""
        for pipe in self.pipes:
            pipe.send((function, arguments))
        results, errors = [], []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(TIMEOUT):
                self.stop()
                raise TimeoutError(f"rank {rank} has not returned within {TIMEOUT} s")
            good, result = pipe.recv()
            results.append(result)
            if not good:
                errors.append(f"rank {rank}: {result}")
        if errors:
            raise RuntimeError("\n".join(errors))
        return results

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def fixture(count: int) -> Any:
    """Return a fixture: so many processes for the tests of a file."""

    @pytest.fixture(scope="module")
    def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
        processes = Ranks(count, tmp_path_factory.mktemp("ranks"))
        yield processes
        processes.stop()

    return ranks


def numbers(seed: int, shape: Any, dtype: Any) -> Any:
    """Return a tensor of few powers of two, so that sums of two of them are exact."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-16, 17, shape, generator=generator).to(dtype) / 8
