import pytest


@pytest.fixture(autouse=True)
def _poisoned(nan_poison):
    """Every kernel test runs on poisoned memory."""
