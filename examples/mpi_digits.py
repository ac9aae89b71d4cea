"""MPI: every process computes a part of the gradients, and steps a part of the weights.

    mpiexec -n 2 python examples/mpi_digits.py

The state of the optimizer is divided among the processes: each has a slice of every
array, of its moments, and of nothing else. ``reduce`` adds up over the processes what a
step needs of all slices: the norm of the gradients, and LAMB's norms of every array.
"""

import numpy as np
from mpi4py import MPI

import fastopt
from fastopt.cli import demo

comm = MPI.COMM_WORLD
data = demo.digits()
x, y = data.train


def total(vector):
    """Add a vector up over the processes, in their order: the same bits for all."""
    rows = np.empty((comm.size, vector.size))
    comm.Allgather(vector, rows)
    vector[:] = rows.sum(axis=0)


def train(rule, lr):
    params = demo.mlp(0)
    grads = params.zeros_like()
    arrays = {name: params[name].reshape(-1) for name in params}
    bounds = {
        name: [array.size * rank // comm.size for rank in range(comm.size + 1)]
        for name, array in arrays.items()
    }
    own = {name: slice(*of[comm.rank : comm.rank + 2]) for name, of in bounds.items()}
    # Views: a step writes into the parameters themselves.
    opt = rule({name: arrays[name][own[name]] for name in arrays}, lr=lr, reduce=total)
    rng = np.random.default_rng(0)
    for _ in range(30):
        for batch in rng.permutation(len(x)).reshape(-1, 64):
            rows = np.array_split(batch, comm.size)[comm.rank]
            demo.backward(params, grads, x[rows], y[rows])
            comm.Allreduce(MPI.IN_PLACE, grads.data)  # each sum is of its rows' means
            slices = {name: grads[name].reshape(-1)[own[name]] for name in own}
            opt.step(slices, grad_scale=1 / comm.size, clip_norm=1.0)
            for name, array in arrays.items():
                counts = np.diff(bounds[name])
                comm.Allgatherv(MPI.IN_PLACE, [array, counts])
    return params, opt


for rule, lr in ((fastopt.adamw, 3e-3), (fastopt.lamb, 1e-2)):
    params, opt = train(rule, lr)
    _, right = demo.evaluate(params, *data.test)
    if comm.rank == 0:
        elements = sum(array.size for array in opt.state["m"])
        print(f"{rule.name}: {elements} of {params.data.size} moments in process 0")
        print(f"test accuracy: {right:.3f} with {comm.size} processes")
