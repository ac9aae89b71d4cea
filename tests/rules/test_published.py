"""Known results: the minimum of x**2 from x = 10, learning rate 0.1, 100 steps."""

import numpy as np
import pytest

from fastopt import backends, dynamic_gd, gd


@pytest.fixture(params=["numpy", "cython", "numba"])
def minimum(request):
    try:
        backends.load(request.param)
    except (ImportError, RuntimeError) as reason:
        pytest.skip(str(reason))

    def minimum(rule):
        x = np.array([10.0])
        opt = rule(x, lr=0.1, backend=request.param)
        for _ in range(100):
            opt.step(2 * x)
        return x[0]

    return minimum


def test_gd(minimum):
    # In closed form 10 * 0.8**100; the steps round, the closed form hardly.
    assert minimum(gd) == pytest.approx(2.0370359763344977e-09, rel=1e-13, abs=0)


def test_dynamic_gd(minimum):
    assert minimum(dynamic_gd) == 0.3914723667473291
