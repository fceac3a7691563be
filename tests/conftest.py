import os
import shutil
from importlib import metadata

import numpy
import pytest
import torch

from softvq.training.config import TrainConfig
from softvq.training.families import IMAGES, QUANTISED
from softvq.training.trainer import train

if torch.cuda.is_available():
    # cuBLAS wants this before it is deterministic (below), and reads it once.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
elif "SOFTVQ_EMULATE" not in os.environ:  # tests/kernels/conftest.py
    # Before triton is imported: its interpreter runs the kernels on the CPU.
    os.environ["TRITON_INTERPRET"] = "1"
    triton = next((d.version for d in metadata.distributions(name="triton")), "")
    if triton.startswith("3.6.") and numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0":
        raise pytest.UsageError(
            f"Triton {triton} interprets the kernels with NumPy below 2.4 only, and this is "
            f"{numpy.__version__}: pip install 'numpy<2.4', or a newer PyTorch"
        )

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers whose threads wait for each other's cores take ten times as long.
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
else:
    torch.set_num_threads(min(2, torch.get_num_threads()))


def pytest_collection_modifyitems(items):
    """Tests marked gpu are skipped without a GPU, slow ones unless SOFTVQ_SLOW_TESTS=1."""
    reasons = {}
    if not torch.cuda.is_available():
        reasons["gpu"] = "needs a CUDA device"
    if os.environ.get("SOFTVQ_SLOW_TESTS") != "1":
        reasons["slow"] = "takes minutes; SOFTVQ_SLOW_TESTS=1 runs it"
    for item in items:
        for marker, reason in reasons.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill fresh memory with NaN, so that an element nobody wrote is seen."""
    torch.use_deterministic_algorithms(True)  # fills `empty` tensors too
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_runs(tmp_path_factory):
    """The folder of a finished run of a few steps on the digits, by model; of a pixelcnn also by
    the model whose codes it learns. Copy it before changing it."""
    folder = tmp_path_factory.mktemp("tiny")

    def run(model, tokenizer="soft-vqvae"):
        out = folder / (model if model in IMAGES else f"{model}-{tokenizer}")
        if out.exists():
            return out
        options = {"codebook_size": 8} if model in QUANTISED else {}
        if model in IMAGES:
            options |= {"width": 2, "latent_dim": 3}
        else:
            options |= {"width": 4, "layers": 2, "tokenizer": run(tokenizer)}
        config = TrainConfig(
            model=model,
            steps=12,
            batch_size=32,
            evaluate_every=5,
            checkpoint_every=4,
            device="cpu",
            **options,
        )
        assert train(config, out, quiet=True)
        return out

    return run


@pytest.fixture(scope="session")
def tiny_run(tiny_runs):
    """The finished run of a Soft VQ-VAE. Copy it before changing it."""
    return tiny_runs("soft-vqvae")


@pytest.fixture
def run(tiny_run, tmp_path):
    """A copy of it, to be changed."""
    return shutil.copytree(tiny_run, tmp_path / "run")


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Nothing a test forgets to place lands in the checkout."""
    monkeypatch.chdir(tmp_path)
