"""Fixtures for all tests."""

import pytest


@pytest.fixture(autouse=True, scope="session")
def away_from_the_sources(tmp_path_factory):
    """Python started in the source folder imports that, not the installed package with
    its compiled kernels; pytest does not, but the processes that tests start would."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("elsewhere"))
        yield


@pytest.fixture
def numbers_in_float64():
    """Torch's optimizers keep numbers in its default dtype: NAdam its mu_product, ASGD
    its eta and mu, others a norm."""
    torch = pytest.importorskip("torch")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
