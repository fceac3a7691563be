"""What a training step asks of a GPU, without one.

PyTorch's fake tensors have a device and no numbers: work on two devices at once fails, and so does
whatever needs a number on the host, which on a GPU means waiting for it.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException

from softvq import data
from softvq.quantizers import Quantizer
from softvq.training import images
from softvq.training.config import TrainConfig
from softvq.training.engine import Engine
from softvq.training.families import MODELS, PRIOR
from softvq.training.load import load_task
from softvq.training.optimizer import build_optimizer

CUDA = torch.device("cuda", 0)
BATCH = 8
SKIPS = {"on_nan": "skip", "clip_gradient": 1.0}


@pytest.fixture
def fake_gpu(monkeypatch):
    """New tensors lie on a GPU of compute capability 9.0 and have no numbers."""
    card = SimpleNamespace(
        name="Card", major=9, minor=0, shared_memory_per_block_optin=227 * 1024, total_memory=2**36
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(nn.Module, "to", lambda self, *_, **__: self)  # it is there already
    with FakeTensorMode(allow_non_fake_inputs=True), CUDA:
        yield


class Deaf:
    """In place of the host's copy of a flag, the one number that is read and never waited for."""

    def copy_(self, flag, non_blocking):
        assert non_blocking

    def __bool__(self):
        return False


def engine_of(monkeypatch, model, **settings) -> tuple[Engine, images.Batch]:
    """A step of a fresh model as it is after the first, and a batch.

    Without the two parts that fake tensors cannot follow: autograd's engine and fused AdamW.
    """
    monkeypatch.setattr(images, "any", lambda found: False, raising=False)  # unlabelled images?
    monkeypatch.setattr(data, "fingerprint", lambda *_: "")  # of labels that are not there
    monkeypatch.setattr(Quantizer, "_initialise", lambda *_: None)  # k-means waits, once
    config = TrainConfig(data="digits", model=model, steps=100, batch_size=BATCH, **settings)
    config, task = load_task(config, CUDA)
    optimizer = build_optimizer(config, task.model)
    monkeypatch.setattr(optimizer, "step", lambda: None)
    engine = Engine(config, task, optimizer, CUDA, print, recorder=lambda function: function)
    engine._settle()
    engine.guard._heard = Deaf()
    parameters = list(task.model.parameters())

    def backward(loss):
        assert loss.device == CUDA and loss.shape == ()
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    task.model.train()
    return engine, next(task.load(iter([torch.zeros(BATCH, dtype=torch.int64)])))


@pytest.mark.parametrize("model", [model for model in MODELS if model not in PRIOR])
@pytest.mark.parametrize("settings", [{}, SKIPS], ids=["stop", "skip"])
def test_a_step_stays_on_the_device(fake_gpu, monkeypatch, model, settings):
    engine, batch = engine_of(monkeypatch, model, **settings)
    for _ in range(2):  # the first one also makes what later ones reuse
        engine.guard.remember()
        seen = engine._compute(batch, torch.zeros(()))
        engine.guard.restore()
    for loss in seen.losses.values():
        assert loss.device == CUDA and loss.dtype == torch.float32


def test_it_would_be_seen(fake_gpu, monkeypatch):
    engine, batch = engine_of(monkeypatch, "soft-vqvae")
    follow = engine.task.steering.follow
    monkeypatch.setattr(
        engine.task.steering, "follow", lambda seen, progress: follow(seen, progress.item())
    )
    with pytest.raises(DataDependentOutputException):
        engine._compute(batch, torch.zeros(()))
    monkeypatch.setattr(
        engine.task.steering, "follow", lambda seen, progress: follow(seen, progress.cpu().view(1))
    )
    with pytest.raises(RuntimeError, match="device"):
        engine._compute(batch, torch.zeros(()))
