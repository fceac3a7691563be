"""Batch norm whose statistics are those of all replicas' batches."""

import torch
from torch import Tensor, distributed, nn

from softvq.distributed.collectives import is_synced, sum_over_replicas
from softvq.losses import in_float32


def synchronise_batch_norms(model: nn.Module) -> None:
    """Replace every batch norm of the model, in place; weights and statistics stay as they are."""
    for name, child in model.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            norm = ReplicaBatchNorm(child.num_features, child.eps, child.momentum, child.affine)
            norm = norm.to(child.running_mean)  # its device and dtype
            norm.load_state_dict(child.state_dict())
            setattr(model, name, norm.train(child.training))
        else:
            synchronise_batch_norms(child)


class ReplicaBatchNorm(nn.SyncBatchNorm):
    """SyncBatchNorm that works on a CPU too. Replicas must have batches of one size.

    Alone, and in evaluation, it is an ordinary batch norm.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda or not self.training or not is_synced(None):
            return super().forward(x)
        axes = [axis for axis in range(x.dim()) if axis != 1]
        dtype, x = x.dtype, in_float32(x)  # under autocast the batch may be of half precision
        variance, mean = torch.var_mean(x, axes, correction=0)
        mean, variance = _joint_moments(mean, variance)
        with torch.no_grad():
            count = x.numel() // x.shape[1] * distributed.get_world_size()
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
            unbiased = variance * (count / (count - 1))
            self.running_var.lerp_(unbiased.to(self.running_var), self.momentum)
        scale = (variance + self.eps).rsqrt()
        scale = scale if self.weight is None else scale * self.weight
        shape = (-1, *[1] * (x.dim() - 2))
        normalised = (x - mean.view(shape)) * scale.view(shape)
        normalised = normalised if self.bias is None else normalised + self.bias.view(shape)
        return normalised.to(dtype)


def _joint_moments(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (C,) of all replicas' elements together, of each one's own (C,).

    As deviations from the joint mean: E x² − (E x)² would lose what a large mean leaves of it.
    """
    own = torch.stack([mean, variance])
    table = own.new_zeros(distributed.get_world_size(), *own.shape)
    table[distributed.get_rank()] = own
    means, variances = sum_over_replicas(table).unbind(1)
    joint = means.mean(0)
    return joint, (variances + (means - joint).square()).mean(0)
