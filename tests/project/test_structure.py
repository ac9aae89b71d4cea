"""bench/structure.py counts what it says."""

import ast

import pytest

pytest.importorskip("rich")


def test_arrows_and_circles(from_bench):
    structure = from_bench("structure")
    sources = {
        "fastopt": "import fastopt.a",
        "fastopt.a": "import numpy, fastopt\ndef f():\n    from fastopt.b import g",
        "fastopt.b": "from fastopt import c, some_rule",
        "fastopt.c": "import fastopt.a",
        "fastopt.d": "if TYPE_CHECKING:\n    import fastopt.a\nimport fastopt.b",
    }
    pairs = structure.arrows({name: ast.parse(text) for name, text in sources.items()})
    assert sorted("".join(n[-1] for n in pair) for pair in pairs) == [
        *("ab", "bc", "ca", "db"),
    ]
    assert structure.circles(pairs) == "3"
    assert structure.circles(pairs - {("fastopt.c", "fastopt.a")}) == "none"
