"""In torch's classes: gradients of several tasks, accumulated sums, masked decay."""

import copy
import pickle
import weakref

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import fastopt  # noqa: E402
import fastopt.torch as ft  # noqa: E402

SHAPES = [(5, 3), (1,), (0,), (7,), (33, 31)]
WEIGHTS = [0.3, -1.25, 0.0, 2.0]
DTYPES = [torch.float32, torch.float64]
CLASSES = {
    "AdamW": ("adamw", {"lr": 0.02, "weight_decay": 0.3}),
    "NAdam": ("nadam", {"lr": 0.02, "weight_decay": 0.1}),
    "LAMB": ("lamb", {"lr": 0.02}),
    "Prodigy": ("prodigy", {"lr": 0.5}),
    "Adafactor": ("adafactor", {}),
}


def draw(seed, dtype, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(shape, generator=generator, dtype=torch.float64) + 0.1).to(dtype)
        for shape in shapes
    ]


def tasks_of(seed, dtype):
    tasks = [draw(100 * seed + k, dtype) for k in range(len(WEIGHTS))]
    tasks[0][1] = tasks[1][0] = None
    return tasks


def core_of(name, params, **more):
    arrays = [p.detach().numpy().copy() for p in params]
    rule, values = CLASSES[name]
    if name == "Adafactor":
        return arrays, fastopt.Adafactor(arrays, **more)
    return arrays, getattr(fastopt, rule)(arrays, **values, **more)


def to_numpy(task):
    return [None if grad is None else grad.numpy().copy() for grad in task]


def same(params, arrays):
    return all(
        np.array_equal(p.detach().numpy(), a, equal_nan=True)
        for p, a in zip(params, arrays, strict=True)
    )


