"""The step as one object: the same bits as a plain loop, and what a GPU adds, without one."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.utils import counters

from softvq.schedules import annealed
from softvq.training import cuda_graph, steering
from softvq.training.config import TrainConfig
from softvq.training.engine import COMPILE_FROM, Engine, compiles, uses_bfloat16
from softvq.training.families import MODELS
from softvq.training.load import load_task
from softvq.training.optimizer import build_optimizer, set_learning_rates
from softvq.training.run_folder import RunFolder
from softvq.training.trainer import batches

CPU = torch.device("cpu")
STEPS = 12


@pytest.fixture(autouse=True)
def busy(tiny_run, monkeypatch):
    """Whatever is done now and then is done within a few steps; not in the run that others see."""
    monkeypatch.setattr(steering, "RESTART_EVERY", 2)
    monkeypatch.setattr(steering, "RESTART_FROM", 0.0)
    monkeypatch.setattr("softvq.training.steering.MEASURE_EVERY", 3)
    monkeypatch.setattr(cuda_graph, "WARM_STEPS", 4)


def config_of(tiny_runs, model, **settings) -> TrainConfig:
    config = RunFolder(tiny_runs(model)).read_config()
    if config.dead_code_threshold is not None:
        settings["dead_code_threshold"] = 0.9
    return dataclasses.replace(config, **settings)


def trained(config, device=CPU, engine=Engine, steps=STEPS, **options) -> SimpleNamespace:
    """Some steps of training; `engine` builds what makes them."""
    lines = []
    config, task = load_task(config, device)
    optimizer = build_optimizer(config, task.model)
    step = engine(config, task, optimizer, device, lines.append, **options).step
    order = (task.examples, config.batch_size, config.seed, 0, device)
    task.start(next(task.load(batches(*order))))
    source = task.load(batches(*order))
    losses = []
    for number, batch in zip(range(1, steps + 1), source, strict=False):
        task.model.train()
        set_learning_rates(optimizer, config, number - 1)
        seen = step(batch, number)
        losses.append({name: loss.clone() for name, loss in seen.losses.items()})
    state = task.model.state_dict() | task.steering.state_dict()
    return SimpleNamespace(task=task, optimizer=optimizer, lines=lines, losses=losses, state=state,
                           seen=seen)  # fmt: skip


class PlainLoop:
    """What every PyTorch loop does."""

    def __init__(self, config, task, optimizer, device, say):
        self.config, self.task, self.optimizer = config, task, optimizer

    def step(self, batch, number):
        seen = self.task.step(batch)
        self.optimizer.zero_grad()
        seen.losses["loss"].backward()
        self.optimizer.step()
        self.task.steering.follow(seen, number / self.config.steps)
        self.task.steering.correct(seen, number, number / self.config.steps)
        return seen


def assert_same(one, other) -> None:
    assert one.state.keys() == other.state.keys()
    for name, value in one.state.items():
        assert torch.equal(value, other.state[name]), name


def assert_close(one, other) -> None:
    for a, b in zip(one.losses, other.losses, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("model", MODELS)
def test_the_same_bits_as_a_plain_loop(tiny_runs, model):
    config = dataclasses.replace(config_of(tiny_runs, model), clip_gradient=0.0)
    assert_same(trained(config), trained(config, engine=PlainLoop))


@pytest.mark.parametrize("model", ["soft-vqvae", "vqvae-ema", "vqvae-gumbel"])
def test_a_recorded_step_is_replayed_on_inputs_that_lie_still(tiny_runs, model):
    """A recording is stood in for by the function itself."""
    recorded, replays = [], []

    def recorder(function):
        recorded.append(function)

        def replay():
            batch, progress = function.__self__.inputs
            replays.append(tuple(tensor.data_ptr() for tensor in (*batch, progress)))
            return function()

        return replay

    config = config_of(tiny_runs, model)
    found = trained(config, recorder=recorder)
    assert len(recorded) == 1 and not found.lines
    assert len(replays) == STEPS - cuda_graph.WARM_STEPS and len(set(replays)) == 1
    assert_close(found, trained(config))


def test_what_cannot_be_recorded_goes_on_as_it_is(tiny_runs):
    def recorder(function):
        raise RuntimeError("operation not permitted when stream is capturing\nmore of it")

    config = config_of(tiny_runs, "soft-vqvae")
    found = trained(config, recorder=recorder)
    assert found.lines == [
        "the step runs without a CUDA graph: operation not permitted when stream is capturing"
    ]
    assert_same(found, trained(config, recorder=lambda function: function))


@pytest.mark.parametrize(
    ("model", "recorder"), [("soft-vqvae", lambda function: function), ("vqvae-ema", None)]
)
def test_one_graph_without_a_break_whatever_temperature_and_rate(tiny_runs, model, recorder):
    torch._dynamo.reset()
    counters.clear()
    config = config_of(tiny_runs, model, compile="on")
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = trained(config, backend="aot_eager", recorder=recorder, steps=6)
    assert found.lines == ["compiling the step, once …"]
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert_close(found, trained(dataclasses.replace(config, compile="off"), steps=6))


def test_what_cannot_be_compiled_goes_on_as_it_is(tiny_runs):
    def broken(graph, inputs):
        raise NotImplementedError("no such thing")

    config = config_of(tiny_runs, "soft-vqvae", compile="on")
    found = trained(config, backend=broken)
    assert len(found.lines) == 2 and "without torch.compile: " in found.lines[1]
    assert_same(found, trained(dataclasses.replace(config, compile="off")))


@pytest.mark.parametrize("model", MODELS)
def test_bfloat16_stays_in_the_networks(tiny_runs, model):
    config = config_of(tiny_runs, model, precision="bfloat16")
    found = trained(config)
    assert all(latents.dtype == torch.bfloat16 for latents in found.seen.latents.values())
    assert {loss.dtype for loss in found.seen.losses.values()} == {torch.float32}
    kinds = {value.dtype for value in found.state.values()}
    assert kinds <= {torch.float32, torch.int64, torch.bool}
    assert all(loss.isfinite() for losses in found.losses for loss in losses.values())
    exact = trained(dataclasses.replace(config, precision="float32"))
    torch.testing.assert_close(found.losses[0]["loss"], exact.losses[0]["loss"], rtol=0.05, atol=0)
    assert found.losses[-1]["loss"] != exact.losses[-1]["loss"]


def test_what_auto_stands_for():
    cuda, long = torch.device("cuda"), {"steps": COMPILE_FROM}
    assert uses_bfloat16(TrainConfig(), cuda) and not uses_bfloat16(TrainConfig(), CPU)
    assert not uses_bfloat16(TrainConfig(precision="float32"), cuda)
    assert compiles(TrainConfig(**long), cuda) and not compiles(TrainConfig(**long), CPU)
    assert not compiles(TrainConfig(steps=COMPILE_FROM - 1), cuda)
    assert not compiles(TrainConfig(compile="off", **long), cuda)
    assert compiles(TrainConfig(compile="on"), CPU)


def test_an_optimizer_of_another_device(tiny_runs):
    """Rates that are tensors, and averages that lie in memory as channels_last has them."""
    config = config_of(tiny_runs, "soft-vqvae")
    config, task = load_task(config, CPU)
    optimizer = build_optimizer(config, task.model)
    for group in optimizer.param_groups:
        group["lr"], group["capturable"] = torch.tensor(0.1), True
    moved = {}
    for p in optimizer.param_groups[0]["params"]:
        average = torch.rand_like(p)
        moved[p] = average.clone()
        if p.dim() == 4:
            average = average.to(memory_format=torch.channels_last)
        optimizer.state[p] = {"step": torch.tensor(3.0), "exp_avg": average,
                              "exp_avg_sq": torch.zeros_like(p)}  # fmt: skip
    engine = Engine(config, task, optimizer, CPU, print)
    engine._settle()
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(0.1) and isinstance(group["lr"], float)
        assert group["capturable"] is False
    for p, average in moved.items():
        assert torch.equal(optimizer.state[p]["exp_avg"], average)
        assert optimizer.state[p]["exp_avg"].stride() == p.stride()
        assert optimizer.state[p]["step"] == 3


@pytest.mark.parametrize("schedule", ["constant", "exponential", "cosine"])
@pytest.mark.parametrize("progress", [-0.5, 0.0, 0.3, 1.0, 1.25])
def test_a_progress_on_the_device(schedule, progress):
    ends = torch.tensor(2.0), torch.tensor(0.1)
    expected = annealed(schedule, progress, *ends)
    torch.testing.assert_close(annealed(schedule, torch.tensor(progress), *ends), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_cuda_graph_is_the_step(tiny_runs, model, precision):
    config = config_of(tiny_runs, model, precision=precision, device="cuda")
    cuda = torch.device("cuda")
    found = trained(config, cuda)
    eager = trained(config, cuda, recorder=lambda function: function)
    assert not found.lines
    assert_same(found, eager)


@pytest.mark.gpu
@pytest.mark.parametrize("model", ["soft-vqvae", "vqvae-ema", "pixelcnn"])
def test_no_step_waits_for_the_device(tiny_runs, model, monkeypatch):
    monkeypatch.setattr("softvq.training.steering.MEASURE_EVERY", 10**6)
    config = config_of(tiny_runs, model, device="cuda")

    class Watched(Engine):
        def step(self, batch, number):
            watched = number > cuda_graph.WARM_STEPS + 1
            torch.cuda.set_sync_debug_mode("error" if watched else "default")
            try:
                return super().step(batch, number)
            finally:
                torch.cuda.set_sync_debug_mode("default")

    assert not trained(config, torch.device("cuda"), Watched).lines


@pytest.mark.gpu
def test_a_failed_recording_leaves_random_numbers_and_stream_alone():
    state, stream = torch.cuda.get_rng_state(), torch.cuda.current_stream()

    def waits():
        torch.rand(3, device="cuda").sum().item()

    with pytest.raises(RuntimeError):
        cuda_graph.record(waits)
    assert torch.cuda.current_stream() == stream
    assert torch.equal(torch.cuda.get_rng_state(), state)
    torch.rand(3, device="cuda").sum().item()


@pytest.mark.gpu
def test_another_thread_may_pin_memory_while_a_step_is_recorded():
    place = torch.zeros((), device="cuda")

    def pins_meanwhile():
        with ThreadPoolExecutor(1) as pool:
            pool.submit(torch.empty, 2**20, pin_memory=True).result()
        return place.add_(1)

    replay = cuda_graph.record(pins_meanwhile)
    assert replay() == 1
