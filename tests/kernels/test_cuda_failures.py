"""What becomes of an optimizer when the driver, of which there is a stub, fails."""

from __future__ import annotations

import cuda_stub
import pytest
from cuda_stubbed import COPY, LAUNCH, POP, PUSH, names, needs_driver, ones

import fastopt

pytestmark = needs_driver


@pytest.mark.parametrize("function", [LAUNCH, COPY])
@pytest.mark.parametrize("code", [cuda_stub.ILLEGAL_ADDRESS, cuda_stub.OUT_OF_MEMORY])
def test_an_optimizer_that_has_failed_refuses_to_go_on(stub, tmp_path, function, code):
    params, grads = ones([5, 1000]), ones([5, 1000])
    opt = fastopt.schedule_free_adamw(params, ema=0.9)
    opt.step(grads)
    stub.fail(function, code)
    with pytest.raises(RuntimeError, match="load a checkpoint") as raised:
        opt.step(grads)
    assert function in str(raised.value) and f"({code})" in str(raised.value)
    stub.clear_failures()
    refused = [
        lambda: opt.step(grads),
        lambda: opt.step(grads, clip_norm=1.0),
        opt.state_dict,
        lambda: opt.save(tmp_path / "state"),
        opt.eval_params,
        opt.master_params,
    ]
    for call in refused:
        stub.clear()
        with pytest.raises(RuntimeError, match="failed on the GPU") as again:
            call()
        assert function in str(again.value)
        assert not stub.calls(LAUNCH)
        assert not (tmp_path / "state").exists()
    assert opt.steps == 1
    again = fastopt.schedule_free_adamw(params, ema=0.9)  # over the same memory
    again.step(grads)
    assert again.state_dict()["steps"] == 1


def test_a_failure_while_a_step_is_prepared_changes_nothing(stub):
    """Nothing was written yet, so the optimizer goes on."""
    opt, grads = fastopt.adamw(ones([5, 1000])), ones([5, 1000])
    stub.fail("cuMemAlloc_v2", cuda_stub.OUT_OF_MEMORY)
    with pytest.raises(RuntimeError, match="OUT_OF_MEMORY"):
        opt.step(grads)
    assert opt.steps == 0 and not stub.calls(LAUNCH)
    opt.step(grads)
    assert opt.steps == 1 and len(stub.calls(LAUNCH)) == 1


def test_a_context_is_left_after_a_failure(stub):
    opt, grads = fastopt.adamw(ones([5])), ones([5])
    opt.step(grads)
    stub.clear()
    stub.fail(LAUNCH, cuda_stub.OUT_OF_MEMORY)
    with pytest.raises(RuntimeError):
        opt.step(grads)
    calls = names(stub.calls())
    assert calls.count(PUSH) == calls.count(POP) == 1


@pytest.mark.parametrize("nth", [1, 2])
def test_a_failure_while_tasks_are_combined_changes_nothing(stub, nth):
    opt, grads = fastopt.adamw(ones([5, 1000])), ones([5, 1000])
    tasks, weights = [grads, grads], [1.0, 2.0]
    stub.fail(LAUNCH, cuda_stub.OUT_OF_MEMORY, nth)
    with pytest.raises(RuntimeError, match="OUT_OF_MEMORY") as raised:
        opt.step(tasks, weights=weights)
    assert "load a checkpoint" not in str(raised.value)
    opt.step(tasks, weights=weights)
    assert opt.steps == 1


def switched(opt):
    opt.momentum = 0.9


FAILING = {
    "step": (fastopt.sgd, lambda opt, grads: opt.step(grads)),
    "estimate": (fastopt.sophia_g, lambda opt, grads: opt.estimate(grads)),
    "accumulate": (fastopt.adamw, lambda opt, grads: opt.accumulate(grads)),
}
DOORS = {
    "a group": lambda opt: opt.add_group({"params": ones([7])[0]}),
    "a switch": switched,
    "step": lambda opt: opt.step(ones([5, 1000])),
    "load_master_params": lambda opt: opt.load_master_params(ones([5, 1000])),
    "state_dict": lambda opt: opt.state_dict(),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", FAILING)
def test_no_door_leads_on(stub, name, door):
    """Whatever has failed, only a checkpoint makes the optimizer whole."""
    rule, use = FAILING[name]
    if door == "a switch" and rule is not fastopt.sgd:
        pytest.skip("the rule has no switch")
    opt, grads = rule(ones([5, 1000])), ones([5, 1000])
    opt.step(grads)
    saved = opt.state_dict()
    stub.fail(LAUNCH, cuda_stub.ILLEGAL_ADDRESS)
    with pytest.raises(RuntimeError, match="failed on the GPU"):
        use(opt, grads)
    stub.clear_failures()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="failed on the GPU"):
            DOORS[door](opt)
        with pytest.raises(RuntimeError, match="failed on the GPU"):
            opt.state_dict()
    opt.load_state_dict(saved)
    use(opt, grads)
    if name != "accumulate":
        opt.step(grads)
    opt.state_dict()


def test_sums_that_have_failed_are_made_anew(stub):
    """After a step has used them, they are kept for the next ones."""
    opt, grads = fastopt.adamw(ones([5, 1000])), ones([5, 1000])
    opt.accumulate(grads)
    opt.step()
    saved = opt.state_dict()
    stub.fail(LAUNCH, cuda_stub.OUT_OF_MEMORY)
    with pytest.raises(RuntimeError, match="failed on the GPU"):
        opt.accumulate(grads)
    stub.clear_failures()
    opt.load_state_dict(saved)
    opt.accumulate(grads)
    opt.step()
    assert opt.steps == 2


def test_lookahead_that_has_failed(stub):
    """The second launch, of the slow weights, fails."""
    inner = fastopt.adamw(ones([5, 1000]))
    opt, grads = fastopt.Lookahead(inner, k=2), ones([5, 1000])
    opt.step(grads)
    saved = opt.state_dict()
    stub.fail(LAUNCH, cuda_stub.OUT_OF_MEMORY, 2)
    with pytest.raises(RuntimeError, match="failed on the GPU"):
        opt.step(grads)
    stub.clear_failures()
    for use in (lambda: opt.step(grads), lambda: inner.step(grads), opt.state_dict):
        with pytest.raises(RuntimeError, match="failed on the GPU"):
            use()
    opt.load_state_dict(saved)
    for _ in range(3):
        opt.step(grads)
    assert inner.steps == 4