@pytest.mark.parametrize("backend", ["cython", "numba", "numpy"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["AdamW", "LAMB", "Prodigy"])
def test_weighted_tasks_have_the_core_s_bits(name, dtype, backend):
    params = [torch.nn.Parameter(p) for p in draw(0, dtype)]
    arrays, core = core_of(name, params, ema=0.9)
    opt = getattr(ft, name)(params, **CLASSES[name][1], ema=0.9, backend=backend)
    for k in range(3):
        tasks = tasks_of(k + 1, dtype)
        before = [to_numpy(task) for task in tasks]
        asked = {"clip_norm": 2.0} if k == 1 else {}
        opt.step(grads=tasks, weights=WEIGHTS, **asked)
        core.step(before, weights=WEIGHTS, **asked)
        assert same(params, arrays)
        assert same(opt.ema_params(), core.ema_params)
        assert all(p.grad is None for p in params)
        for task, old in zip(tasks, before, strict=True):
            there = [g for g in task if g is not None]
            assert same(there, [g for g in old if g is not None])
    assert opt.grad_norm == core.grad_norm


def test_other_steps_in_between():
    """Each kind of step goes on where the other has stopped, with other gradients
    missing every time."""
    dtype = torch.float32
    params = [torch.nn.Parameter(p) for p in draw(0, dtype)]
    arrays, core = core_of("AdamW", params)
    opt = ft.AdamW(params, **CLASSES["AdamW"][1])
    for k in range(6):
        grads = draw(k + 1, dtype)
        if k % 3 == 0:
            opt.step(grads=grads)
        elif k % 3 == 1:
            for p, g in zip(params, grads, strict=True):
                p.grad = g
            opt.step()
        else:
            opt.zero_grad()
            opt.step(grads=[grads], weights=[1.0])
        core.step(to_numpy(grads))
        assert same(params, arrays), k
    # torch counts the steps of each parameter.
    opt.step(grads=[None, *draw(9, dtype)[1:]])
    steps = [opt.state[p]["step"].item() for p in params]
    assert steps == [6, 7, 7, 7, 7]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tasks_of_halves_are_summed_in_float32(dtype):
    params = [torch.nn.Parameter(p) for p in draw(0, dtype)]
    opt = ft.AdamW(params, **CLASSES["AdamW"][1])
    wide = [torch.nn.Parameter(p.detach().float()) for p in params]
    arrays, core = core_of("AdamW", wide)
    for k in range(2):
        tasks = tasks_of(k + 1, dtype)
        opt.step(grads=tasks, weights=WEIGHTS)
        core.step([to_numpy([g if g is None else g.float() for g in t]) for t in tasks],
                  weights=WEIGHTS)  # fmt: skip
        for p, array in zip(params, arrays, strict=True):
            rounded = torch.from_numpy(array).to(dtype)
            assert torch.equal(p.detach(), rounded)
            array[:] = rounded.float().numpy()


def test_gradients_anywhere_in_memory():
    """A view with gaps, another dtype, the parameter itself."""
    dtype = torch.float32
    params = [torch.nn.Parameter(p) for p in draw(0, dtype)]
    arrays, core = core_of("AdamW", params)
    opt = ft.AdamW(params, **CLASSES["AdamW"][1])
    grads = draw(1, torch.float64)
    grads[0] = torch.randn(3, 5, dtype=dtype).t()
    grads[3] = params[3].detach()
    expected = [g.to(dtype).numpy().copy() for g in grads]
    opt.step(grads=[grads, grads], weights=[0.5, 0.25])
    core.step([expected, expected], weights=[0.5, 0.25])
    assert same(params, arrays)


def test_zeroed_and_skipped_tasks():
    dtype = torch.float64
    params = [torch.nn.Parameter(p) for p in draw(0, dtype)]
    opt = ft.Adam(params, lr=0.1, nonfinite="skip")
    tasks = tasks_of(1, dtype)
    before = [p.detach().clone() for p in params]
    tasks[3][3][0] = float("inf")
    opt.step(grads=tasks, weights=WEIGHTS)
    assert opt.skipped == 1
    assert all(map(torch.equal, before, params))
    opt.step(grads=tasks, weights=[1, 1, 1, 0], zero_grads=True)
    assert opt.skipped == 1 and not torch.equal(before[0], params[0])
    assert not any(g.any() for task in tasks for g in task if g is not None)
    big = [torch.full_like(p, 1e200) for p in params]
    opt.step(grads=[big, big], weights=[1, -0.5])  # only the squares overflow
    assert opt.skipped == 1


REFUSED = [
    (dict(weights=[1.0]), TypeError, "weights need the gradients of each task"),
    (dict(grads=torch.ones(2)), TypeError, "grads must be a list"),
    (dict(grads=[torch.ones(2)] * 2), ValueError, "2 gradients for 1 parameters"),
    (dict(grads=[[torch.ones(2)]]), TypeError, "several tasks need weights="),
    (dict(grads=[np.ones(2)]), TypeError, r"grads\[0\] must be a tensor or None"),
    (dict(grads=[torch.ones(3)]), ValueError, "has shape"),
    (dict(grads=[[torch.ones(2)]], weights=[1, 2]), ValueError, "there are 1 tasks"),
    (dict(grads=[[torch.ones(2)]], weights=[1e300]), ValueError, "finite in float32"),
    (dict(grads=torch.ones(2), weights=[1]), TypeError, "list with the gradients of"),
]


@pytest.mark.parametrize(("given", "error", "match"), REFUSED)
def test_refusals_change_nothing(given, error, match):
    p = torch.nn.Parameter(torch.ones(2))
    opt = ft.AdamW([p], lr=0.1)
    with pytest.raises(error, match=match):
        opt.step(**given)
    assert torch.equal(p.detach(), torch.ones(2)) and not opt.state
    opt.step(grads=[torch.ones(2)])
    assert not torch.equal(p.detach(), torch.ones(2))


def test_torchs_own_steps_refuse_what_they_lack():
    w = torch.nn.Parameter(torch.ones(2, 2))
    with pytest.raises(RuntimeError, match="weights, weight_decay_mask and copy_to"):
        ft.Muon([w]).step(grads=[torch.ones(2, 2)])


# Accumulation


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["AdamW", "LAMB", "Adafactor"])
def test_accumulation_has_the_core_s_bits(name, dtype):
    params = [torch.nn.Parameter(p) for p in draw(0, dtype)]
    arrays, core = core_of(name, params)
    opt = getattr(ft, name)(params, **CLASSES[name][1])
    for k in range(3):
        for part in range(3):
            grads = draw(10 * k + part, dtype)
            grads[part] = None
            for p, g in zip(params, grads, strict=True):
                p.grad = None if g is None else g.clone()
            opt.accumulate(grad_scale=0.3 + part)
            assert all(p.grad is None for p in params)
            core.accumulate(to_numpy(grads), grad_scale=0.3 + part)
        opt.step(clip_norm=3.0)
        core.step(clip_norm=3.0)
        assert same(params, arrays), k
    opt.step()  # nothing is left
    assert same(params, arrays)


