"""torch's classes over tensors of 16 bits, and with state of bfloat16, held to the bits
of the core, whose formats are tested in tests/kernels/test_formats.py."""

import copy

import numpy as np
import pytest
from cases import bfloat16, same_bits

import fastopt

torch = pytest.importorskip("torch")
ft = pytest.importorskip("fastopt.torch")

from torch_encoded import drawn, give, params_of  # noqa: E402

PAIRS = {
    "AdamW": (ft.AdamW, fastopt.adamw, {"weight_decay": 0.01}),
    "LAMB": (ft.LAMB, fastopt.lamb, {}),
    "Lion": (ft.Lion, fastopt.lion, {}),
    "StableAdamW": (ft.StableAdamW, fastopt.stable_adamw, {}),
}


def of_core(rule, dtype, steps, **options):
    kind = bfloat16 if dtype is torch.bfloat16 else np.float32
    params = [p.astype(kind) for p in drawn(0)]
    opt = rule(params, lr=0.01, **options)
    for step in range(1, steps + 1):
        opt.step([grad.astype(kind) for grad in drawn(step)])
    return params, opt


def numbers(tensor):
    return tensor.detach().float().numpy()


def check_bits(params, expected):
    for param, array in zip(params, expected, strict=True):
        assert same_bits(numbers(param), array.astype(np.float32))


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", PAIRS)
def test_the_bits_are_those_of_the_core(name, dtype, flat):
    """In flattened parameters, too, and after a state is loaded."""
    kind, rule, options = PAIRS[name]
    params = params_of(dtype, flat)
    opt = kind(params, lr=0.01, state_dtype=torch.bfloat16, **options)
    for step in range(1, 6):
        give(params, step)
        opt.step()
        if step == 3:
            saved = copy.deepcopy(opt.state_dict())
            opt = kind(params, lr=1.0, state_dtype=torch.bfloat16, **options)
            opt.load_state_dict(saved)
    expected, core = of_core(rule, dtype, 5, formats="bf16", **options)
    check_bits(params, expected)
    for i, param in enumerate(params):
        names = [kind._names.key(buffer) for buffer in rule.state]
        buffers = [opt.state[param][key] for key in names]
        large = param.numel() >= 4096
        wanted = torch.bfloat16 if large else torch.float32
        for buffer, arrays in zip(buffers, core.state.values(), strict=True):
            assert buffer.dtype == wanted
            assert same_bits(numbers(buffer), arrays[i].astype(np.float32))


def test_one_parameter_at_a_time_has_the_same_bits():
    params = params_of(torch.bfloat16)
    opt = ft.AdamW(params, lr=0.01, state_dtype=torch.bfloat16, weight_decay=0.0)
    handle = ft.release_gradients_(opt)
    for step in range(1, 4):
        loss = sum(
            (param.float() * torch.from_numpy(grad).to(param.dtype).float()).sum()
            for param, grad in zip(params, drawn(step), strict=True)
        )
        loss.backward()
    handle.remove()
    expected, _ = of_core(
        fastopt.adamw, torch.bfloat16, 3, formats="bf16", weight_decay=0
    )
    check_bits(params, expected)


def test_averages_of_parameters_stay_float32():
    params = params_of(torch.bfloat16)
    opt = ft.AdamW(params, lr=0.01, ema=0.5, state_dtype=torch.bfloat16)
    give(params, 1)
    opt.step()
    assert {opt.state[p]["ema"].dtype for p in params} == {torch.float32}


def test_state_of_another_dtype_is_converted_when_it_is_loaded():
    params = params_of(torch.float32)
    plain = ft.AdamW(params)
    give(params, 1)
    plain.step()
    rounded = ft.AdamW(params, state_dtype=torch.bfloat16)
    rounded.load_state_dict(copy.deepcopy(plain.state_dict()))
    before = plain.state[params[0]]["exp_avg"]
    zeros = [torch.zeros_like(p) for p in params]
    for param, zero in zip(params, zeros, strict=True):
        param.grad = zero
    rounded.step()
    after = rounded.state[params[0]]["exp_avg"]
    assert after.dtype == torch.bfloat16
    torch.testing.assert_close(after.float(), before * 0.9, rtol=2**-6, atol=1e-7)
    again = ft.AdamW(params)
    again.load_state_dict(copy.deepcopy(rounded.state_dict()))
    again.step()
    assert again.state[params[0]]["exp_avg"].dtype == torch.float32


