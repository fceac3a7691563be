from pathlib import Path

import pytest
import torch

from tests.launch import RANKS, launch


@pytest.fixture(scope="session")
def found(tmp_path_factory):
    """What the ranks computed."""
    folder = tmp_path_factory.mktemp("ranks")
    for done in launch(Path(__file__).with_name("worker.py"), folder):
        assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]