def test_halves_are_accumulated_in_float32():
    """256 times 1/256 of a gradient come to it, where bfloat16 would stop at a part."""
    p = torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    opt = ft.SGD([p], lr=1.0)
    for _ in range(1024):
        p.grad = torch.full_like(p, 2.0**-10)
        opt.accumulate()
    opt.step()
    assert p.tolist() == [-1.0] * 3


def test_accumulation_in_flat_memory():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    other = copy.deepcopy(model)
    ft.flatten_(model)
    first, second = (
        ft.AdamW(m.parameters(), lr=0.1, weight_decay=0.2) for m in (model, other)
    )
    for _ in range(2):
        for x in draw(3, torch.float32, [(5, 3), (5, 3)]):
            for m, opt in ((model, first), (other, second)):
                m(x).square().sum().backward()
                opt.accumulate(grad_scale=0.5)
        first.step()
        second.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        assert p.grad is not None and not p.grad.any()


def test_sums_are_saved_copied_and_dropped():
    dtype = torch.float32
    params = [torch.nn.Parameter(p) for p in draw(0, dtype)]
    expected = [torch.nn.Parameter(p.detach().clone()) for p in params]
    opt, straight = ft.AdamW(params, lr=0.1), ft.AdamW(expected, lr=0.1)
    for one, of in ((opt, params), (straight, expected)):
        for p, g in zip(of, draw(1, dtype), strict=True):
            p.grad = g.clone()
        of[2].grad = None
        one.accumulate(grad_scale=0.25)
    saved = opt.state_dict()
    assert saved["accumulated"][2] is None
    copied = copy.deepcopy(opt)
    pickled = pickle.loads(pickle.dumps(opt))
    opt.drop_accumulated()
    opt.step()
    assert not opt.state and "accumulated" not in opt.state_dict()
    opt.load_state_dict(saved)
    for one in (opt, copied, pickled, straight):
        one.step()
    for one in (copied, pickled, straight):
        ours = one.param_groups[0]["params"]
        assert all(map(torch.equal, params, ours))
    with pytest.raises(ValueError, match="a tensor of its shape or None"):
        opt.load_state_dict({**saved, "accumulated": saved["accumulated"][:-1]})


def test_a_step_within_a_step_takes_the_sums():
    """As one of a signal handler may; the outer step then has nothing to do."""
    w, within = torch.nn.Parameter(torch.ones(2)), []

    def mask(name, param):  # is called when a step is planned
        if within:
            within.pop()()
        return True

    opt = ft.AdamW([w], lr=0.1, weight_decay_mask=mask)
    w.grad = torch.ones(2)
    opt.accumulate()
    within.append(opt.step)
    opt.step()
    assert not within and opt.state[w]["step"] == 1


def test_what_accumulation_refuses():
    p = torch.nn.Parameter(torch.ones(2))
    opt = ft.AdamW([p], lr=0.1)
    p.grad = torch.ones(2)
    opt.accumulate()
    with pytest.raises(RuntimeError, match="drop_accumulated"):
        opt.step(grads=[torch.ones(2)])
    p.grad = torch.ones(2)
    with pytest.raises(RuntimeError, match="others in .grad"):
        opt.step()
    with pytest.raises(ValueError, match="grad_scale"):
        opt.accumulate(grad_scale=float("nan"))
    opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})
    with pytest.raises(RuntimeError, match="parameters were added"):
        opt.accumulate()
    assert torch.equal(p.detach(), torch.ones(2))
    opt.drop_accumulated()
    opt.step()
    assert not torch.equal(p.detach(), torch.ones(2))


