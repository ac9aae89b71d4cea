"""The site of documentation: the paths in its pictures are those of the rules, and its
pages are GitHub's with other links. CI builds it, with warnings as errors."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest

import fastopt

pytest.importorskip("matplotlib")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "docs"))
import gallery  # noqa: E402
import make  # noqa: E402
import public  # noqa: E402
from make import CATALOGUE  # noqa: E402

sys.path.remove(str(ROOT / "docs"))

RULES = {rule.name: rule for rule in CATALOGUE}
POINTS = (-1.5, 1.6), (0.3, -0.7), (1.0, 1.0)


@pytest.mark.parametrize("x, y", POINTS)
def test_the_slope_is_that_of_the_height(x, y):
    h = 1e-6
    numeric = (
        (gallery.height(x + h, y) - gallery.height(x - h, y)) / (2 * h),
        (gallery.height(x, y + h) - gallery.height(x, y - h)) / (2 * h),
    )
    assert gallery.slope(x, y) == pytest.approx(numeric, abs=1e-7)


@pytest.mark.parametrize("x, y", POINTS)
def test_the_curvature_is_that_on_the_valleys_floor(x, y):
    h, y = 1e-4, x * x  # there Gauss and Newton's second derivatives are exact
    numeric = [
        (gallery.slope(x + h, y)[0] - gallery.slope(x - h, y)[0]) / (2 * h),
        (gallery.slope(x, y + h)[1] - gallery.slope(x, y - h)[1]) / (2 * h),
    ]
    assert gallery.curvature(x, y) == pytest.approx(numeric, rel=1e-6)


def test_gd_walks_down_the_slope():
    path = gallery.walk(RULES["gd"], {"lr": 0.01})
    point, points = np.array(gallery.START), []
    for _ in range(gallery.STEPS + 1):
        points.append(point)
        point = point - 0.01 * np.array(gallery.slope(*point))
    np.testing.assert_allclose(path.trained, points, rtol=1e-12)
    assert path.evaluated is None


def test_muon_steps_by_the_learning_rate():
    """A column of a matrix, made orthogonal, has about the length 1."""
    path = gallery.walk(RULES["muon"], {"lr": 0.1}).trained
    lengths = np.linalg.norm(np.diff(path, axis=0), axis=1)
    assert lengths[0] == pytest.approx(0.1 * np.sqrt(2), rel=0.4)


@pytest.mark.parametrize("name", ["adamw", "sophia_g", "schedule_free_sgd", "prodigy"])
def test_a_picture_is_of_the_options_in_its_caption(name, tmp_path):
    path = gallery.best(RULES[name])
    shown = re.search(r"`(.*?)`", gallery.caption(RULES[name], path))[1]
    options = {k: float(v) for k, v in re.findall(r"(\w+)=([^,]+)", shown)}
    again = gallery.walk(RULES[name], options)
    np.testing.assert_array_equal(again.trained, path.trained)
    assert gallery.height(*path.trained[-1]) < gallery.height(*gallery.START) / 4
    assert gallery.calm(path)
    gallery.picture(path, tmp_path / "path.svg")
    svg = (tmp_path / "path.svg").read_text("utf-8")
    assert (gallery.EVALUATED in svg) == (name == "schedule_free_sgd")


def test_a_rule_that_leaves_the_picture_is_named(monkeypatch):
    monkeypatch.setattr(gallery, "LEARNING_RATES", [1e6])
    with pytest.raises(ValueError, match="sgd leaves the picture with all learning"):
        gallery.best(RULES["sgd"])


def test_each_rule_stands_once_under_a_heading():
    listed = " ".join(make.GROUPS.values()).split()
    assert len(listed) == len(set(listed)) and set(listed) <= set(RULES)
    groups = make.grouped(CATALOGUE)
    assert [rule.name for rule in groups["Schedule-free"]] == [
        f"schedule_free_{name}" for name in ("sgd", "adamw", "radam")
    ]
    new = fastopt.Rule(fastopt.gd.update, fastopt.gd.scalars, name="new")
    assert make.grouped([new]) == {make.OTHERS: [new]}


def test_the_reference_lists_what_users_need_of_a_rule():
    assert set(public.members(fastopt.Rule)) == {"in_passes", "hyperparameters"}
    assert public.names("fastopt")[:2] == ["Optimizer", "Rule"]


def test_links_and_formulas(monkeypatch):
    for module in ("sphinx", "math_core"):
        pytest.importorskip(module)
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import extension

    for page, folder, text, wanted in (
        ("a", "docs", "[b](b.md#c)", "[b](/b.md#c)"),
        ("a", "docs", "[b](../CHANGELOG.md#x)", "[b](/changelog.md#x)"),
        ("a", "docs", "[b](../examples)", "[b](/examples.md)"),
        ("a", "docs", "[b](../examples/x_y.py)", "[b](/examples.md#x_ypy)"),
        ("rules/a", "docs/rules", "[b](b.md)", "[b](/rules/b.md)"),
        ("rules/a", "docs/rules", "[b](../c.md)", "[b](/c.md)"),
        ("rules/a", "docs/rules", "[b](../../x.py)", "[b](path:../../x.py)"),
        ("changelog", "", "[b](docs/rules/c.md)", "[b](/rules/c.md)"),
        ("changelog", "", "[b](x/Y.md#z)", "[b](path:../x/Y.md)"),
        ("a", "docs", "[b](#c) [d](https://e)", "[b](#c) [d](https://e)"),
        ("a", "docs", "of $`x`$ | $`y`$", "of {math}`x` | {math}`y`"),
        ("a", "docs", "```sh\n$`x`$ [b](c)\n```\n", "```sh\n$`x`$ [b](c)\n```\n"),
    ):
        assert extension.converted(text, page, folder) == wanted
