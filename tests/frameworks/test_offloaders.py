"""How those who offload an optimizer to the CPU call one: torchao's class itself, with
its streams and pinned memory faked, and the patterns of Megatron and DeepSpeed.

They own the memory, keep an optimizer for each parameter, and change groups and state
between steps. The bits must be those of one optimizer over all parameters.
"""

import contextlib
import copy
import threading
from collections import defaultdict

import pytest

torch = pytest.importorskip("torch")

import fastopt.torch  # noqa: E402

SIZES = (5000,), (0,), (1,), (17, 3), (70_001,)
VALUES = {"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.95)}
KINDS = ["AdamW", "Lion", "CautiousAdamW"]


def drawn(seed, shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def masters():
    """Plain tensors that require no gradient."""
    return [drawn(k, shape) for k, shape in enumerate(SIZES)]


def gradients(step, dtype=torch.float32):
    return [drawn(100 * step + k, shape, dtype) for k, shape in enumerate(SIZES, 1)]


def place(tensors):
    return [tensor.data_ptr() for tensor in tensors]


def of_state(opt, param):
    """The tensors of a parameter's state that have its shape."""
    return [x for x in opt.state[param].values() if x.shape == param.shape]


def together(kind=fastopt.torch.AdamW, steps=6, lr=lambda step: 0.01, **options):
    """One optimizer over all parameters."""
    params = [torch.nn.Parameter(param) for param in masters()]
    opt = kind(params, **VALUES, **options)
    for step in range(steps):
        opt.param_groups[0]["lr"] = lr(step)
        for param, grad in zip(params, gradients(step), strict=True):
            param.grad = grad
        opt.step()
    return opt, params


# torchao ------------------------------------------------------------------------------


class Stream:
    """What the class needs of a stream, whose work is done at once; its events, too."""

    def wait_stream(self, other):
        pass

    def record_event(self):
        return self

    def synchronize(self):
        pass


@pytest.fixture
def offload(monkeypatch):
    """torchao's class, for parameters on the CPU."""
    there = pytest.importorskip("torchao.optim.cpu_offload")
    empty_like = torch.empty_like

    def unpinned(*arguments, pin_memory=False, **options):
        return empty_like(*arguments, **options)

    monkeypatch.setattr(there, "get_available_devices", lambda: ["cpu", "cuda"])
    monkeypatch.setattr(torch, "empty_like", unpinned)
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, Stream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    return there.CPUOffloadOptimizer


def network():
    torch.manual_seed(0)
    layers = torch.nn.Linear(64, 100), torch.nn.Tanh(), torch.nn.Linear(100, 64)
    return torch.nn.Sequential(*layers)


def fit(model, opt, steps, scheduler=None):
    for step in steps:
        model(drawn(step, (8, 64))).square().mean().backward()
        opt.step()
        if scheduler is not None:
            scheduler.step()
        opt.zero_grad()


@pytest.mark.parametrize("kind", KINDS)
def test_torchaos_offload(offload, kind):
    """Matrices on their own, small tensors together, and a scheduler over all."""
    kind, decay = getattr(fastopt.torch, kind), lambda step: 1 / (1 + step)
    models = [network(), network()]
    opts = offload(models[0].parameters(), kind, **VALUES), None
    opts = opts[0], kind(models[1].parameters(), **VALUES)
    assert len(opts[0].optim_dict) == 2
    for model, opt in zip(models, opts, strict=True):
        scheduler = torch.optim.lr_scheduler.LambdaLR(opt, decay)
        fit(model, opt, range(1), scheduler)
        if opt is opts[0]:
            hosts = [*opt.param_d2h_map.values()]
            inner = [*opt.optim_dict.values()]
            pairs = [*zip(inner, hosts, strict=True)]
            kept = place(hosts), [place(of_state(*pair)) for pair in pairs]
        fit(model, opt, range(1, 6), scheduler)
    assert kept == (place(hosts), [place(of_state(*pair)) for pair in pairs])
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)


def test_torchaos_offload_goes_on_from_its_state(offload):
    models = [network(), network()]
    first = offload(models[0].parameters(), fastopt.torch.AdamW, **VALUES)
    fit(models[0], first, range(3))
    saved = copy.deepcopy((models[0].state_dict(), first.state_dict()))
    fit(models[0], first, range(3, 6))
    models[1].load_state_dict(saved[0])
    second = offload(models[1].parameters(), fastopt.torch.AdamW, **VALUES)
    second.load_state_dict(saved[1])
    fit(models[1], second, range(3, 6))
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)


# Megatron -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_an_optimizer_for_each_parameter(kind):
    """Before each step the groups become other dicts, with keys of the caller's. The
    parameters require no gradient, the gradients are buffers that are filled anew, and
    the state becomes another dict that refers to the parameter."""
    kind = getattr(fastopt.torch, kind)
    params, buffers = masters(), gradients(0)
    fired, opts = [], []
    for param in params:
        group = {"params": [param], **VALUES, "fused": True, "wd_mult": 1.0}
        group |= {"cpu_optimizer_cls": kind, "max_lr": None, "is_expert": False}
        opts.append(kind([group]))
        opts[-1].register_step_post_hook(lambda opt, *_: fired.append(opt))
    for step in range(6):
        for opt, param, buffer, grad in zip(
            opts, params, buffers, gradients(step), strict=True
        ):
            changed = {"lr": 0.01 / (1 + step), "pin_cpu_grads": True, "step": object()}
            opt.param_groups = [{**group, **changed} for group in opt.param_groups]
            param.requires_grad = False
            param.grad = buffer.copy_(grad)
            kept = place([param, *of_state(opt, param)]) if step else []
            opt.step(None)
            now = place([param, *of_state(opt, param)])
            assert kept in ([], now)
            opt.state[param]["master_param"] = param
            if step % 2:
                opt.state = defaultdict(dict, {param: dict(opt.state[param])})
    assert fired == opts * 6
    one, expected = together(kind, lr=lambda step: 0.01 / (1 + step))
    for opt, a, b in zip(opts, params, expected, strict=True):
        assert torch.equal(a, b)
        for name, value in one.state[b].items():
            assert torch.equal(opt.state[a][name], value), name


