"""What keeps numbers that are not finite out of weights, running means and checkpoints."""

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from softvq.distributed.collectives import sum_over_replicas
from softvq.metrics import Mean
from softvq.models import TrainingStep
from softvq.training.config import TrainConfig
from softvq.training.warn import warn


class TrainingError(Exception):
    """Training that cannot go on; its one line says at which step and why."""


class Guard:
    """Looks at each step's losses and gradient before the optimizer does; a GPU is not waited for.

    A bad step, one with a number that is not finite, moves no weight. With on_nan "stop" no later
    one does either, and training ends as soon as the host has heard of it. With "skip" a bad step
    also leaves buffers, codes and steering as they were, and the next one goes on.

    Every replica of a data-parallel run calls a step bad when one does.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: nn.Module,
        steering: nn.Module,
        optimizer: torch.optim.Optimizer,
    ):
        self.skips, self.clip = config.on_nan == "skip", config.clip_gradient
        self.parameters = list(model.parameters())
        codes = [p for name, p in model.named_parameters() if name.endswith("codebook_parameter")]
        # What a forward pass and steering move: the optimizer is not the only one.
        moved = [*model.buffers(), *steering.buffers(), *codes]
        self._moved_by_others = moved if self.skips else []
        self._before = [tensor.detach().clone() for tensor in self._moved_by_others]
        device = self.parameters[0].device
        # What a fused optimizer asks, as it would of a GradScaler: 1 leaves out its step.
        self.bad = optimizer.found_inf = torch.zeros((), device=device)
        self._heard = torch.zeros((), pin_memory=device.type == "cuda")
        self._names: list[str] = []
        self._first = torch.zeros(0)  # the first bad step: its number, and a flag for each name
        self._told = False

    @torch.no_grad()
    def remember(self) -> None:
        """Before the forward pass: keep what it and steering move, to take it back."""
        if self._before:
            torch._foreach_copy_(self._before, self._moved_by_others)

    def check(self, seen: TrainingStep, step: float | Tensor) -> TrainingStep:
        """After the backward pass of step number `step`: judge it, and clip the gradient.

        Returns what others may take in: the losses with gradient_norm and, where steps are skipped,
        `skipped`, 0 or 1; zeros in place of a skipped step's. Raises TrainingError.
        """
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = get_total_norm(gradients)
        self._judge({**seen.losses, "gradient": norm}, step)
        if self.clip:
            clip_grads_with_norm_(self.parameters, self.clip, norm)
        losses = {**seen.losses, "gradient_norm": norm}
        if not self.skips:
            if self._heard:
                self.raise_if_bad()
            return seen._replace(losses=losses)
        losses = {name: self._or_zero(value) for name, value in losses.items()}
        return seen._replace(
            losses={**losses, "skipped": self.bad},
            latents={level: self._or_zero(latents) for level, latents in seen.latents.items()},
        )

    @torch.no_grad()
    def restore(self) -> None:
        """After steering: take back what a skipped step moved."""
        bad = self.bad.bool()
        for tensor, before in zip(self._moved_by_others, self._before, strict=True):
            tensor.copy_(torch.where(bad, before, tensor))

    def raise_if_bad(self) -> None:
        """Wait for the device; raises TrainingError after a bad step that was not to be skipped."""
        if not self.skips and self.bad:
            raise TrainingError(
                f"{self._complaint()}; no weight has seen it and the last checkpoint is good: "
                "lower --lr, look for broken images, or leave out such steps with --on-nan skip"
            )

    def read(self, losses: Mean) -> dict[str, float]:
        """The mean losses of the steps that were not skipped. Raises TrainingError without any."""
        self.raise_if_bad()
        values = losses.read()
        skipped = values.get("skipped", 0.0)
        if skipped and not self._told:
            warn(f"{self._complaint()}; such steps are skipped, see `skipped` in metrics.jsonl")
            self._told = True
        if skipped == 1:
            raise TrainingError(
                f"{self._complaint()}, and every step since the last validation was skipped; the "
                "last checkpoint is good: lower --lr, or look for broken images"
            )
        return {k: v if k == "skipped" else v / (1 - skipped) for k, v in values.items()}

    @torch.no_grad()
    def _judge(self, terms: dict[str, Tensor], step: float | Tensor) -> None:
        values = torch.stack([value.detach().float() for value in terms.values()])
        flags = sum_over_replicas((~values.isfinite()).float(), None)
        bad = flags.any().float()
        if not self._names:
            self._names = list(terms)
            self._first = torch.zeros(1 + len(terms), dtype=torch.float64, device=flags.device)
        new = bad * (self._first[0] == 0)
        number = step.view(1) if isinstance(step, Tensor) else flags.new_full((1,), step)
        self._first += new * torch.cat([number, flags])
        self.bad.copy_(bad if self.skips else torch.maximum(self.bad, bad))
        self._heard.copy_(self.bad, non_blocking=True)

    def _or_zero(self, value: Tensor) -> Tensor:
        return torch.where(self.bad.bool(), torch.zeros_like(value), value)

    def _complaint(self) -> str:
        """ "step 7: kl is not finite"; the weighted sum is blamed only when no part of it is."""
        step, *flags = self._first.tolist()
        guilty = [name for name, flag in zip(self._names, flags, strict=True) if flag]
        guilty.sort(key=lambda name: (name == "gradient", name == "loss"))
        return f"step {step:.0f}: {guilty[0]} is not finite"
