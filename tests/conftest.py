"""Fixtures for all tests."""

import pytest


@pytest.fixture(autouse=True, scope="session")
def away_from_the_sources(tmp_path_factory):
    """Python started in the source folder imports that, not the installed package with
    its compiled kernels; pytest does not, but the processes that tests start would."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("elsewhere"))
        yield
