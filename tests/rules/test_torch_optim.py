"""The classes of ``fastopt.torch`` against what PyTorch's own test of its optimizers
checks (test/test_optim.py), with the tables of options that it is run over."""

import copy
import io
import warnings

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("expecttest", reason="torch's tables of options need expecttest")

from torch.nn import Parameter  # noqa: E402
from torch.optim.lr_scheduler import ReduceLROnPlateau  # noqa: E402
from torch.optim.optimizer import (  # noqa: E402
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch_tables import INFO, NAMES, ours, plain_options, tables, theirs  # noqa: E402

import fastopt.torch  # noqa: E402

every_class = pytest.mark.parametrize("name", NAMES)
# Muon is torch's step, and takes matrices only.
every_optimizer = pytest.mark.parametrize("name", [n for n in NAMES if n != "Muon"])


def options(name, without=("differentiable",)):
    """Every set of options of torch's table, alone and with each way to compute."""
    all_of_them = tables._get_optim_inputs_including_global_cliquey_kwargs(
        "cpu", torch.float32, INFO[name], skip=without
    )
    return [given.kwargs for given in all_of_them]


def layer(contiguous=True, shape=(10, 5)):
    """A weight, a bias and an input."""
    torch.manual_seed(0)
    rows, columns = shape
    if contiguous:
        weight, bias = torch.randn(rows, columns), torch.randn(rows)
    else:
        weight, bias = (
            torch.randn(rows, columns, 2)[..., 0],
            torch.randn(rows, 2)[..., 0],
        )
    return Parameter(weight), Parameter(bias), torch.randn(columns)


def loss_of(weight, bias, x):
    return (weight.mv(x) + bias).pow(2).sum()


def closure_for(optimizer, weight, bias, x):
    def closure():
        optimizer.zero_grad()
        loss = loss_of(weight, bias, x)
        loss.backward()
        return loss

    return closure


def network(dtype=torch.float32):
    torch.manual_seed(1)
    return torch.nn.Sequential(
        torch.nn.Linear(2, 3),
        torch.nn.Sigmoid(),
        torch.nn.Linear(3, 1),
        torch.nn.Sigmoid(),
    ).to(dtype)


def convolution():
    torch.manual_seed(1)
    return torch.nn.Sequential(
        torch.nn.Conv2d(4, 2, 1, stride=2), torch.nn.BatchNorm2d(2)
    ), torch.rand(1, 4, 16, 16)


def assert_states_agree(a, b, **bounds):
    """Two state dicts: the same keys, and values to some bounds."""
    assert a["param_groups"] == b["param_groups"]
    assert a["state"].keys() == b["state"].keys()
    for key in a["state"]:
        assert a["state"][key].keys() == b["state"][key].keys()
        for name, value in a["state"][key].items():
            other = b["state"][key][name]
            assert type(value) is type(other)
            assert value.dtype == other.dtype and value.shape == other.shape
            torch.testing.assert_close(value, other, **bounds)


# Refusals -------------------------------------------------------------------------


@every_class
def test_errors_and_their_messages(name):
    info = INFO[name]
    for error in info.optim_error_inputs_func(device="cpu", dtype=torch.float32):
        given = error.optimizer_error_input
        on_step = error.error_on == tables.OptimizerErrorEnum.STEP_ERROR
        if issubclass(error.error_type, Warning):
            expected = pytest.warns(error.error_type, match=error.error_regex)
        else:
            expected = pytest.raises(error.error_type, match=error.error_regex)
        if on_step:
            optimizer = ours(name)(given.params, **given.kwargs)
            with expected:
                optimizer.step()
        else:
            with expected:
                ours(name)(given.params, **given.kwargs)


@every_class
def test_what_is_no_parameter_is_refused_in_the_same_words(name):
    leaf = torch.ones(2, 2, requires_grad=True)
    for params in ([], [{"params": {leaf}}], [leaf * 2], [3], [{"lr": 1.0}]):
        raised = []
        for optimizer in (ours(name), theirs(name)):
            with pytest.raises((TypeError, ValueError, KeyError)) as error:
                optimizer(params)
            raised.append((type(error.value), str(error.value)))
        assert raised[0] == raised[1]


@every_class
def test_sparse_gradients(name):
    """What torch refuses is refused in its words; what it does, it does here, too."""
    found = []
    for optimizer in (ours(name), theirs(name)):
        param = Parameter(torch.tensor([[1.5, 1.5]]))
        opt = optimizer([param], lr=0.1)
        param.grad = torch.tensor([[0.5, 0.0]]).to_sparse()
        try:
            opt.step()
            opt.step()
            found.append(param.detach())
        except RuntimeError as error:
            found.append(str(error))
    if INFO[name].supports_sparse:
        assert torch.equal(*found)
    else:
        assert found[0] == found[1] and "does not support sparse gradients" in found[0]


# Steps ----------------------------------------------------------------------------


@every_optimizer
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("scheduled", [True, False])
def test_goes_the_right_direction(name, contiguous, scheduled):
    for makers in INFO[name].scheduler_inputs if scheduled else [()]:
        for kwargs in plain_options(name):
            weight, bias, x = layer(contiguous)
            optimizer = ours(name)([weight, bias], **kwargs)
            with warnings.catch_warnings():
                # That a scheduler came before the optimizer.
                warnings.filterwarnings("error", message=".*lr_scheduler")
                schedulers = [make(optimizer) for make in makers]
                closure = closure_for(optimizer, weight, bias, x)
                first = closure().item()
                for _ in range(20):
                    loss = optimizer.step(closure)
                    for scheduler in schedulers:
                        plateau = isinstance(scheduler, ReduceLROnPlateau)
                        scheduler.step(*([loss] if plateau else []))
            last = closure().item()
            assert last > first if kwargs.get("maximize") else last < first


@every_optimizer
def test_agrees_with_torch_step_by_step(name):
    """Through steps without gradients, a layer that is frozen for a while, an empty
    parameter; parameters and state, under each way in which torch computes."""
    for kwargs in options(name):
        if kwargs.get("capturable"):
            continue
        dtype = torch.float64
        models = network(dtype), network(dtype)
        pairs = []
        for model, kind in zip(models, (ours(name), theirs(name)), strict=True):
            empty = torch.empty(0, 2, dtype=dtype, requires_grad=True)
            empty.grad = torch.rand_like(empty)
            pairs.append(kind([*model.parameters(), empty], **kwargs))
        x = torch.linspace(0.1, 0.6, 6, dtype=dtype).reshape(3, 2)
        for i in range(9):
            for model, optimizer in zip(models, pairs, strict=True):
                optimizer.zero_grad()
                model[2].requires_grad_(i not in (3, 4))
                if i != 2:
                    model(x).sum().backward()
                optimizer.step()
            # fused computes the counts of Adam in float32; NAdam's product is.
            for p, q in zip(
                models[0].parameters(), models[1].parameters(), strict=True
            ):
                torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)
            assert_states_agree(
                pairs[0].state_dict(), pairs[1].state_dict(), rtol=1e-6, atol=1e-9
            )