def test_a_parameter_without_a_gradient_is_left_alone():
    """For a step: its optimizer is called all the same."""
    params = masters()
    opts = [fastopt.torch.AdamW([param], **VALUES) for param in params]
    for step in range(3):
        before = params[0].clone()
        for k, (opt, param) in enumerate(zip(opts, params, strict=True)):
            param.grad = None if (step, k) == (1, 0) else gradients(step)[k]
            opt.step()
        assert torch.equal(before, params[0]) == (step == 1)
    assert (
        opts[0].state[params[0]]["step"] == 2 and opts[1].state[params[1]]["step"] == 3
    )


def test_state_from_elsewhere_is_worked_in():
    """Such as pinned copies of what was loaded: in place, and with the same bits."""
    opt, params = together(steps=3)
    kept = copy.deepcopy(opt.state_dict()), [param.detach().clone() for param in params]
    expected = together(steps=6)[1]
    new = [torch.nn.Parameter(param) for param in kept[1]]
    opts = [fastopt.torch.AdamW([param], **VALUES) for param in new]
    for k, (opt, param) in enumerate(zip(opts, new, strict=True)):
        opt.state = defaultdict(dict, {param: kept[0]["state"][k]})
        ours = place(of_state(opt, param))
        for step in range(3, 6):
            param.grad = gradients(step)[k]
            opt.step()
        assert place(of_state(opt, param)) == ours
        assert opt.state[param] is kept[0]["state"][k]
    for a, b in zip(new, expected, strict=True):
        assert torch.equal(a, b)


# bfloat16 gradients, float32 masters, and bfloat16 copies -----------------------------


def mixed(scale=1.0):
    """An optimizer for each float32 master, its bfloat16 gradient, and a copy."""
    params = masters()
    copies = [torch.full_like(param, 7.0, dtype=torch.bfloat16) for param in params]
    opts = []
    for param, other in zip(params, copies, strict=True):
        param.grad_dtype = torch.bfloat16
        opts.append(fastopt.torch.AdamW([param], **VALUES, copy_to=[other]))
    return params, copies, opts


@pytest.mark.skipif(
    not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has no grad_dtype"
)
@pytest.mark.parametrize("scale", [None, 1024.0])
def test_gradients_and_copies_of_16_bits(scale):
    """With ``grad_scale`` on the instance, as GradScaler leaves it there."""
    params, copies, opts = mixed()
    kept = place([*params, *copies])
    expected = [torch.nn.Parameter(param.double()) for param in masters()]
    oracle = torch.optim.AdamW(expected, **VALUES)
    for step in range(4):
        for k, opt in enumerate(opts):
            grad = gradients(step, torch.bfloat16)[k]
            expected[k].grad = grad.double() / (scale or 1)
            params[k].grad = grad
            if scale:
                opt.grad_scale, opt.found_inf = torch.tensor(scale), torch.tensor(0.0)
            opt.step()
            assert torch.equal(grad, gradients(step, torch.bfloat16)[k])
        oracle.step()
    assert kept == place([*params, *copies])
    for param, other, right in zip(params, copies, expected, strict=True):
        torch.testing.assert_close(param.double(), right.data, rtol=1e-5, atol=1e-6)
        assert torch.equal(other, param.to(torch.bfloat16))


def test_an_overflow_that_was_found_stops_the_step():
    """Nothing changes, and the next step is the first one."""
    params, copies, opts = masters(), [], []
    for param, grad in zip(params, gradients(0), strict=True):
        copies.append(torch.full_like(param, 7.0, dtype=torch.bfloat16))
        opts.append(fastopt.torch.AdamW([param], **VALUES, copy_to=[copies[-1]]))
        param.grad = grad
    for opt, param in zip(opts, params, strict=True):
        opt.found_inf = torch.tensor(1.0)
        opt.step()
        assert not opt.state[param]
        del opt.found_inf
        opt.step()
    expected = together(steps=1)[1]
    for param, other, right in zip(params, copies, expected, strict=True):
        assert torch.equal(param, right) and torch.equal(other, right.bfloat16())


# ZeRO 3 -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_groups_that_have_one_parameter_at_a_time(kind):
    """Each sub-group of ZeRO 3 takes its turn as the only parameter of its group."""
    kind = getattr(fastopt.torch, kind)
    params = masters()
    opt = kind(params, **VALUES)
    for step in range(6):
        for param, grad in zip(params, gradients(step), strict=True):
            param.grad = grad
            opt.param_groups[0]["params"] = [param]
            opt.step()
            opt.param_groups[0]["params"] = []
            param.grad = None
    opt.step()  # of no parameters
    for a, b in zip(params, together(kind)[1], strict=True):
        assert torch.equal(a, b)


# Threads ------------------------------------------------------------------------------


def test_steps_in_threads_of_the_caller():
    """Several optimizers at once, each in a thread that waits for its gradient."""
    params = masters()
    opts = [fastopt.torch.AdamW([param], **VALUES) for param in params]
    failures = []

    def work(k):
        try:
            for step in range(6):
                params[k].grad = gradients(step)[k]
                opts[k].step()
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=[k]) for k in range(len(opts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not failures and not any(thread.is_alive() for thread in threads)
    for a, b in zip(params, together()[1], strict=True):
        assert torch.equal(a, b)