def test_sgd_rounds_to_the_nearest():
    """It does not count its steps, so that each would draw the same numbers."""
    params = params_of(torch.float32)
    opt = ft.SGD(params, lr=0.01, momentum=0.9, state_dtype=torch.bfloat16)
    for step in (1, 2):
        give(params, step)
        opt.step()
    first, second = (grads[1] for grads in (drawn(1), drawn(2)))
    one = first.astype(bfloat16).astype(np.float32)
    two = (np.float32(0.9) * one + second).astype(bfloat16)
    assert same_bits(numbers(opt.state[params[1]]["momentum_buffer"]), two.astype("f4"))


@pytest.mark.parametrize("other", [torch.float16, torch.float64, "bfloat16"])
def test_refused_dtypes(other):
    with pytest.raises(ValueError, match="state_dtype must be torch.float32 or"):
        ft.AdamW(params_of(torch.float32), state_dtype=other)
    for kind in (ft.Adafactor, ft.Muon):
        with pytest.raises(
            ValueError, match="has float32 state only; leave out state_dtype"
        ):
            kind([torch.nn.Parameter(torch.ones(3, 3))], state_dtype=torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_another_dtype_are_not_rounded(dtype):
    """A float32 gradient of a parameter of 16 bits, as several tasks may have it."""
    params = [torch.nn.Parameter(torch.ones(5000, dtype=dtype)) for _ in range(2)]
    grads = [torch.full((5000,), 1 + 2**-20) for _ in params]
    opt = ft.SGD(params, lr=2.0**20)
    opt.step(grads=[[g - 1 for g in grads], grads], weights=[1.0, 0.0])
    expected = torch.zeros(5000, dtype=dtype)
    assert all(torch.equal(param, expected) for param in params)


def with_gradients_of(dtypes, kind, zero_grads, steps=4):
    """Float32 parameters after some steps with gradients of these dtypes in turn. Each
    gradient is followed by others in memory, which must stay as they are."""
    params = [torch.nn.Parameter(torch.from_numpy(p)) for p in drawn(0)]
    opt = kind(params, lr=0.01)
    for step in range(1, steps + 1):
        memory = []
        for param, values in zip(params, drawn(step), strict=True):
            rounded = torch.from_numpy(values).to(torch.bfloat16)
            whole = torch.full((3 * param.numel(),), 7.0).to(dtypes[step % len(dtypes)])
            grad = whole[: param.numel()].view(param.shape).copy_(rounded)
            param.grad_dtype = None
            param.grad = grad
            memory.append((whole, grad.numel()))
        opt.step(zero_grads=zero_grads)
        for whole, size in memory:
            assert (whole[size:] == 7).all()
            assert bool((whole[:size] == 0).all()) == (zero_grads or size == 0)
    return [numbers(param) for param in params]


@pytest.mark.parametrize("zero_grads", [False, True])
@pytest.mark.parametrize("kind", [ft.SGD, ft.AdamW, ft.LAMB])
def test_a_float32_parameter_may_have_a_gradient_of_16_bits(kind, zero_grads):
    """The gradients' numbers are the same in bfloat16 and in float32."""
    expected = with_gradients_of([torch.float32], kind, zero_grads)
    for dtypes in ([torch.bfloat16], [torch.bfloat16, torch.float32]):
        got = with_gradients_of(dtypes, kind, zero_grads)
        assert all(map(same_bits, got, expected))


def test_torchs_own_step_takes_state_of_the_parameters_dtype():
    """torch's own step takes over for a sparse gradient, which fastopt has no kernels
    for. Its state has the dtypes of the parameters."""
    param = torch.nn.Parameter(torch.ones(5000, 1))
    opt = ft.SGD([param], lr=0.1, momentum=0.5, state_dtype=torch.bfloat16)
    param.grad = torch.ones(5000, 1)
    opt.step()
    assert opt.state[param]["momentum_buffer"].dtype == torch.bfloat16
    param.grad = torch.ones(5000, 1).to_sparse(1)
    opt.step()
    torch.testing.assert_close(param.detach(), torch.full((5000, 1), 0.75))
    assert opt.state[param]["momentum_buffer"].dtype == torch.float32


@pytest.mark.parametrize(
    ("kind", "option", "key"),
    [
        (ft.AdamW, "amsgrad", "max_exp_avg_sq"),
        (ft.RMSprop, "centered", "grad_avg"),
        (ft.RMSprop, "momentum", "momentum_buffer"),
    ],
)
def test_formats_of_buffers_that_some_groups_have(kind, option, key):
    params = params_of(torch.float32)
    groups = [{"params": params[:1], option: True}, {"params": params[1:]}]
    opt = kind(groups, formats={key: "bf16"})
    give(params, 1)
    opt.step()
    assert opt.state[params[0]][key].dtype is torch.bfloat16
    assert key not in opt.state[params[1]]
