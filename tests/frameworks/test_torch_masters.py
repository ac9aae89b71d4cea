"""torch's classes with remainders of parameters and with state of 8 bits, held to the
bits of the core."""

import copy
import inspect
import io

import numpy as np
import pytest
from cases import bfloat16, same_bits

import fastopt

torch = pytest.importorskip("torch")
ft = pytest.importorskip("fastopt.torch")

from torch_encoded import drawn, give, params_of  # noqa: E402

CASES = {
    "8bit": ({"formats": "8bit"}, {"formats": "8bit"}, torch.float32),
    "m8": ({"formats": {"m": "m8"}}, {"formats": {"m": "m8"}}, torch.bfloat16),
    "r8": (
        {"formats": "8bit", "master": "bf16+r8"},
        {"formats": {"param": "bf16+r8", "m": "m8", "v": "v8"}},
        torch.bfloat16,
    ),
    "r16": (
        {"master": "bf16+r16", "state_dtype": torch.bfloat16},
        {"formats": {"param": "bf16+r16", "m": "bf16", "v": "bf16"}},
        torch.bfloat16,
    ),
    "r8 in runs": (  # state without scales lets flattened parameters be one segment
        {"master": "bf16+r8"},
        {"formats": {"param": "bf16+r8"}},
        torch.bfloat16,
    ),
    "stochastic": ({"master": "bf16"}, {"formats": {"param": "bf16"}}, torch.bfloat16),
}
KEYS = {"m": "exp_avg", "v": "exp_avg_sq", "param_remainder": "remainder"}
KEYS |= {f"{k}_scale": f"{KEYS[k]}_scale" for k in ("m", "v")}


def raw(array):
    """The bytes of an array or of a tensor."""
    if isinstance(array, np.ndarray):
        return array.tobytes()
    flat = array.detach().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def check(params, opt, arrays, core):
    """Parameters and state have the bits of the core's."""
    for param, array in zip(params, arrays, strict=True):
        assert raw(param) == raw(array)
    for name, buffers in core.state.items():
        for param, buffer in zip(params, buffers, strict=True):
            if buffer.size:
                assert raw(opt.state[param][KEYS[name]]) == raw(buffer), name


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(
    ("kind", "rule"), [(ft.AdamW, fastopt.adamw), (ft.LAMB, fastopt.lamb)]
)
@pytest.mark.parametrize("case", CASES)
def test_the_bits_are_those_of_the_core(case, kind, rule, flat):
    options, formats, dtype = CASES[case]
    values = {"lr": 0.01, "weight_decay": 0.1, "seed": 7 if flat else 0}
    params = params_of(dtype, flat)
    opt = kind(params, **values, **options)
    numpys = bfloat16 if dtype is torch.bfloat16 else np.float32
    arrays = [p.astype(numpys) for p in drawn(0)]
    core = rule(arrays, **values, **formats)
    for step in range(1, 5):
        give(params, step)
        opt.step(clip_value=0.5 if step == 2 else None)
        grads = [grad.astype(numpys) for grad in drawn(step)]
        core.step(grads, clip_value=0.5 if step == 2 else None)
    for param, array in zip(params, arrays, strict=True):
        assert raw(param) == raw(array)
    key = kind._names.key
    for name, buffers in core.state.items():
        stream, _, part = name.partition("_")
        there = "remainder" if stream == "param" else "_".join([key(stream), part])
        for param, buffer in zip(params, buffers, strict=True):
            if buffer.size:
                assert raw(opt.state[param][there.rstrip("_")]) == raw(buffer), name
    for got, expected in zip(opt.master_params(), core.master_params(), strict=True):
        assert same_bits(got.numpy(), expected)


