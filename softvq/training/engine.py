"""One training step as one object: forward, backward, guard, optimizer, steering.

On a CPU it is what it looks like. On a GPU the networks multiply in bfloat16, and after some steps
the whole one is recorded as a CUDA graph and replayed, so that a step costs the host one launch.
Nothing in a step waits for the device; what has to, or depends on its numbers,
`Steering.correct`, runs between two replays.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from softvq.models import TrainingStep
from softvq.training import ranks
from softvq.training.config import TrainConfig
from softvq.training.cuda_graph import Recorder, Replayed, first_line, record
from softvq.training.guards import Guard
from softvq.training.task import Examples, Task

COMPILE_FROM = 20_000  # steps: a shorter run is over before it has won back the compilation


class Engine:
    """Moves a task's model, its optimizer and its steering by one batch at a time.

    Args:
        config: resolved.
        say: takes a line for whoever watches, when something is not as asked.
        recorder: turns a function into one that replays it; None: every step runs as it is.
        backend: of torch.compile.
    """

    def __init__(
        self,
        config: TrainConfig,
        task: Task,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        say: Callable[[str], None],
        *,
        recorder: Recorder | None = None,
        backend: str = "inductor",
    ):
        self.task, self.optimizer, self.device, self.say = task, optimizer, device, say
        self.guard = Guard(config, task.model, task.steering, optimizer)
        self.steps = config.steps
        self.bfloat16 = uses_bfloat16(config, device)
        self.backend = backend if compiles(config, device) else None
        if device.type == "cuda" and ranks.count() == 1:
            recorder = recorder or record
        self.replayed = None if recorder is None else Replayed(self._compute, say, recorder)
        self.compiled: Callable[[Examples], TrainingStep] | None = None
        self.taken = 0

    def step(self, batch: Examples, number: int) -> TrainingStep:
        """Step number `number`, from 1, on training examples that are on the device.

        The tensors it returns may be overwritten by the next step. On a GPU the learning rates of
        the optimizer are 0-d tensors, after the first step.
        """
        if self.taken == 0:
            self._settle()
        elif self.taken == 1 and self.backend:  # the first step may have to place the codes
            self._compile()
        self.taken += 1
        progress = number / self.steps
        self.guard.remember()
        if self.replayed is None:
            seen = self._compute(batch, progress)
        else:
            seen = self.replayed(batch, progress)
        self.task.steering.correct(seen, number, progress)
        self.guard.restore()
        return seen

    def _compute(self, batch: Examples, progress: float | Tensor) -> TrainingStep:
        """All that the device does in every step."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            seen = ranks.averaged((self.compiled or self.task.step)(batch))
        self.optimizer.zero_grad(set_to_none=True)
        seen.losses["loss"].backward()
        ranks.average_gradients(self.task.model)
        seen = self.guard.check(seen, progress * self.steps)
        self.optimizer.step()
        self.task.steering.follow(seen, progress)
        return seen._replace(losses={name: loss.detach() for name, loss in seen.losses.items()})

    def _settle(self) -> None:
        """Bring the optimizer's numbers, perhaps of a checkpoint of another device, to this one."""
        cuda = self.device.type == "cuda"
        for group in self.optimizer.param_groups:
            rate = float(group["lr"])
            group["lr"] = torch.tensor(rate, device=self.device) if cuda else rate
            group["capturable"] = cuda
        for parameter, state in self.optimizer.state.items():
            for name, value in state.items():
                if value.shape == parameter.shape:  # it has to lie in memory as its parameter does
                    state[name] = torch.empty_like(parameter).copy_(value)

    def _compile(self) -> None:
        from torch._dynamo.exc import TorchDynamoException  # seconds, and it imports triton

        compiled = torch.compile(
            self.task.step, fullgraph=True, dynamic=False, backend=self.backend
        )

        def forward(batch: Examples) -> TrainingStep:
            try:
                return compiled(batch)
            except TorchDynamoException as error:
                self.say(f"the step runs without torch.compile: {first_line(error)}")
                self.compiled = None
                return self.task.step(batch)

        self.say("compiling the step, once …")
        self.compiled = forward


def uses_bfloat16(config: TrainConfig, device: torch.device) -> bool:
    """Whether the networks multiply in bfloat16."""
    return config.precision == "bfloat16" or (config.precision == "auto" and device.type == "cuda")


def compiles(config: TrainConfig, device: torch.device) -> bool:
    """Whether the step is to be compiled."""
    long = device.type == "cuda" and config.steps >= COMPILE_FROM
    return config.compile == "on" or (config.compile == "auto" and long)