@every_optimizer
def test_tensor_lr(name):
    for kwargs in options(name):
        kwargs = {**kwargs, "lr": 1e-3}
        first, second = layer(), layer()
        plain = ours(name)(first[:2], **kwargs)
        try:
            tensor = ours(name)(second[:2], **{**kwargs, "lr": torch.tensor(1e-3)})
        except ValueError as error:
            assert "lr as a Tensor is not supported" in str(error)
            continue
        for _ in range(5):
            plain.step(closure_for(plain, *first))
            tensor.step(closure_for(tensor, *second))
            torch.testing.assert_close(first[0], second[0])
            torch.testing.assert_close(first[1], second[1])
        # The tensor is read at every step.
        with torch.no_grad():
            tensor.param_groups[0]["lr"].fill_(0.0)
        before = second[0].detach().clone()
        tensor.step()
        if name not in ("Rprop", "ASGD"):  # torch's ASGD has the lr of a step ago
            assert torch.equal(before, second[0])


@every_optimizer
def test_complex_parameters_are_pairs_of_real_ones(name):
    if not INFO[name].supports_complex:
        return
    for kwargs in plain_options(name):
        shapes = (10, 5), (10,), (4, 3)
        dtypes = torch.complex64, torch.complex64, torch.float32
        params = [
            torch.randn(shape, dtype=dtype, requires_grad=True)
            for shape, dtype in zip(shapes, dtypes, strict=True)
        ]
        real = [
            (torch.view_as_real(p) if p.is_complex() else p).detach().clone()
            for p in params
        ]
        pair = ours(name)(params, **kwargs), ours(name)(real, **kwargs)
        for _ in range(3):
            for p, q in zip(params, real, strict=True):
                p.grad = torch.randn_like(p)
                q.grad = torch.view_as_real(p.grad) if p.is_complex() else p.grad
            for optimizer in pair:
                optimizer.step()
            for p, q in zip(params, real, strict=True):
                p = torch.view_as_real(p) if p.is_complex() else p
                assert torch.equal(p, q)