@pytest.mark.parametrize("between", ["float32", "frozen"])
def test_the_bits_do_not_depend_on_what_is_flattened(between):
    """Random words belong to the elements of all parameters, and those of another dtype
    or without gradients count, too."""
    kinds = [torch.bfloat16, torch.float32, torch.bfloat16]
    results = []
    for flat in (False, True):
        params = [torch.nn.Parameter(torch.full((4096,), 0.5, dtype=k)) for k in kinds]
        apart = [p for p in params if p.dtype is torch.bfloat16] if flat else []
        if between == "frozen":
            params[1].requires_grad_(False)
        ft.flatten_(apart)
        opt = ft.AdamW(params, master="bf16", formats="bf16")
        for step in range(2):
            for param in filter(lambda p: p.requires_grad, params):
                if param.grad is None:
                    param.grad = torch.empty_like(param)
                param.grad.fill_(0.1 + step)
            opt.step()
        results.append([raw(p) for p in params])
    assert results[0] == results[1]


@pytest.mark.parametrize("backend", ["numpy", "numba", None])
def test_groups_that_are_not_finite_are_counted(backend):
    """In all streams of all parameters."""
    params = params_of(torch.float32)
    opt = ft.AdamW(params, formats="8bit", backend=backend)
    for step in (1, 2):
        give(params, step)
        params[0].grad[0, 0] = params[1].grad[[64, 200]] = float("nan")
        opt.step()
    assert opt.nonfinite_groups == 12


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_saved_state_goes_on_with_the_same_bits(case, flat):
    """Through torch.save. The buffers of flattened parameters come back apart."""
    options, _, dtype = CASES[case]
    params = params_of(dtype, flat)
    opt = ft.AdamW(params, lr=0.01, **options)
    for step in (1, 2, 3):
        give(params, step)
        opt.step()
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    if flat:
        ft.flatten_(others)
    other = ft.AdamW(others, lr=0.5, **options)
    saved = torch.load(file, weights_only=True)
    for entry in saved["state"].values():
        entry.update({key: value.clone() for key, value in entry.items()})
    other.load_state_dict(saved)
    for step in (4, 5):
        for of, optimizer in ((params, opt), (others, other)):
            give(of, step)
            optimizer.step()
    for a, b in zip(params, others, strict=True):
        assert raw(a) == raw(b)
        for key, value in opt.state[a].items():
            assert raw(value) == raw(other.state[b][key]), key
    copied = copy.deepcopy(opt)
    assert copied.formats == opt.formats and copied.master == opt.master


def test_state_is_converted_when_it_is_loaded():
    """From float32 to 8 bits and back."""
    params = params_of(torch.float32)
    plain, coded = ft.AdamW(params, lr=0.0), ft.AdamW(params, lr=0.0, formats="8bit")
    give(params, 1)
    plain.step()
    exact = plain.state[params[0]]["exp_avg"].clone()
    coded.load_state_dict(plain.state_dict())
    for param in params:
        param.grad.zero_()
    coded.step()
    entry = coded.state[params[0]]
    assert (
        entry["exp_avg"].dtype == torch.int8 and entry["exp_avg_scale"].numel() == 113
    )
    again = ft.AdamW(params, lr=0.0)
    again.load_state_dict(coded.state_dict())
    again.step()
    entry = again.state[params[0]]
    assert entry["exp_avg"].dtype == torch.float32 and "exp_avg_scale" not in entry
    torch.testing.assert_close(entry["exp_avg"], exact * 0.81, rtol=0.05, atol=2e-3)
    assert again.state_dict()["state"][0].keys() == {"step", "exp_avg", "exp_avg_sq"}


