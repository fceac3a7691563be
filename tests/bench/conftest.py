import pytest
import torch

from bench.results import Results


@pytest.fixture(autouse=True)
def ordinary_torch():
    """As a user runs it: no deterministic algorithms, and few threads."""
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def results(tmp_path) -> Results:
    return Results(tmp_path, torch.device("cpu"))