@every_optimizer
def test_groups_with_options_of_their_own(name):
    for kwargs in plain_options(name):
        outer = {"lr": 1e-28}
        if name == "Rprop":
            outer["step_sizes"] = (0, 50)
        inner = {**kwargs, "lr": kwargs.get("lr") or 1e-3}
        weight, bias, x = layer()
        irrelevant = Parameter(torch.randn(2))
        before = irrelevant.detach().clone()
        groups = [
            {"params": [weight], **inner},
            {"params": [bias], **copy.deepcopy(inner), "weight_decay": 0.0},
            {"params": [irrelevant]},
        ]
        optimizer = ours(name)(groups, **outer)
        first = loss_of(weight, bias, x).item()
        for _ in range(20):
            loss = closure_for(optimizer, weight, bias, x)()
            irrelevant.grad = torch.rand_like(irrelevant)
            optimizer.step()
        assert loss > first if kwargs.get("maximize") else loss < first
        torch.testing.assert_close(before, irrelevant)


@every_class
def test_without_gradients_nothing_happens(name):
    for kwargs in plain_options(name):
        params = [torch.randn(2, 3) for _ in range(2)]
        before = [p.clone() for p in params]
        optimizer = ours(name)(params, **kwargs)
        assert optimizer.step(lambda: torch.tensor([1.0])) == 1
        assert all(map(torch.equal, before, params))


@every_optimizer
def test_zero_gradients_do_what_they_do_in_torch(name):
    """Nothing, but for weight decay."""
    for kwargs in plain_options(name):
        params = [torch.ones(5, 1, requires_grad=True) for _ in range(2)]
        for param, kind in zip(params, (ours(name), theirs(name)), strict=True):
            param.grad = torch.zeros_like(param)
            kind([param], **kwargs).step()
        torch.testing.assert_close(*params, rtol=1e-6, atol=0)


@every_optimizer
def test_differentiable_steps_are_torchs(name):
    """Autograd goes through them."""
    if "differentiable" not in INFO[name].supported_impls:
        return
    found = []
    for kind in (ours(name), theirs(name)):
        start = torch.ones(3, dtype=torch.float64, requires_grad=True)
        factor = torch.full((3,), 2.0, dtype=torch.float64, requires_grad=True)
        param = start.clone()
        optimizer = kind([param], lr=0.1, differentiable=True)
        param.grad = factor * start
        optimizer.step()
        found.append(torch.autograd.grad(param.sum(), factor)[0])
    assert torch.equal(*found)


@every_optimizer
def test_capturable_is_refused_on_the_cpu_as_by_torch(name):
    if not INFO[name].has_capturable_arg:
        return
    for kind in (ours(name), theirs(name)):
        param = torch.ones(3, requires_grad=True)
        param.grad = torch.ones(3)
        with pytest.raises(AssertionError, match="If capturable=True"):
            kind([param], capturable=True).step()


@pytest.mark.parametrize(
    "name", [n for n in NAMES if "cpu" in INFO[n].supports_fused_on]
)
def test_fused_on_meta(name):
    with torch.device("meta"):
        model = network()
    optimizer = ours(name)(model.parameters(), fused=True)
    for param in model.parameters():
        param.grad = torch.rand_like(param)
    message = "`fused=True` requires all the params to be floating point Tensors"
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    optimizer.zero_grad()
    model.to_empty(device="cpu")
    for param in model.parameters():
        param.grad = torch.rand_like(param)
    optimizer.step()


# What is shown, saved and loaded --------------------------------------------------


@every_class
def test_is_printed_as_torchs(name):
    for kwargs in options(name, without=()):
        params = [Parameter(torch.randn(2, 3)) for _ in range(2)]
        pair = ours(name)(params, **kwargs), theirs(name)(params, **kwargs)
        assert repr(pair[0]) == repr(pair[1])
        assert isinstance(pair[0], theirs(name))


def named(params, yes):
    return [(f"name{i}", p) for i, p in enumerate(params)] if yes else params


def without_names(saved):
    saved = copy.deepcopy(saved)
    for group in saved["param_groups"]:
        group.pop("param_names", None)
    return saved