def test_layouts_other_than_contiguous():
    """Groups are formed in the order of memory."""
    start = torch.randn(8, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    results = []
    for layout in (torch.channels_last, torch.contiguous_format):
        param = torch.nn.Parameter(start.clone(memory_format=layout))
        opt = ft.AdamW([param], lr=0.01, formats="8bit")
        for _ in range(3):
            param.grad = torch.sign(param.detach()) * 0.3
            opt.step()
        again = ft.AdamW([param], lr=0.01)
        again.load_state_dict(opt.state_dict())
        again.step()
        results.append(again.state[param]["exp_avg"].contiguous())
    torch.testing.assert_close(*results, rtol=0.02, atol=1e-3)


def test_formats_by_name_and_of_single_steps():
    model = torch.nn.Sequential(torch.nn.Embedding(100, 64), torch.nn.Linear(64, 100))
    opt = ft.AdamW(
        model.named_parameters(),
        formats=lambda name, param: "fp32" if name.startswith("0.") else "8bit",
    )
    model(torch.tensor([1, 2])).sum().backward()
    opt.step()
    kinds = [opt.state[p]["exp_avg"].dtype for p in model.parameters()]
    assert kinds == [torch.float32, torch.int8, torch.float32]
    param = next(iter(model.parameters()))
    param.grad[3] = float("nan")
    model[1].weight.grad[0, 0] = float("inf")
    opt.step()
    assert opt.nonfinite_groups == 2


def test_sgd_keeps_remainders_without_counts():
    """torch's SGD does not count steps, which stochastic rounding needs."""
    param = torch.nn.Parameter(torch.ones(10, dtype=torch.bfloat16))
    opt = ft.SGD([param], lr=2.0**-13, master="bf16+r16")
    param.grad = torch.ones(10, dtype=torch.bfloat16)
    opt.step()
    assert (param == 1).all() and (opt.master_params()[0] == 1 - 2**-13).all()
    for _ in range(100):
        opt.step()
    assert (opt.master_params()[0] == 1 - 101 * 2**-13).all()
    for options in ({"master": "bf16"}, {"formats": "8bit", "momentum": 0.9}):
        with pytest.raises(ValueError, match="does not count its steps"):
            ft.SGD([param], lr=1.0, **options)


def test_torchs_own_step_ends_remainders():
    """What is left to torch works on the parameter alone, and on float32 state."""
    param = torch.nn.Parameter(torch.ones(5000, 1, dtype=torch.bfloat16))
    opt = ft.SGD([param], lr=2.0**-10, momentum=0.5, master="bf16+r8")
    param.grad = torch.ones(5000, 1, dtype=torch.bfloat16)
    opt.step()
    assert opt.state[param]["remainder"].any()
    param.grad = torch.ones(5000, 1, dtype=torch.bfloat16).to_sparse(1)
    opt.step()
    assert "remainder" not in opt.state[param]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"formats": "4bit"}, "formats must be one of 'fp32'"),
        (
            {"formats": {"q": "m8"}},
            "has 'q', but this optimizer has exp_avg, exp_avg_sq",
        ),
        ({"formats": {"exp_avg": "v8"}}, "never negative"),
        ({"master": "r8"}, "master must be one of 'bf16'"),
        ({"master": "bf16", "formats": {"param": "bf16"}}, "leave one out"),
        ({"formats": "8bit", "state_dtype": torch.bfloat16}, "leave one out"),
    ],
)
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ft.AdamW(params_of(torch.bfloat16), **options)
    for kind in (ft.Adafactor, ft.Muon):
        with pytest.raises(ValueError, match="has float32 state only"):
            kind([torch.nn.Parameter(torch.ones(3, 3))], master="bf16+r8")
    with pytest.raises(TypeError, match="bfloat16, but these are of torch.float32"):
        ft.AdamW(params_of(torch.float32), master="bf16+r8")
    with pytest.raises(ValueError, match="its state_dict has other numbers"):
        ft.RMSprop(params_of(torch.float32), formats="8bit")


