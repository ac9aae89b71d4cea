"""The optimizer that CONTRIBUTING adds, added as it says, is right."""

import inspect
import re
import sys
from pathlib import Path

import numpy as np
import oracle
import pytest
from agreement import FLOAT64, data, error, settings

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
