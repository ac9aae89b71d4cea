"""What is loaded into torch's classes with formats: masters and saved state."""

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch")
ft = pytest.importorskip("fastopt.torch")

from torch_encoded import drawn, give, params_of  # noqa: E402


def quantized(tensor):
    return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)


def test_master_parameters_can_be_loaded():
    """Before the first step and after it."""
    exact = [torch.from_numpy(array) for array in drawn(3)]
    for steps in (0, 1):
        params = params_of(torch.bfloat16)
        opt = ft.AdamW(params, lr=0.0, weight_decay=0.0, master="bf16+r16")
        for _ in range(steps):
            give(params, 1)
            opt.step()
        opt.load_master_params(exact)
        give(params, 2)
        opt.step()
        assert all(map(torch.equal, opt.master_params(), exact))
        for param, value in zip(params, exact, strict=True):
            torch.testing.assert_close(param.float(), value, rtol=2**-8, atol=0)


def test_masters_of_formats_by_name():
    """The format of the parameters may be in ``formats``, and depend on the name."""
    exact = [torch.from_numpy(array) for array in drawn(3)]
    params = params_of(torch.bfloat16)
    named = [(f"layer{i}", param) for i, param in enumerate(params)]
    for formats in (
        {"param": "bf16+r16"},
        lambda name, param: {"param": "bf16+r16"} if name != "layer1" else "fp32",
    ):
        opt = ft.AdamW(named, formats=formats)
        opt.load_master_params(exact)
        for i, got in enumerate(opt.master_params()):
            kept = (
                exact[i] if i != 1 or isinstance(formats, dict) else exact[i].bfloat16()
            )
            assert torch.equal(got, kept.float())


def test_masters_are_copied_as_steps_do():
    params = params_of(torch.float32)
    copies = [torch.zeros_like(p, dtype=torch.bfloat16) for p in params]
    opt = ft.AdamW(params, copy_to=copies)
    exact = [torch.from_numpy(array) for array in drawn(3)]
    opt.load_master_params(exact)
    assert all(map(torch.equal, copies, (value.bfloat16() for value in exact)))


def test_masters_before_the_first_step_are_saved():
    """Also of a parameter that is never trained, which gets no other state."""
    exact = [torch.from_numpy(array) for array in drawn(3)]
    params = params_of(torch.bfloat16)
    opt = ft.AdamW(params, lr=0.0, weight_decay=0.0, master="bf16+r16")
    opt.load_master_params(exact)
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = ft.AdamW(others, lr=0.0, weight_decay=0.0, master="bf16+r16")
    other.load_state_dict(opt.state_dict())
    give(others, 1)
    others[1].grad = None
    other.step()
    assert all(map(torch.equal, other.master_params(), exact))
    assert other.state[others[1]].keys() == {"step", "remainder"}
    assert torch.equal(copy.deepcopy(other).master_params()[1], exact[1])
    again = ft.ScheduleFreeAdamW(others, master="bf16+r16")
    again.load_master_params(exact)
    again.eval()
    assert all(map(torch.equal, again.eval_params(), others))
    torchs = ft.AdamW(others, master="bf16+r16")
    torchs.load_master_params(exact)
    others[0].grad = torch.ones_like(others[0]).to_sparse()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        torchs.step()
    assert not torchs.state[others[1]]  # so that torch makes its state


@pytest.mark.filterwarnings("ignore:torch.quantize")
@pytest.mark.parametrize(
    ("masters", "error", "message"),
    [
        (lambda exact: exact[1:], ValueError, "tensors of the shapes"),
        (lambda exact: exact[0], TypeError, "must be a list of tensors"),
        (lambda exact: {"a": exact[0]}, TypeError, "must be a list of tensors"),
        (lambda exact: [*exact[1:], None], TypeError, "got NoneType"),
        (lambda exact: [e + 1j for e in exact], TypeError, "has torch.complex64"),
        (lambda exact: [*exact[:-1], exact[-1].to_sparse()], TypeError, "be dense"),
        (lambda exact: [*exact[:-1], exact[-1].to("meta")], TypeError, "on meta"),
        (lambda exact: [*exact[:-1], quantized(exact[-1])], TypeError, "torch.qint8"),
    ],
)
def test_refused_masters(masters, error, message):
    """Before any is written."""
    params = params_of(torch.bfloat16)
    before = [param.detach().clone() for param in params]
    opt = ft.AdamW(params, master="bf16+r8")
    with pytest.raises(error, match=message):
        opt.load_master_params(masters([torch.from_numpy(a) for a in drawn(3)]))
    assert all(map(torch.equal, params, before)) and not opt.state


@pytest.mark.parametrize("master", [None, "bf16", "bf16+r16"])
def test_masters_may_be_the_parameters_in_another_order(master):
    dtype = torch.float32 if master is None else torch.bfloat16
    base = torch.arange(9.0)
    a, b = (torch.nn.Parameter(torch.full((8,), x, dtype=dtype)) for x in (1.0, 2.0))
    opt = ft.AdamW([a, b], master=master)
    opt.load_master_params([b, a])
    assert (a == 2).all() and (b == 1).all()
    b.data = base.to(dtype)[:8]
    opt.load_master_params([a, b.detach().as_strided((8,), (1,), 1)])
    assert torch.equal(b.detach().float(), torch.arange(1.0, 9.0))


def test_data_of_another_dtype_ends_a_remainder():
    params = params_of(torch.bfloat16)
    opt = ft.AdamW(params, lr=0.0, master="bf16+r16")
    opt.load_master_params([torch.from_numpy(array) for array in drawn(3)])
    for dtype in (torch.float16, torch.float32):
        for param in params:
            param.data = param.data.to(dtype)
        for got, param in zip(opt.master_params(), params, strict=True):
            assert torch.equal(got, param.float())


def test_the_variance_of_centered_rmsprop_is_saved_exactly():
    """A saved state has the mean of squares. In 16 bits, its rounding could be greater
    than the variance, and a step after it 40 times as long."""
    rng = np.random.default_rng(0)

    def trained(param, opt, steps):
        for step in steps:
            noise = np.random.default_rng(step).normal(size=4096)
            param.grad = torch.from_numpy(1 + 0.05 * noise).float()
            opt.step()

    options = {"lr": 1e-3, "alpha": 0.9, "centered": True, "formats": "bf16"}
    param = torch.nn.Parameter(torch.from_numpy(rng.normal(size=4096)).float())
    opt = ft.RMSprop([param], **options)
    trained(param, opt, range(50))
    other = torch.nn.Parameter(param.detach().clone())
    resumed = ft.RMSprop([other], **options)
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    trained(param, opt, range(50, 60))
    trained(other, resumed, range(50, 60))
    assert torch.equal(param, other)