def test_another_remainder_is_refused():
    params = params_of(torch.bfloat16)
    opt = ft.AdamW(params, master="bf16+r8")
    give(params, 1)
    opt.step()
    other = ft.AdamW(params, master="bf16+r16")
    saved = opt.state_dict()
    with pytest.raises(ValueError, match="torch.uint8 and .* has torch.int16 and"):
        other.load_state_dict(saved)
    assert not other.state
    entry = saved["state"][0]
    entry["remainder"] = entry["remainder"].reshape(-1)
    again = ft.AdamW(params, master="bf16+r8")
    with pytest.raises(ValueError, match="make it with the same master"):
        again.load_state_dict(saved)
    before = raw(params[0])
    other.state[params[0]] = entry
    with pytest.raises(ValueError, match="make it with the same master"):
        other.step()
    assert raw(params[0]) == before


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_copies_are_the_parameters_rounded(dtype, flat):
    """With gradients of 16 bits; and when the copies have moved."""
    params = params_of(torch.float32, flat)
    copies = [torch.zeros_like(p, dtype=dtype) for p in params]
    if flat:
        whole = torch.zeros(sum(p.numel() for p in params), dtype=dtype)
        parts = whole.split([p.numel() for p in params])
        copies = [part.view(p.shape) for part, p in zip(parts, params, strict=True)]
    copies[2] = None
    opt = ft.AdamW(params, lr=0.1, copy_to=copies, formats="8bit")
    for step in range(1, 5):
        give(params, step)
        opt.step(clip_norm=0.5 if step == 2 else None, zero_grads=step == 3)
        for param, copy_ in zip(params, copies, strict=True):
            assert copy_ is None or torch.equal(copy_, param.detach().to(dtype))
    other = copy.deepcopy(opt)
    theirs = other.param_groups[0]["params"][1]
    theirs.grad = torch.ones_like(theirs)
    other.step()
    assert torch.equal(other.copy_to[theirs], theirs.detach().to(dtype))
    assert torch.equal(copies[1], params[1].detach().to(dtype))


def test_refused_copies():
    param = torch.nn.Parameter(torch.ones(4, 5))
    for copies, error, message in (
        ([], ValueError, "or None for each of 1"),
        ([torch.ones(4, 5)], TypeError, "copies are bfloat16 or float16"),
        ([torch.ones(5, 4).bfloat16()], ValueError, "has shape"),
        ([torch.ones(5, 4).bfloat16().t()], ValueError, "in the layout of their"),
        ([param.detach().view(torch.bfloat16)[:, :5]], ValueError, "in the layout"),
    ):
        with pytest.raises(error, match=message):
            ft.AdamW([param], copy_to=copies)
    memory = torch.zeros(30)
    param = torch.nn.Parameter(memory[:20])
    with pytest.raises(ValueError, match="overlap each other or a parameter"):
        ft.AdamW([param], copy_to=[memory.view(torch.bfloat16)[30:50]])


def test_a_master_beside_a_callable_and_the_memory():
    model = torch.nn.Sequential(torch.nn.Embedding(100, 64), torch.nn.Linear(64, 100))
    model.to(torch.bfloat16)
    opt = ft.AdamW(
        model.named_parameters(),
        formats=lambda name, param: "fp32" if name.startswith("0.") else "8bit",
        master="bf16+r8",
    )
    model(torch.tensor([1, 2])).sum().backward()
    opt.step()
    kinds = [opt.state[p]["exp_avg"].dtype for p in model.parameters()]
    assert kinds == [torch.float32, torch.int8, torch.float32]
    assert all(opt.state[p]["remainder"].any() for p in model.parameters())
    sizes = {name: size for name, _, size in opt.memory().buffers}
    count = 12_900
    assert sizes["param"] == 2 * count and sizes["remainder"] == count
    assert sizes["exp_avg"] == 4 * 6500 + 6400 and sizes["exp_avg_scale"] == 400
    without = ft.AdamW(model.named_parameters())
    without.load_state_dict(opt.state_dict())
    without.step()
    assert "remainder" not in without.state[model[0].weight]


def test_the_signature_is_torchs_and_ours():
    names = [*inspect.signature(ft.AdamW).parameters]
    assert names[:3] == ["params", "lr", "betas"] and "defaults" not in names
    assert {"formats", "master", "copy_to", "seed"} <= {*names}


