import os

import pytest
import torch

if not torch.cuda.is_available():
    # Before triton is imported: its interpreter runs the kernels on the CPU.
    os.environ["TRITON_INTERPRET"] = "1"

torch.set_num_threads(min(2, os.cpu_count()))


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill fresh memory with NaN, so that an element nobody wrote is seen."""
    torch.use_deterministic_algorithms(True)  # fills `empty` tensors too
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