# Weight decay


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("name", ["AdamW", "SGD", "LAMB"])
def test_masked_decay_is_that_of_two_groups(name, flat):
    def model():
        torch.manual_seed(3)
        return torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Linear(4, 1))

    masked, grouped = model(), model()
    if flat:
        ft.flatten_(masked)
    seen = []

    def mask(name, param):
        seen.append(name)
        return param.ndim > 1

    values = {"lr": 0.1, "weight_decay": 0.4}
    one = getattr(ft, name)(masked.named_parameters(), **values, weight_decay_mask=mask)
    assert seen == ["0.weight", "0.bias", "1.weight", "1.bias"]
    matrices = [p for p in grouped.parameters() if p.ndim > 1]
    vectors = [p for p in grouped.parameters() if p.ndim < 2]
    two = getattr(ft, name)(
        [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}], **values
    )
    for x in draw(1, torch.float32, [(8, 5)] * 4):
        for m, opt in ((masked, one), (grouped, two)):
            opt.zero_grad()
            m(x).square().mean().backward()
            opt.step()
        for group in (*one.param_groups, *two.param_groups):
            group["lr"] *= 0.9
    for p, q in zip(masked.parameters(), grouped.parameters(), strict=True):
        assert torch.equal(p, q)
    one.step_param(masked[0].bias)
    two.step_param(grouped[0].bias)
    assert torch.equal(masked[0].bias, grouped[0].bias)


def test_what_a_mask_refuses():
    p = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(TypeError, match="must be a callable"):
        ft.AdamW([p], weight_decay_mask=[True])
    with pytest.raises(TypeError, match="must take the name and the parameter"):
        ft.AdamW([p], weight_decay_mask=lambda p: True)
    with pytest.raises(TypeError, match="must return True or False"):
        ft.AdamW([p], weight_decay_mask=lambda name, p: None)
    with pytest.raises(TypeError, match="rprop has no weight_decay"):
        ft.Rprop([p], weight_decay_mask=lambda name, p: False)
    ft.Rprop([p], weight_decay_mask=lambda name, p: True)


# What is easily lost


def test_sums_follow_added_and_changed_parameters():
    w = torch.nn.Parameter(torch.ones(2))
    opt = ft.SGD([w], lr=1.0)
    w.grad = torch.ones(2)
    opt.accumulate()
    opt.step()
    v = torch.nn.Parameter(torch.ones(1))
    opt.add_param_group({"params": [v]})
    w.data = torch.zeros(3, dtype=torch.float64)
    w.grad = torch.full_like(w, 1e300)
    opt.accumulate()
    w.data = torch.zeros(4, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="added or changed"):
        opt.step()
    w.data = torch.zeros(3, dtype=torch.float64)
    opt.step()
    assert w.tolist() == [-1e300] * 3 and v.item() == 1


def test_a_skipped_step_keeps_no_gradients():
    w = torch.nn.Parameter(torch.ones(2))
    opt = ft.AdamW([w], nonfinite="skip")
    opt.step(grads=[torch.ones(2)])
    grad = torch.full((2,), float("nan"))
    kept = weakref.ref(grad)
    opt.step(grads=[grad])
    del grad
    assert opt.skipped == 1 and kept() is None


def test_grad_scaler_s_infinity_drops_sums():
    w = torch.nn.Parameter(torch.ones(2))
    opt = ft.AdamW([w], fused=True)
    w.grad = torch.full((2,), float("inf"))
    opt.accumulate()
    opt.found_inf, opt.grad_scale = torch.tensor(1.0), torch.tensor(2.0)
    opt.step()
    opt.found_inf = torch.tensor(0.0)
    w.grad = torch.ones(2)
    opt.accumulate()
    opt.step()
    assert torch.isfinite(w).all() and not torch.equal(w.detach(), torch.ones(2))
    given = torch.ones(2)
    opt.found_inf = torch.tensor(1.0)
    opt.step(grads=[given], zero_grads=True)
    assert not given.any()