@every_optimizer
@pytest.mark.parametrize("names", [(True, False), (False, True)])
def test_a_loaded_optimizer_goes_on_the_same(name, names):
    for kwargs in plain_options(name):
        weight, bias, x = layer(shape=(2, 3))
        first = ours(name)(named([weight, bias], names[0]), **kwargs)
        for _ in range(10):
            first.step(closure_for(first, weight, bias, x))
        others = Parameter(weight.detach().clone()), Parameter(bias.detach().clone())
        second = ours(name)(named(others, names[1]), **kwargs)
        saved = copy.deepcopy(first.state_dict())
        second.load_state_dict(saved)
        for _ in range(10):
            first.step(closure_for(first, weight, bias, x))
            second.step(closure_for(second, *others, x))
            if kwargs.get("centered"):  # its square_avg is a rounded sum
                torch.testing.assert_close(weight, others[0])
            else:
                assert torch.equal(weight, others[0]) and torch.equal(bias, others[1])
        bounds = {} if kwargs.get("centered") else {"rtol": 0, "atol": 0}
        assert_states_agree(
            without_names(first.state_dict()),
            without_names(second.state_dict()),
            **bounds,
        )
        # A parameter that is there twice is saved once.
        second.param_groups.extend(second.param_groups)
        groups = [
            without_names(o.state_dict())["param_groups"] for o in (first, second)
        ]
        assert groups[0][-1] == groups[1][-1]


@every_optimizer
@pytest.mark.parametrize("names", [(True, True), (True, False), (False, True)])
def test_names_are_saved_and_loaded(name, names):
    model, x = convolution()
    found = []
    for yes in names:
        params = model.named_parameters() if yes else model.parameters()
        found.append(ours(name)(params))
    first, second = found
    for _ in range(3):
        first.zero_grad()
        model(x).sum().backward()
        first.step()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    second.step()
    loaded = second.state_dict()["param_groups"][0]["param_names"]
    assert loaded == [n for n, _ in model.named_parameters()]


@every_optimizer
def test_older_state_dicts(name):
    """Without the options that came later, and with counts that are numbers."""
    for kwargs in plain_options(name):
        model, x = convolution()
        optimizer = ours(name)(model.parameters(), **kwargs)

        def step(optimizer, model=model, x=x):
            optimizer.zero_grad()
            model(x).sum().backward()
            optimizer.step()

        for _ in range(3):
            step(optimizer)
        saved = copy.deepcopy(optimizer.state_dict())
        for group in saved["param_groups"]:
            for flag in INFO[name].not_og_supported_flags:
                group.pop(flag, None)
        for state in saved["state"].values():
            if "step" in state:
                state["step"] = state["step"].item()
        optimizer.load_state_dict(saved)
        step(optimizer)
        for state in optimizer.state.values():
            if "step" in state:
                assert state["step"].item() == 4


@every_optimizer
def test_saved_and_loaded_with_weights_only(name):
    for kwargs in plain_options(name):
        weight, bias, x = layer()
        optimizer = ours(name)([weight, bias], **kwargs)
        for _ in range(3):
            optimizer.step(closure_for(optimizer, weight, bias, x))
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
        assert_states_agree(loaded, optimizer.state_dict(), rtol=0, atol=0)


@every_optimizer
@pytest.mark.parametrize("direction", ["ours to torch", "torch to ours"])
def test_states_are_interchangeable(name, direction):
    """Ten steps with one, ten with the other: as twenty of torch's."""
    kinds = [ours(name), theirs(name)]
    if direction == "torch to ours":
        kinds.reverse()
    for kwargs in plain_options(name):
        runs = []
        for first, second in (kinds, [theirs(name)] * 2):
            model = network(torch.float64)
            for kind in (first, second):
                optimizer = kind(model.parameters(), **kwargs)
                if kind is second and runs is not None and "saved" in vars(model):
                    optimizer.load_state_dict(model.saved)
                generator = torch.Generator().manual_seed(0)
                for _ in range(10):
                    for param in model.parameters():
                        param.grad = torch.randn(
                            param.shape, dtype=torch.float64, generator=generator
                        )
                    optimizer.step()
                model.saved = copy.deepcopy(optimizer.state_dict())
            runs.append((model, optimizer.state_dict()))
        for p, q in zip(runs[0][0].parameters(), runs[1][0].parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)
        assert_states_agree(runs[0][1], runs[1][1], rtol=1e-6, atol=1e-9)


