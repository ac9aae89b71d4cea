"""Slices of parameters in several processes of MPI: elementwise rules have the bits of
one process, and norms are those of whole arrays."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mpi4py")
try:
    from mpi4py import MPI  # noqa: F401
except (ImportError, RuntimeError) as error:
    pytest.skip(f"no MPI library: {error}", allow_module_level=True)
LAUNCHERS = [shutil.which("mpiexec"), str(Path(sys.executable).with_name("mpiexec"))]
MPIEXEC = next((path for path in LAUNCHERS if path and Path(path).exists()), None)
if MPIEXEC is None:
    pytest.skip("no mpiexec is installed", allow_module_level=True)

SCRIPT = """
import sys
import numpy as np
from mpi4py import MPI
import fastopt

comm = MPI.COMM_WORLD
sizes = 5, 1, 4097

def total(vector):
    rows = np.empty((comm.size, vector.size))
    comm.Allgather(vector, rows)
    vector[:] = rows.sum(axis=0)

results = {}
for dtype in ("float32", "float64"):
    for name in ("adamw", "lion", "lamb", "prodigy"):
        rng = np.random.default_rng(1)
        arrays = [rng.normal(size=size).astype(dtype) for size in sizes]
        bounds = [[n * r // comm.size for r in range(comm.size + 1)] for n in sizes]
        own = [slice(*of[comm.rank:comm.rank + 2]) for of in bounds]
        # Views: steps write into the arrays.
        mine = [array[part] for array, part in zip(arrays, own)]
        opt = getattr(fastopt, name)(mine, lr=0.25, reduce=total)
        for _ in range(20):
            # Sums of two of these are exact, in any order.
            halves = [rng.integers(-8, 9, (2, size)) / 8 for size in sizes]
            grads = [of[comm.rank::comm.size].sum(0).astype(dtype) for of in halves]
            for grad in grads:
                comm.Allreduce(MPI.IN_PLACE, grad)
            given = [grad[part].copy() for grad, part in zip(grads, own)]
            opt.step(given, clip_norm=8.0 if name == "lamb" else None)
            for array, of in zip(arrays, bounds):
                comm.Allgatherv(MPI.IN_PLACE, [array, np.diff(of)])
        for i, array in enumerate(arrays):
            results[f"{name}.{dtype}.{i}"] = array
        results[f"{name}.{dtype}.norm"] = np.array(opt.grad_norm)
np.savez(f"{sys.argv[1]}/{comm.size}.{comm.rank}.npz", **results)
"""


def test_two_processes_step_as_one(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    allowed = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    for count in (1, 2):
        done = subprocess.run(
            [
                *(str(MPIEXEC), "--oversubscribe", "-n", str(count)),
                *(sys.executable, str(script), str(tmp_path)),
            ],
            env={**os.environ, **allowed, "FASTOPT_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
    one, first, second = (
        dict(np.load(tmp_path / f"{name}.npz")) for name in ("1.0", "2.0", "2.1")
    )
    for key, expected in one.items():
        np.testing.assert_array_equal(first[key], second[key], err_msg=key)
        if key.startswith(("adamw", "lion")):
            np.testing.assert_array_equal(first[key], expected, err_msg=key)
        else:
            tolerance = 1e-12 if "float64" in key else 1e-5
            np.testing.assert_allclose(
                first[key], expected, rtol=tolerance, atol=tolerance, err_msg=key
            )