def test_a_task_without_weight_is_not_read():
    w = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    opt = ft.SGD([w], lr=1e-200, nonfinite="skip")
    tasks = [[torch.tensor([value], dtype=w.dtype)] for value in (float("nan"), 1e200)]
    opt.step(grads=tasks, weights=torch.tensor([0.0, 1.0], requires_grad=True))
    assert opt.skipped == 0 and w.item() == 0


def test_sums_of_parameters_that_others_hold_frozen():
    """A parameter without a gradient may be of any kind."""
    w, ones = torch.nn.Parameter(torch.ones(2)), torch.ones(2)
    others = [
        torch.nn.Parameter(torch.ones(2, dtype=torch.int64), requires_grad=False),
        torch.nn.Parameter(torch.ones(2, device="meta")),
        torch.nn.UninitializedParameter(),
    ]
    opt = ft.SGD([w, *others], lr=0.5)
    w.grad = ones.clone()
    opt.accumulate()
    w.grad = ones.clone()
    opt.accumulate(grad_scale=2.0)
    w.grad = torch.zeros(2)  # nothing is in it
    opt.step()
    assert torch.equal(w.detach(), ones - 1.5)
    w.grad = ones.to_sparse()
    with pytest.raises(RuntimeError, match="sparse gradients"):
        opt.accumulate()
    with pytest.raises(ValueError, match="pass its real part"):
        opt.step(grads=[1j * ones, None, None, None])
    with pytest.raises(RuntimeError, match="which has no accumulate"):
        ft.Muon([torch.nn.Parameter(torch.ones(2, 2))]).accumulate()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_averages_of_factored_parameters(dtype):
    """NumPy's and the compiled step agree, of parameters that keep their shape."""
    results = []
    for backend in ("numpy", "cython"):
        params = [torch.nn.Parameter(p) for p in draw(0, dtype, [(4, 5), (3,), ()])]
        opt = ft.Adafactor(params, ema=0.9, backend=backend)
        for k in range(2):
            opt.step(grads=draw(k + 1, dtype, [(4, 5), (3,), ()]))
        results.append([*params, *opt.ema_params()])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("other", [torch.float32, torch.float64, torch.bfloat16])
def test_averages_follow_parameters_without_gradients(other):
    w = torch.nn.Parameter(torch.ones(2))
    v = torch.nn.Parameter(torch.ones(2, dtype=other))
    opt = ft.SGD([w, v], lr=0.5, ema=0.5)
    opt.step(grads=[torch.ones(2), torch.ones(2, dtype=other)])
    assert [e.tolist() for e in opt.ema_params()] == [[0.75] * 2] * 2
    opt.step(grads=[torch.ones(2), None])
    assert [e.tolist() for e in opt.ema_params()] == [[0.375] * 2, [0.625] * 2]
    w.grad = torch.zeros(2)
    opt.step()
    assert [e.tolist() for e in opt.ema_params()] == [[0.1875] * 2, [0.5625] * 2]
    opt.zero_grad()
    opt.step()  # nothing at all
    assert opt.ema_params()[1].tolist() == [0.5625] * 2


@pytest.mark.parametrize("name", ["clip_norm", "clip_value"])
def test_limits_that_are_arrays_are_named(name):
    """Core and torch alike say which argument does not fit."""
    w = torch.nn.Parameter(torch.ones(2))
    w.grad = torch.ones(2)
    opt, core = ft.AdamW([w]), fastopt.adamw(np.ones(2))
    for step in (opt.step, lambda **more: core.step(np.ones(2), **more)):
        with pytest.raises(TypeError, match=f"{name} must be a number"):
            step(**{name: np.ones(2)})
    assert core.steps == 0 and not opt.state


@pytest.mark.parametrize("wrong", [{"clip": 1.0}, {"clip_norm": -1.0}])
def test_an_option_is_refused_before_the_closure_runs(wrong):
    opt = ft.SGD([torch.nn.Parameter(torch.ones(3))], lr=0.1)
    with pytest.raises((TypeError, ValueError), match=next(iter(wrong))):
        opt.step(lambda: pytest.fail("the closure ran"), **wrong)
    with pytest.raises((TypeError, ValueError), match=next(iter(wrong))):
        fastopt.sgd([np.ones(3)]).step([np.ones(3)], **wrong)