@every_class
def test_copies_and_pickles_go_on_the_same(name):
    import pickle

    for kwargs in plain_options(name):
        params = [Parameter(torch.randn(2, 3)) for _ in range(2)]
        for param in params:
            param.grad = torch.rand_like(param)
        optimizer = ours(name)(params, **kwargs)
        for _ in range(3):
            optimizer.step()
        public = {key for key in vars(optimizer) if not key.startswith("_")}
        made = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
        for other in made:
            assert {key for key in vars(other) if not key.startswith("_")} == public
            for p, q in zip(params, other.param_groups[0]["params"], strict=True):
                q.grad = p.grad
            other.step()
        optimizer.step()
        for other in made:
            for p, q in zip(params, other.param_groups[0]["params"], strict=True):
                assert p is not q and torch.equal(p, q)


# Hooks ----------------------------------------------------------------------------


@every_class
def test_step_hooks_and_their_order(name):
    seen = []

    def note(what):
        return lambda optimizer, args, kwargs: seen.append(what)

    params = [torch.ones(2, 2)]
    for kwargs in plain_options(name):
        optimizer, other = ours(name)(params, **kwargs), torch.optim.SGD(params)
        handles = [
            register_optimizer_step_pre_hook(note("global pre")),
            register_optimizer_step_post_hook(note("global post")),
            *(o.register_step_pre_hook(note("pre")) for o in (optimizer, other)),
            *(o.register_step_post_hook(note("post")) for o in (optimizer, other)),
        ]
        seen.clear()
        order = ["global pre", "pre", "post", "global post"]
        optimizer.step()
        assert seen == order
        other.step()
        optimizer.step()
        assert seen == 3 * order
        for handle in handles:
            handle.remove()
        optimizer.step()
        assert len(seen) == 12


def test_a_hook_may_change_the_arguments():
    param = Parameter(torch.ones(2))
    param.grad = torch.full((2,), 30.0)
    optimizer = fastopt.torch.SGD([param], lr=1.0)
    optimizer.register_step_pre_hook(lambda o, args, kwargs: (args, {"clip_norm": 1.0}))
    optimizer.step()
    torch.testing.assert_close(param.detach(), torch.full((2,), 1 - 0.5**0.5))
    optimizer.register_step_pre_hook(lambda o, args, kwargs: 3)
    with pytest.raises(RuntimeError, match="must return None or a tuple"):
        optimizer.step()


@every_class
def test_hooks_of_saving_and_loading(name):
    def pre(optimizer):
        optimizer.state["test"] = 1

    def post(optimizer, saved):
        saved["found"] = saved["state"].pop("test", 0)
        return saved

    def set_lr(value, by_copy):
        def hook(optimizer, saved):
            saved = copy.deepcopy(saved) if by_copy else saved
            saved["param_groups"][0]["lr"] = value
            return saved if by_copy else None

        return hook

    optimizer = ours(name)([Parameter(torch.randn(2, 3))])
    handle = optimizer.register_state_dict_pre_hook(pre)
    assert optimizer.state_dict()["state"]["test"] == 1
    optimizer.register_state_dict_post_hook(post)
    saved = optimizer.state_dict()
    assert saved["found"] == 1 and "test" not in saved["state"]
    handle.remove()
    del optimizer.state["test"]
    assert optimizer.state_dict()["found"] == 0

    optimizer.register_load_state_dict_pre_hook(set_lr(0.002, by_copy=False))
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.002
    optimizer.register_load_state_dict_pre_hook(
        set_lr(0.003, by_copy=True), prepend=True
    )
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.002
    optimizer.register_load_state_dict_post_hook(lambda o: o.state.update(done=True))
    optimizer.load_state_dict(saved)
    assert optimizer.state["done"]
    # What is no parameter's stays, and is in nobody's way.
    param = optimizer.param_groups[0]["params"][0]
    param.grad = torch.ones_like(param)
    before = param.detach().clone()
    optimizer.step()
    optimizer.step()
    assert not torch.equal(before, param) and optimizer.state["done"]


@every_optimizer
def test_state_is_never_empty(name):
    for kwargs in plain_options(name):
        weight, bias, x = layer()
        optimizer = ours(name)([weight, bias], **kwargs)
        optimizer.step(closure_for(optimizer, weight, bias, x))
        assert all(optimizer.state.values())
