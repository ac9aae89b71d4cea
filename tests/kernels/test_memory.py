"""Where buffers lie: what docs/performance.md found to matter, and nothing else."""

import re
import sys

import numpy as np
import pytest
from cases import odd_view

import fastopt
from fastopt.memory.arena import HUGE_PAGE, PAGE, state_arena, zeroed
from fastopt.memory.order import CACHE_LINE


def begin(array):
    return array.ctypes.data


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("sizes", [(0,), (1,), (7, 0, 65), (4097, 3), (600_000, 5)])
def test_state_begins_where_its_parameter_does(sizes, dtype):
    """In a cache line, that is, so that one alignment serves all of a step's stores."""
    params = [odd_view(np.ones(n, dtype), 1 + k) for k, n in enumerate(sizes)]
    arena = state_arena(params, 3)
    assert [len(streams) for streams in arena] == [3] * len(sizes)
    spans = []
    for param, streams in zip(params, arena, strict=True):
        for stream in streams:
            assert stream.size == param.size and stream.dtype == dtype
            assert not stream.any()
            same = begin(stream) % CACHE_LINE == begin(param) % CACHE_LINE
            assert same or not param.size
            spans.append((begin(stream), begin(stream) + stream.nbytes))
    spans = sorted(span for span in spans if span[0] < span[1])
    assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:], strict=False))


def test_no_two_streams_are_equal_modulo_a_page():
    flat = fastopt.flatten([np.ones(5000, np.float32)])
    opt = fastopt.amsgrad(flat)
    state = [arrays[0] for arrays in opt.state.values()]
    streams = [flat.data, flat.zeros_like().data, *state]
    assert len({begin(stream) % PAGE for stream in streams}) == len(streams) == 5


def test_a_small_arena_is_small():
    (streams,) = state_arena([np.ones(1)], 2)
    assert streams[0].base.nbytes <= 2 * PAGE


@pytest.mark.skipif(sys.platform != "linux", reason="told by /proc/self/smaps")
def test_large_buffers_ask_for_huge_pages():
    raw = zeroed(HUGE_PAGE + 12345)
    raw[:] = 1
    assert raw.size == HUGE_PAGE + 12345 and begin(raw) % HUGE_PAGE == 0
    with open("/proc/self/smaps") as file:
        entries = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", file.read(), flags=re.M)
    flags = [
        re.search(r"^VmFlags:(.*)", entry, re.M)[1].split()
        for entry in entries[1:]
        if int(entry.split("-")[0], 16)
        <= begin(raw)
        < int(entry.split("-")[1].split()[0], 16)
    ]
    if "hg" not in flags[0] and not _kernel_has_huge_pages():
        pytest.skip("this kernel has no transparent huge pages")
    assert "hg" in flags[0]


def _kernel_has_huge_pages():
    try:
        with open("/sys/kernel/mm/transparent_hugepage/enabled"):
            return True
    except OSError:
        return False
