"""A training step recorded once and replayed, where the device can."""

from collections.abc import Callable

import torch
from torch import Tensor

from softvq.models import TrainingStep
from softvq.training.task import Examples

WARM_STEPS = 11  # before recording: what is compiled, tuned or placed at first must have been

Compute = Callable[[Examples, Tensor], TrainingStep]
Recorder = Callable[[Callable[[], TrainingStep]], Callable[[], TrainingStep]]


class Replayed:
    """A step (batch, progress ()) → TrainingStep whose inputs always lie in the same memory.

    The first steps run as they are, and count like all others; then one is recorded. Where that
    fails, one line says so, and they go on running as they are.
    """

    def __init__(self, compute: Compute, say: Callable[[str], None], recorder: Recorder):
        self.compute, self.say, self.recorder = compute, say, recorder
        self.inputs: tuple[Examples, Tensor] | None = None
        self.aside: torch.cuda.Stream | None = None  # one: each has a memory cache of its own
        self.run = self._warm_up
        self.warm = 0

    def __call__(self, batch: Examples, progress: float) -> TrainingStep:
        if self.inputs is None:
            still = torch.empty((), device=batch[0].device)
            self.inputs = (tuple(map(torch.empty_like, batch)), still)
            self.aside = torch.cuda.Stream() if still.is_cuda else None
        for place, tensor in zip(self.inputs[0], batch, strict=True):
            place.copy_(tensor, non_blocking=True)
        self.inputs[1].fill_(progress)
        return self.run()

    def _as_it_is(self) -> TrainingStep:
        return self.compute(*self.inputs)

    def _warm_up(self) -> TrainingStep:
        if self.warm == WARM_STEPS:
            self.run = self._recorded()
            return self.run()
        self.warm += 1
        if self.aside is None:
            return self._as_it_is()
        # Aside, as a recording is: autograd remembers the stream that it first met.
        here = torch.cuda.current_stream()
        self.aside.wait_stream(here)
        with torch.cuda.stream(self.aside):
            seen = self._as_it_is()
        here.wait_stream(self.aside)
        return seen

    def _recorded(self) -> Callable[[], TrainingStep]:
        try:
            return self.recorder(self._as_it_is)
        except RuntimeError as error:  # of CUDA or of an operator: some cannot be recorded
            self.say(f"the step runs without a CUDA graph: {first_line(error)}")
            return self._as_it_is


def record(function: Callable[[], TrainingStep]) -> Callable[[], TrainingStep]:
    """Record a function that only queues work as a CUDA graph; it is not run.

    Raises RuntimeError, with the random numbers and the current stream as they were, for a function
    that waits for the device or does what cannot be recorded. Other threads, as one that pins the
    memory of batches, may do so meanwhile.
    """
    here = torch.cuda.current_stream()
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    before = generator.clone_state()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = function()
    except RuntimeError:
        torch.cuda.set_stream(here)  # an error at the recording's end leaves its own current
        generator.graphsafe_set_state(before)  # it may think that the recording goes on
        raise

    def replay() -> TrainingStep:
        graph.replay()
        return result

    return replay


def first_line(error: BaseException) -> str:
    """What an error says, in short."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
