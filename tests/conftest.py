"""Fixtures for all tests."""

import importlib
import os
from pathlib import Path

import pytest
from campaign import Campaign
from installed import NUMBA, needs_numba

# Idle OpenMP threads wait for work by spinning. Test processes that share the cores
# would spin in each other's time: a test of 60 ms took 2 s. OpenMP reads this when it
# is loaded, which is later; processes that tests start inherit it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
BENCH = Path(__file__).resolve().parents[1] / "bench"


def pytest_xdist_auto_num_workers(config):
    """One process for a single test or for ``-s``, so that its output is seen."""
    single = all("::" in argument for argument in config.args)
    return 0 if single or config.option.capture == "no" else None


def pytest_collection_modifyitems(items):
    """Without Numba, tests that are parametrized with its backend skip."""
    for item in items:
        chosen = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if not NUMBA and any(
            value == "alone" or value.endswith("numba") for value in map(str, chosen)
        ):
            item.add_marker(needs_numba)


@pytest.fixture(autouse=True, scope="session")
def away_from_the_sources(tmp_path_factory):
    """Python started in the source folder imports that, not the installed package with
    its compiled kernels; pytest does not, but the processes that tests start would."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("elsewhere"))
        yield


@pytest.fixture(scope="session")
def from_bench():
    """A function that imports a script of ``bench/`` by name."""

    def imported(name):
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(BENCH)
            return importlib.import_module(name)

    return imported


@pytest.fixture
def numbers_in_float64():
    """Torch's optimizers keep numbers in its default dtype: NAdam its mu_product, ASGD
    its eta and mu, others a norm."""
    torch = pytest.importorskip("torch")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


# Campaigns of injected faults: a short form in every run, the long one by -m faults.


def pytest_generate_tests(metafunc):
    if "campaign" in metafunc.fixturenames:
        forms = ["short", pytest.param("long", marks=pytest.mark.faults)]
        metafunc.parametrize("campaign", forms, indirect=True)


SKIPPED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    item.stash[SKIPPED] = report.skipped
    return report


@pytest.fixture
def campaign(request, record_property):
    """Counts the injections of a test, and fails it at its end if one did harm."""
    kind = request.node.originalname.removeprefix("test_").replace("_", " ")
    counted = Campaign(kind, request.param == "long")
    yield counted
    if request.node.stash[SKIPPED] and not counted.tried:  # a package is missing
        return
    passed = counted.tried - len(counted.failures)
    record_property("campaign", (kind, counted.tried, passed))
    counted.close()


def pytest_terminal_summary(terminalreporter):
    """The table of the campaigns: class, tried, passed."""
    totals = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", None) != "teardown":
                continue
            for name, value in report.user_properties:
                if name == "campaign":
                    kind, tried, passed = value
                    before = totals.get(kind, (0, 0))
                    totals[kind] = before[0] + tried, before[1] + passed
    if totals:
        terminalreporter.section("injected faults: class, tried, passed")
        for kind, (tried, passed) in sorted(totals.items()):
            terminalreporter.write_line(f"{kind:60} {tried:8} {passed:8}")
