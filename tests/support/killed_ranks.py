"""Kills one of two processes in the middle of training with FSDP2, so many times, and
goes on from the last checkpoint with two new ones.

    python killed_ranks.py RUNS FOLDER

Prints a line for each run: the phase, and whether the other process raised within the
timeout, and whether the resumed run has the bits of an uninterrupted one.
"""

import datetime
import hashlib
import os
import signal
import sys
import time
import traceback

import torch
import torch.distributed as dist
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

import fastopt.torch
from fastopt.torch import ranks

PHASES = (
    *("before the step", "before a sum", "after a sum"),
    *("after the step", "after saving"),
)
STEPS, SAVED, TIMEOUT = 6, 3, 20


def numbers(seed, shape):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-16, 17, shape, generator=generator).to(torch.float32) / 8


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def killing_in_sum(phase, when):
    """Let this process die around the sum over processes of one step."""
    original, count = ranks.total, [0]

    def total(vector, group):
        count[0] += 1
        if count[0] > when and phase == "before a sum":
            die()
        result = original(vector, group)
        if count[0] > when and phase == "after a sum":
            die()
        return result

    ranks.total = total


def train(rank, folder, store, resume, phase, when):
    """Train; this process dies in a phase of the step with this number, if it is
    given."""
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=TIMEOUT)
    dist.init_process_group(
        "gloo", f"file://{store}", rank=rank, world_size=2, timeout=timeout
    )
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 3))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    opt = fastopt.torch.AdamW(model.parameters(), lr=0.125, clip_norm=1.0)

    def states():
        of_optimizer = get_optimizer_state_dict(model, opt)
        return {"model": model.state_dict(), "optimizer": of_optimizer}

    if resume:
        saved = states()
        checkpoint.load(saved, checkpoint_id=folder)
        model.load_state_dict(saved["model"])
        set_optimizer_state_dict(model, opt, saved["optimizer"])
    if phase in ("before a sum", "after a sum"):
        killing_in_sum(phase, when)
    for k in range(SAVED if resume else 0, STEPS):
        for i, param in enumerate(model.parameters()):
            full = numbers(10 * k + i, param.shape)
            param.grad = distribute_tensor(
                full, param.device_mesh, param.placements, src_data_rank=None
            )
        if k == when and phase == "before the step":
            die()
        opt.step()
        if k == when and phase == "after the step":
            die()
        if k == SAVED - 1 and not resume:
            checkpoint.save(states(), checkpoint_id=folder)
        if k == when and phase == "after saving":
            die()
    digest = hashlib.sha256()
    for param in model.parameters():
        digest.update(param.full_tensor().detach().numpy().tobytes())
    return digest.hexdigest()


def launch(*arguments, dying=None, phase=None, when=None):
    """Return, for each of two processes, its exit code, seconds and what it wrote."""
    pipes, children = [], []
    for rank in range(2):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.close(reading)
                fault = (phase, when) if rank == dying else (None, None)
                os.write(writing, train(rank, *arguments, *fault).encode())
                code = 0
            except RuntimeError as error:  # what torch.distributed raises
                os.write(writing, str(error)[:200].encode())
                code = 3
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        os.close(writing)
        pipes.append(reading)
        children.append(child)
    begin = time.monotonic()
    results = {}
    while len(results) < 2:
        child, status = os.wait()
        rank = children.index(child)
        text = os.read(pipes[rank], 4096).decode()
        code = os.waitstatus_to_exitcode(status)
        results[rank] = code, time.monotonic() - begin, text
        os.close(pipes[rank])
    return results


def main(runs, folder):
    whole = launch(f"{folder}/whole", f"{folder}/store", False)
    assert [whole[rank][0] for rank in (0, 1)] == [0, 0], whole
    expected = whole[0][2]
    for run in range(runs):
        phase, dying = PHASES[run % len(PHASES)], run // len(PHASES) % 2
        when = SAVED + run % 3 if phase != "after saving" else SAVED - 1
        at, store = f"{folder}/{run}", f"{folder}/store{run}"
        fault = {"dying": dying, "phase": phase, "when": when}
        results = launch(at, store, False, **fault)
        killed, (code, seconds, said) = results[dying], results[1 - dying]
        raised = killed[0] == -signal.SIGKILL and code == 3 and seconds < TIMEOUT + 30
        again = launch(at, f"{store}again", True)
        same = [again[rank][2] == expected for rank in (0, 1)] == [True, True]
        print(f"{phase}, rank {dying}, step {when}: {raised} {same}", flush=True)
        if not raised:
            print(killed, code, seconds, said, file=sys.stderr)
        if not same:
            print(again, file=sys.stderr)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
