"""Shares of parameters that are plain tensors: there is a warning, unless the group of
processes that have the others is known."""

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
if not torch.distributed.is_available():
    pytest.skip("torch without torch.distributed", allow_module_level=True)

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh  # noqa: E402

import fastopt.torch  # noqa: E402
from fastopt.torch import sharding  # noqa: E402


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DeviceMesh]:
    store = Path(tmp_path_factory.mktemp("gloo")) / "store"
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=0, world_size=1
    )
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("option", [{}, {"clip_norm": 1.0}, {"nonfinite": "skip"}])
def test_shares_of_fsdp1_are_warned_of(mesh, monkeypatch, option):
    """FSDP1 gives one process's share of all parameters as one."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = torch.nn.Linear(5, 3)
    model = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *group: 2)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        fastopt.torch.AdamW(model.parameters(), lr=0.1, **option)
    said = [
        str(w.message) for w in seen if "a share of the parameters" in str(w.message)
    ]
    assert len(said) == bool(option)
    assert all("by FullyShardedDataParallel" in message for message in said)


@pytest.mark.parametrize("module", sharding.WRAPPERS)
def test_shares_of_other_wrappers_are_warned_of(mesh, monkeypatch, module):
    """Whatever calls from their modules, as they do."""
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *group: 2)
    caller = {"__name__": module, "make": fastopt.torch.LAMB}
    exec("def inside(params): return make(params, clip_norm=1.0)", caller)
    with pytest.warns(UserWarning, match="a share of the parameters by"):
        caller["inside"]([torch.nn.Parameter(torch.ones(3))])
