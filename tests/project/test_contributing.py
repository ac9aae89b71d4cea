"""The optimizer and the option that CONTRIBUTING adds, added as it says, are right."""

import importlib.util
import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import oracle
import pytest
from agreement import FLOAT64, data, error, settings
from installed import NUMBA

import fastopt
from fastopt import backends

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
RULE, NAME, ORACLE = re.findall(r"^```python\n(.*?)^```", TEXT, re.S | re.M)


@pytest.fixture
def added(tmp_path, monkeypatch):
    """The rule of a text, as a file in what Python takes for the rules' folder."""
    (name,) = re.findall(r"`fastopt/rules/(\w+)\.py`:\n\n```python", TEXT)
    assert name not in {rule.name for rule in fastopt.RULES}
    path = [*fastopt.rules.__path__, str(tmp_path)]
    monkeypatch.setattr(fastopt.rules, "__path__", path)

    def added(text):
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
        names = {}
        exec(NAME, names)
        return names[name]

    yield added
    sys.modules.pop(f"fastopt.rules.{name}", None)
    vars(fastopt.rules).pop(name, None)


@pytest.fixture
def rule(added):
    return added(RULE)


@pytest.fixture
def from_the_paper(monkeypatch):
    """The oracle and the bound that stands above it."""
    monkeypatch.setattr(oracle, "ORACLES", {})
    monkeypatch.setattr(oracle, "FLOAT32", {})
    exec(ORACLE, vars(oracle).copy())
    ((_, function),) = oracle.ORACLES.items()
    ((_, bound),) = oracle.FLOAT32.items()
    return function, bound * np.finfo(np.float32).eps


@pytest.mark.parametrize("backend", ["numpy", "numba"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_it_agrees_with_its_oracle(rule, from_the_paper, backend, dtype):
    try:
        backends.load(backend)
    except (ImportError, RuntimeError) as reason:
        pytest.skip(str(reason))
    function, bound = from_the_paper
    case = function, *data(dtype=dtype), backend
    bound = bound if dtype == np.float32 else FLOAT64
    assert error(rule, *case) <= bound
    assert len(list(settings(rule))) >= 3
    for values in settings(rule):
        assert error(rule, *case, **values) <= bound, values


MUTANTS = {"a * (g - b)": "a * g", "b_weight * b": "b", "1 - beta,": "beta,"}


@pytest.mark.parametrize("right", MUTANTS)
def test_its_oracle_flags_a_mutant(right, added, from_the_paper):
    assert right in RULE
    mutant = added(RULE.replace(right, MUTANTS[right]))
    assert not error(mutant, from_the_paper[0], *data()) <= FLOAT64


def test_the_places_look_like_that(rule):
    """The lines that the page shows are like those of their files."""
    listed = inspect.getsource(fastopt.rules)
    assert NAME.replace(rule.name, "adamw") in listed
    assert RULE.count("\n") + ORACLE.count("\n") < 40
    assert all(len(line) <= 88 for line in (RULE + ORACLE).splitlines())


def test_its_page_can_be_made(rule, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import make

    page = make.page(rule)
    assert r"b &\leftarrow b + (1 - \beta) \, (g - b)" in page
    assert "Ma & Yarats 2019](https://arxiv.org/abs/1810.06801)" in make.index([rule])
    assert RULE in page


# The option of a step -----------------------------------------------------------------

EDITS = [
    edit.split("\n", 1)
    for block in re.findall(r"^```diff\n@@ (.*?)^```", TEXT, re.S | re.M)
    for edit in block.split("\n@@ ")
]

COMPARE = """
import sys
import numpy as np
import fastopt

def drawn(seed):
    rng = np.random.default_rng(seed)
    shapes = [(), (7, 33), (3, 5, 19)]
    return [np.asarray(rng.normal(size=shape), dtype) for shape in shapes]

def run(name, backend, weights=None, **options):
    on_device = backend == "cuda"
    if on_device:
        from numba import cuda
    move = cuda.to_device if on_device else np.array
    params = [move(p) for p in drawn(0)]
    kind = getattr(fastopt, name)
    opt = kind(params, lr=0.25, backend=backend)
    for t in range(2):
        seeds = range(1 + t, 2 + t + 2 * bool(weights))
        tasks = [[move(g) for g in drawn(seed)] for seed in seeds]
        opt.step(tasks if weights else tasks[0], weights=weights, **options)
    return [np.array(p.copy_to_host() if on_device else p) for p in params]

backends = sys.argv[1:]
for dtype in (np.float32,) if "cuda" in backends else (np.float32, np.float64):
    for name in ("adamw", "lamb", "Adafactor"):
        for weights in (None, [0.5, -1.0, 2.0]):
            asked = {"soft_clip": 0.75, "grad_scale": 0.5, "weights": weights}
            for options in ({}, {"clip_value": 0.5, "clip_norm": 2.0}):
                reference = run(name, "numpy", **asked, **options)
                for backend in backends:
                    for a, b in zip(reference, run(name, backend, **asked, **options)):
                        assert a.tobytes() == b.tobytes(), (backend, name, options)
    p, g = drawn(0)[1], drawn(1)[1].astype(np.float64)
    params = [p.copy()]
    fastopt.gd(params, lr=0.25).step([drawn(1)[1]], soft_clip=0.75)
    exact = p.astype(np.float64) - 0.25 * g / (1 + np.abs(g) / 0.75)
    assert np.abs(params[0] - exact).max() <= 4 * np.finfo(dtype).eps
if "cython" in backends:
    import torch, fastopt.torch
    w = torch.nn.Parameter(torch.ones(5))
    w.grad = torch.full((5,), 3.0)
    fastopt.torch.SGD([w], lr=0.25).step(soft_clip=0.75)
    assert torch.allclose(w, torch.full((5,), 1 - 0.25 * 3 / (1 + 3 / 0.75)))
for wrong in (0.0, "much"):
    try:
        fastopt.gd([np.ones(3)]).step([np.ones(3)], soft_clip=wrong)
    except (TypeError, ValueError) as error:
        assert "soft_clip" in str(error)
    else:
        raise AssertionError("soft_clip was not checked")
"""


def test_an_option_is_added_in_two_files():
    assert {name for name, _ in EDITS} == {"fastopt/step.py", "fastopt/rules/passes.py"}


@pytest.mark.slow
def test_an_option_of_a_step_is_added_to_all_backends(tmp_path):
    pytest.importorskip("Cython", reason="Cython is not installed")
    pytest.importorskip("torch", reason="torch is not installed")
    for name in ("fastopt", "csrc", "setup.py", "pyproject.toml", "README.md"):
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, tmp_path / name)
    for compiled in (tmp_path / "fastopt").glob("*.so"):
        compiled.unlink()
    for name, edit in EDITS:
        path, lines = tmp_path / name, edit.strip("\n").split("\n")
        old = "\n".join(line[1:] for line in lines if line[0] != "+")
        new = "\n".join(line[1:] for line in lines if line[0] != "-")
        text = path.read_text(encoding="utf-8")
        assert f"\n{text}".count(f"\n{old}\n") == 1, old  # whole lines
        path.write_text(text.replace(old, new), encoding="utf-8")

    def run(*command, **environment):
        done = subprocess.run(
            [sys.executable, *command],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(tmp_path), **environment},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]

    run("setup.py", "build_ext", "--inplace")
    run("-c", COMPARE, "cython", *(["numba"] if NUMBA else []))
    if importlib.util.find_spec("numba_cuda"):
        run("-c", COMPARE, "cuda", NUMBA_ENABLE_CUDASIM="1")
