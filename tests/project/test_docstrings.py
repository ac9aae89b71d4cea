"""Every public name, as docs/public.py lists them, has a docstring with an example that
runs; so ``help()`` and the API reference tell what it does."""

import contextlib
import doctest
import importlib.util
import inspect
import io
import os
import re
import sys
from pathlib import Path

import pytest

import fastopt
from fastopt import docstrings

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "docs"))
import public  # noqa: E402

sys.path.remove(str(ROOT / "docs"))

OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
SECTIONS = "Parameters Returns Yields Raises Attributes Notes Examples".split()
every_module = pytest.mark.parametrize("module", public.MODULES)


def imported(module):
    """A public module, if what it needs is installed."""
    if module == "fastopt.keras":
        os.environ.setdefault("KERAS_BACKEND", "torch")
    for needed in public.NEEDS.get(module, ()):
        pytest.importorskip(needed, reason=f"{needed} is not installed")
    if module == "fastopt.keras" and sys.modules["keras"].backend.backend() != "torch":
        pytest.skip("keras has another backend here")
    return importlib.import_module(module)


def documented(module):
    """The public objects of a module, with their full names; and the module itself."""
    return {
        module: imported(module),
        **public.objects(module),
        **public.results(module),
    }


def lacking(full, value):
    """What the docstring of a public object lacks."""
    text = inspect.getdoc(value) if not isinstance(value, tuple) else "a list >>>"
    if isinstance(value, type) and not vars(value).get("__doc__"):
        text = None
    if not text:
        yield f"{full}: no docstring"
        return
    if ">>>" not in text:
        yield f"{full}: no example"
    if isinstance(value, type):
        for name, member in public.members(value).items():
            owner = next(c for c in value.__mro__ if name in vars(c))
            if not inspect.getdoc(member):
                yield f"{owner.__qualname__}.{name}: no docstring"


@every_module
def test_every_public_name_has_a_docstring_with_an_example(module):
    missing = {x: None for item in documented(module).items() for x in lacking(*item)}
    assert not missing, "\n".join(missing)


def examples(value):
    """The docstrings of an object and of its methods."""
    yield "", inspect.getdoc(value)
    if isinstance(value, type):
        for name, member in public.members(value).items():
            yield f".{name}", inspect.getdoc(member)


@every_module
def test_the_examples_run(module):
    parser, failed, ran = doctest.DocTestParser(), [], 0
    for full, value in documented(module).items():
        needed = public.NEEDS.get(full, ())
        if not all(map(importlib.util.find_spec, needed)):
            continue
        for name in needed:  # what it prints then is no output of the example
            importlib.import_module(name)
        for member, text in examples(value):
            name = f"{full}{member}"
            names = {} if full != module else dict(vars(value))
            if module in ("fastopt.schedules", "fastopt.rule"):  # as doctest does
                names = dict(vars(imported(module)))
            test = parser.get_doctest(text or "", names, name, None, 0)
            output = io.StringIO()
            runner = doctest.DocTestRunner(optionflags=OPTIONS)
            with contextlib.redirect_stderr(io.StringIO()):
                runner.run(test, out=output.write)
            ran += runner.tries
            if runner.failures:
                failed.append(output.getvalue())
    assert not failed, "\n".join(failed)
    assert ran


@every_module
def test_sections_are_those_of_numpydoc(module):
    """Under these headings, with underlines of their length, as Sphinx wants them."""
    for full, value in documented(module).items():
        for member, text in examples(value):
            headings = re.findall(r"^(.+)\n(-{3,})$", text or "", re.M)
            for heading, line in headings:
                assert heading in SECTIONS, f"{full}{member}: {heading}"
                assert len(line) == len(heading), f"{full}{member}: {heading}"


# Rules ------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", fastopt.RULES, ids=lambda rule: rule.name)
def test_the_docstring_of_a_rule_says_all(rule):
    text = rule.__doc__
    said = " ".join(docstrings.module(rule).__doc__.split())
    assert " ".join(text.split()).startswith(said)
    for name in rule.hyperparameters:
        told = docstrings.meaning(rule, name)
        assert f"    {told}" in text if told else f"``{name}" in said, name
        assert re.search(rf"^{name} : .*, default \S", text, re.M), name
    for name in (*rule.state, *rule.carry):
        assert f"``{name}``" in text
    for function in docstrings.functions(rule):
        assert inspect.getsource(function).splitlines()[-1].strip() in text


def test_every_meaning_is_of_a_hyperparameter():
    """No description is left over."""
    known = {
        name
        for rule in fastopt.RULES
        for key in rule.hyperparameters
        for name in (f"{rule.name}.{key}", key)
    }
    assert not {*docstrings.ABOUT} - known


def test_a_rule_of_ones_own_has_a_docstring(tmp_path):
    def scalars(t, lr=0.5, momentum=0.9):
        return lr, momentum

    def update(p, g, m, lr, mu):
        m = mu * m + g
        return p - lr * m, m

    rule = fastopt.Rule(update, scalars, state=("m",), name="heavy_ball")
    text = rule.__doc__
    assert text.startswith("heavy_ball.\n")
    assert "lr : float or schedule, default 0.5\n    Learning rate." in text
    assert "    p - lr * m, m" in text.replace("return ", "")
    assert "Examples" not in text  # by which name it is called is not known
    names = {}
    exec("def update(p, g, lr):\n    return (p - lr * g,)\n", names)
    typed = fastopt.Rule(names["update"], fastopt.gd.scalars, name="typed_in")
    assert "Notes" in typed.__doc__ and "def update" not in typed.__doc__
    assert fastopt.Rule.__doc__.startswith("An optimizer: ``update``")
