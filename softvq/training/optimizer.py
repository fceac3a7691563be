"""The optimizer of a run and its learning rates."""

import math
from typing import Any

import torch
from torch import nn

from softvq.training.config import TrainConfig

WARMUP = 100  # steps until the learning rate is at its peak
CODEBOOK_LR_FLOOR = 0.01  # of its peak: the codes follow T to the end


def build_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW; codes that are parameters have a learning rate of their own and no weight decay."""
    codes, rest = [], []
    for name, parameter in model.named_parameters():
        (codes if name.endswith("codebook_parameter") else rest).append(parameter)
    groups = [{"params": rest, "weight_decay": config.weight_decay}]
    if codes:
        groups.append({"params": codes, "weight_decay": 0.0})
    return torch.optim.AdamW(groups, lr=config.lr, fused=True)


def set_learning_rates(optimizer: torch.optim.Optimizer, config: TrainConfig, step: int) -> None:
    """Linear warm-up, then half a cosine to zero; the codes keep a floor."""
    warm = min(1.0, (step + 1) / min(WARMUP, max(config.steps // 10, 1)))
    cosine = 0.5 * (1 + math.cos(math.pi * step / config.steps))
    networks, *codes = optimizer.param_groups
    _set_rate(networks, config.lr * warm * cosine)
    for group in codes:
        floored = max(cosine, CODEBOOK_LR_FLOOR)
        _set_rate(group, config.lr * config.codebook_lr_factor * floored)


def _set_rate(group: dict[str, Any], rate: float) -> None:
    """In place where it is a tensor, which a recorded step reads."""
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate
