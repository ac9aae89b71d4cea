"""One of two processes under DeepSpeed's ZeRO: ``zero_ranks.py RANK FOLDER``.

The gradients do not depend on the parameters, and neither they nor their means over the
processes are rounded. So whatever the processes share, elementwise rules must come to
the bits of one process, which both compute as well. Rank 0 writes a line for each case
to ``results.jsonl`` in the folder.
"""

import datetime
import json
import logging
import os
import sys
import warnings
from pathlib import Path

SHAPES = {"a": (5, 3), "b": (7,), "c": (65, 33), "d": (1,)}
STEPS = 20
BOTH, ONE = ("float32", "bfloat16"), ("bfloat16",)
EVERYWHERE = [(s, o, d) for s in (1, 2, 3) for o in (False, True) for d in BOTH]
SOME = [(1, False, "float32"), (2, True, "bfloat16"), (3, True, "float32")]


def main(rank, folder):
    os.environ.update(DS_ACCELERATOR="cpu", LOCAL_SIZE="2", WORLD_SIZE="2")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), OMP_NUM_THREADS="1")
    warnings.simplefilter("ignore")
    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=60),
    )
    import deepspeed.ops

    # Or it compiles, for minutes, what only other processors need.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.disable(logging.WARNING)
    Ranks(rank, folder).run()
    torch.distributed.barrier()
    # On a busy machine, gloo's threads may outlive their group, and abort the end of an
    # interpreter.
    os._exit(0)


class Ranks:
    def __init__(self, rank, folder):
        self.rank, self.folder = rank, folder

    def run(self):
        import deepspeed
        from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
        from deepspeed.ops.adam import DeepSpeedCPUAdam
        from deepspeed.ops.lion import DeepSpeedCPULion

        import fastopt
        import fastopt.deepspeed
        import fastopt.torch

        self.deepspeed = deepspeed
        fastopt.deepspeed.install()
        adagrad = fastopt.torch.optimizer(fastopt.adagrad, "OwnAdagrad")
        ours = fastopt.torch
        plain, decayed = {"lr": 0.01}, {"lr": 0.01, "weight_decay": 0.1}
        lions = {**decayed, "betas": (0.9, 0.98)}
        momentum = {**decayed, "momentum": 0.9, "nesterov": True}
        # The class for the engine, the one for a single process, and where.
        cases = [
            (ours.AdamW, ours.AdamW, decayed, EVERYWHERE),
            (DeepSpeedCPUAdam, ours.AdamW, decayed, EVERYWHERE),
            (ours.SGD, ours.SGD, momentum, SOME),
            (ours.Lion, ours.Lion, lions, SOME),
            (DeepSpeedCPULion, ours.Lion, lions, SOME),
            (ours.Adagrad, ours.Adagrad, plain, SOME),
            (adagrad, ours.Adagrad, plain, SOME),
            (DeepSpeedCPUAdagrad, ours.Adagrad, plain, SOME),
        ]
        # Every other class whose rule takes no norms, in one of these places.
        there = {kind.__name__ for kind, *_ in cases} | {"Muon", "Adafactor"}
        for name in sorted({n for n in ours.__all__ if n[0].isupper()} - there):
            other = getattr(ours, name)
            if other._default_rule.measure is None:
                place = SOME[len(cases) % len(SOME)]
                cases.append((other, other, plain, [place]))
        for kind, single, values, places in cases:
            for place in places:
                engine = self.engine(kind, values, *place)
                self.train(engine, place[2], range(STEPS))
                self.report(
                    "steps", kind, place, engine, self.alone(single, values, place[2])
                )
        for kind in (ours.AdamW, DeepSpeedCPUAdam):
            for place in SOME:
                engine = self.engine(kind, decayed, *place, gradient_clipping=1.0)
                self.train(engine, place[2], range(STEPS))
                expected = self.alone(
                    ours.AdamW, {**decayed, "clip_norm": 1.0}, place[2]
                )
                self.report("clipped", kind, place, engine, expected)
            for place in SOME:
                self.resume(kind, decayed, place)
        # Gates that let only this very class pass.
        masters = {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
        values = {**decayed, "fp32_optimizer_states": False}
        for place in [(2, True, "bfloat16"), (3, True, "bfloat16")]:
            engine = self.engine(DeepSpeedCPUAdam, values, *place, **masters)
            self.train(engine, place[2], range(STEPS))
            expected = self.alone(DeepSpeedCPUAdam, values, place[2], "bfloat16")
            self.report("bf16 masters", DeepSpeedCPUAdam, place, engine, expected)

    def resume(self, kind, values, place):
        folder = str(self.folder / f"{kind.__name__}{place[0]}")
        engine = self.engine(kind, values, *place)
        self.train(engine, place[2], range(STEPS // 2))
        engine.save_checkpoint(folder)
        engine.destroy()
        engine = self.engine(kind, values, *place)
        engine.load_checkpoint(folder)
        self.train(engine, place[2], range(STEPS // 2, STEPS))
        import fastopt.torch

        expected = self.alone(fastopt.torch.AdamW, values, place[2])
        self.report("resumed", kind, place, engine, expected)

    def model(self):
        import torch

        class Model(torch.nn.Module):
            """Its gradients are what it is called with."""

            def __init__(self):
                super().__init__()
                generator = torch.Generator().manual_seed(1)
                for name, shape in SHAPES.items():
                    drawn = torch.randn(shape, generator=generator)
                    setattr(self, name, torch.nn.Parameter(drawn))

            def forward(self, grads):
                return sum((getattr(self, n) * g).sum() for n, g in grads.items())

        return Model()

    def grads(self, step, rank, dtype):
        import torch

        generator = torch.Generator().manual_seed(2 * step + rank)
        return {
            name: (torch.randint(-24, 25, shape, generator=generator) / 8).to(dtype)
            for name, shape in SHAPES.items()
        }

    def engine(
        self, kind, values, stage, offload, dtype, gradient_clipping=0.0, **bf16
    ):
        zero = {"stage": stage}
        if stage == 3:  # several groups, and nothing is kept whole
            zero |= {"sub_group_size": 500, "stage3_param_persistence_threshold": 0}
        if offload:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
        model = self.model()
        engine, *_ = self.deepspeed.initialize(
            model=model,
            optimizer=kind(model.parameters(), **values),
            dist_init_required=False,
            config={
                "train_micro_batch_size_per_gpu": 1,
                "zero_optimization": zero,
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
                "gradient_clipping": gradient_clipping,
                "bf16": {"enabled": dtype == "bfloat16", **bf16},
            },
        )
        return engine

    def train(self, engine, dtype, steps):
        import torch

        for step in steps:
            engine.backward(engine(self.grads(step, self.rank, getattr(torch, dtype))))
            engine.step()

    def alone(self, kind, values, dtype, master="float32"):
        """What one process makes of the parameters, which are then rounded."""
        import torch

        dtype, master = getattr(torch, dtype), getattr(torch, master)
        params = {
            name: torch.nn.Parameter(param.detach().to(dtype).to(master))
            for name, param in self.model().named_parameters()
        }
        opt = kind(params.values(), **values)
        for step in range(STEPS):
            first, second = (self.grads(step, rank, torch.float32) for rank in (0, 1))
            for name, param in params.items():
                param.grad = ((first[name] + second[name]) / 2).to(master)
            opt.step()
        return {name: param.detach().to(dtype) for name, param in params.items()}

    def report(self, what, kind, place, engine, expected):
        import torch

        same, error = True, 0.0
        for name, param in engine.module.named_parameters():
            gathered = self.deepspeed.zero.GatheredParameters(
                [param], enabled=place[0] == 3
            )
            with gathered:
                found = param.detach().clone()
            same &= torch.equal(found, expected[name])
            error = max(error, (found - expected[name]).abs().max().item())
        inner = type(engine.optimizer.optimizer)
        engine.destroy()
        if self.rank == 0:
            line = {"what": what, "kind": kind.__name__, "place": place, "same": same}
            line |= {"error": error, "inner": f"{inner.__module__}.{inner.__name__}"}
            with open(self.folder / "results.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
