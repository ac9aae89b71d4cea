"""State of bitsandbytes' 8-bit optimizers, taken over by ours."""

import copy

import pytest

torch = pytest.importorskip("torch")
ft = pytest.importorskip("fastopt.torch")

SHAPES = (70, 80), (5,), (4096,)
KINDS = {"AdamW8bit": ft.AdamW, "Adam8bit": ft.Adam, "Lion8bit": ft.Lion}


@pytest.fixture(scope="module")
def bnb():
    return pytest.importorskip("bitsandbytes")


def trained(bnb, name, weight_decay=0.02):
    generator = torch.Generator().manual_seed(0)
    params = [
        torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES
    ]
    opt = getattr(bnb.optim, name)(params, lr=3e-3, weight_decay=weight_decay)
    for _ in range(5):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        opt.step()
    return params, opt


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("name", KINDS)
def test_numbers_are_those_of_bitsandbytes(name, nested, bnb):
    params, opt = trained(bnb, name)
    saved = opt.state_dict()
    if not nested:  # as older versions saved it
        key = "__bnb_optimizer_quant_state__"
        saved["state"] = {
            i: {**{k: v for k, v in entry.items() if k != key}, **entry.get(key, {})}
            for i, entry in saved["state"].items()
        }
    ours = KINDS[name](params)
    before = copy.deepcopy(saved)
    ours.load_state_dict(ft.from_bitsandbytes(saved, ours))
    assert ours.param_groups[0]["lr"] == 3e-3
    assert ours.param_groups[0]["weight_decay"] == 0.02
    keys = [ours._names.key(k) for k in ours._rule(ours.param_groups[0]).state]
    for param in params:
        theirs, here = opt.state[param], ours.state[param]
        assert float(here["step"]) == 5
        for number, key in enumerate(keys, 1):
            expected = theirs[f"state{number}"]
            if expected.dtype == torch.uint8:
                expected = bnb.functional.dequantize_blockwise(
                    expected,
                    absmax=theirs[f"absmax{number}"],
                    code=theirs[f"qmap{number}"],
                    blocksize=256,
                )
            torch.testing.assert_close(here[key], expected, rtol=0, atol=0)
    assert repr(saved) == repr(before)


def test_it_goes_on_as_bitsandbytes_would(bnb):
    """With state of 8 bits, too, whose codes are others. Its decay is left out, because
    it is not torch's."""
    params, opt = trained(bnb, "AdamW8bit", weight_decay=0.0)
    saved = copy.deepcopy(opt.state_dict())
    start = [p.detach().clone() for p in params]
    grads = [torch.full(p.shape, 0.1) for p in params]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.clone()
    opt.step()
    expected = [p.detach() - s for p, s in zip(params, start, strict=True)]
    for formats in (None, "8bit"):
        others = [torch.nn.Parameter(s.clone()) for s in start]
        ours = ft.AdamW(others, formats=formats)
        ours.load_state_dict(ft.from_bitsandbytes(saved, ours))
        for param, grad in zip(others, grads, strict=True):
            param.grad = grad.clone()
        ours.step()
        for param, before, moved in zip(others, start, expected, strict=True):
            error = (param.detach() - before - moved).norm() / moved.norm()
            assert error < (0.01 if formats is None else 0.2)


def test_what_does_not_fit_is_refused(bnb):
    params, opt = trained(bnb, "AdamW8bit")
    with pytest.raises(ValueError, match=r"groups of \[3\] parameters"):
        ft.from_bitsandbytes(opt.state_dict(), ft.AdamW(params[:2]))
    with pytest.raises(ValueError, match="has 2 buffers, but Lion keeps"):
        ft.from_bitsandbytes(opt.state_dict(), ft.Lion(params))
    saved = opt.state_dict()
    entry = saved["state"][0].get("__bnb_optimizer_quant_state__", saved["state"][0])
    entry["absmax1"] = entry["absmax1"][:5]
    with pytest.raises(ValueError, match="codes and 5 scales"):
        ft.from_bitsandbytes(saved, ft.AdamW(params))