def test_copies_may_move():
    model = torch.nn.Linear(80, 80, dtype=torch.bfloat16)
    params = [torch.nn.Parameter(p.detach().float()) for p in model.parameters()]
    opt = ft.SGD(params, lr=0.5, copy_to=list(model.parameters()))
    for _ in range(3):
        for param in params:
            param.grad = torch.ones_like(param)
        opt.step()
        for param, copied in zip(params, model.parameters(), strict=True):
            assert torch.equal(copied, param.to(torch.bfloat16))
        ft.flatten_(model)
    params[0].grad = torch.ones_like(params[0]).to_sparse()
    with pytest.raises(RuntimeError, match="weight_decay_mask and copy_to"):
        opt.step()


def test_what_formats_cannot_be_is_refused():
    gaps = torch.nn.Parameter(torch.ones(100, 100, dtype=torch.bfloat16)[:, :50])
    opt = ft.AdamW([gaps], master="bf16+r16")
    gaps.grad = torch.ones_like(gaps)
    with pytest.raises(ValueError, match="has gaps in memory, so it has no formats"):
        opt.step()
    params = params_of(torch.float32)
    opt = ft.AdamW(params, formats="8bit")
    give(params, 1)
    opt.step()
    saved = opt.state_dict()
    del saved["state"][0]["exp_avg_scale"]
    for formats in ("8bit", None):
        other = ft.AdamW(params, formats=formats)
        with pytest.raises(ValueError, match="'exp_avg' in 8 bits, which needs"):
            other.load_state_dict(copy.deepcopy(saved))


def test_state_of_8_bits_reaches_torch_through_a_plain_optimizer():
    """torch would take codes for numbers, so a plain optimizer decodes what it loads,
    before any step of its own."""
    params = params_of(torch.bfloat16)
    opt = ft.AdamW(params, formats="8bit", master="bf16+r8")
    give(params, 1)
    opt.step()
    plain = ft.AdamW(params)
    plain.load_state_dict(opt.state_dict())
    saved = plain.state_dict()
    assert saved["state"][0].keys() == {"step", "exp_avg", "exp_avg_sq"}
    for i, param in enumerate(params):
        for key in ("exp_avg", "exp_avg_sq"):
            values = saved["state"][i][key]
            assert values.dtype is torch.float32
            expected = 0.1 * param.grad if key == "exp_avg" else 1e-3 * param.grad**2
            torch.testing.assert_close(values, expected.float(), rtol=0.05, atol=2e-3)
    theirs = torch.optim.AdamW(params_of(torch.bfloat16))
    theirs.load_state_dict(saved)
    for i, p in enumerate(theirs.param_groups[0]["params"]):
        now = saved["state"][i]["exp_avg"].to(torch.bfloat16)
        assert torch.equal(theirs.state[p]["exp_avg"], now)


def test_an_optimizer_that_does_not_count_steps():
    """Its state of bf16 is rounded to nearest; parameters cannot be rounded so without
    being lost, and say what to use."""
    params = params_of(torch.bfloat16)
    with pytest.raises(ValueError, match="'bf16' of 'param' draws .* use 'bf16.r16'"):
        ft.SGD(params, lr=0.1, master="bf16")
    opt = ft.SGD(params, lr=0.1, momentum=0.9, formats="bf16", master="bf16+r8")
    give(params, 1)
    opt.step()
    entry = opt.state[params[0]]
    assert entry["momentum_buffer"].dtype is torch.bfloat16
    assert torch.equal(entry["momentum_buffer"], params[0].grad)


def test_codes_in_any_layout():
    params = params_of(torch.float32)
    opt = ft.AdamW(params, lr=0.1, formats="8bit")
    give(params, 1)
    opt.step()
    saved = copy.deepcopy(opt.state_dict())
    codes = saved["state"][1]["exp_avg"]
    wide = torch.zeros(2 * codes.numel(), dtype=codes.dtype)
    wide[::2] = codes
    saved["state"][1]["exp_avg"] = wide[::2]
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = ft.AdamW(others, formats="8bit")
    other.load_state_dict(saved)
    give(params, 2)
    give(others, 2)
    opt.step()
    other.step()
    torch.testing.assert_close(others[1], params[1], rtol=1e-3, atol=2e-3)
