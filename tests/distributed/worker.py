"""One rank of tests/distributed: python worker.py RANK FOLDER."""

import functools
import sys
from pathlib import Path

import torch
from torch import distributed, nn

import softvq
from softvq.distributed import split_soft_quantize
from softvq.distributed.batch_norm import synchronise_batch_norms
from softvq.distributed.collectives import mean_over_replicas, sum_over_replicas

ROWS, DIM, SIZES = 24, 5, (7, 4)  # the codebook's parts are of different sizes
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
SCALES = (1.0, 5.0)  # soft assignments, and nearly hard ones


def problem(dtype, scale=1.0):
    """Latents with a repeated code among them, a codebook (11, D), T, and a loss's weights."""
    generator = torch.Generator().manual_seed(3)
    codebook = torch.randn(sum(SIZES), DIM, generator=generator, dtype=torch.float64)
    codebook[9] = codebook[2]  # in the other part: the lowest index wins
    z = torch.randn(2, ROWS // 2, DIM, generator=generator, dtype=torch.float64)
    z[0, 0] = codebook[2]
    weights = [torch.randn(z.shape, generator=generator, dtype=torch.float64)]
    weights += [torch.randn(z.shape[:-1], generator=generator).double() for _ in range(2)]
    return (scale * z).to(dtype), (scale * codebook).to(dtype), weights


def results(operator, z, codes, temperature, weights):
    """Outputs and gradients of a loss of all of them."""
    inputs = [x.clone().requires_grad_() for x in (z, codes, temperature)]
    out = operator(*inputs)
    outputs = (out.quantized, out.log_partition, out.entropy)
    sum((w * x.double()).sum() for w, x in zip(weights, outputs, strict=True)).backward()
    return [out.indices, *(x.detach() for x in outputs), *(x.grad for x in inputs)]


def whole(dtype, scale):
    """What one rank with the whole codebook gets."""
    z, codebook, weights = problem(dtype, scale)
    temperature = torch.tensor(0.7, dtype=torch.promote_types(dtype, torch.float32))
    return results(softvq.soft_quantize, z, codebook, temperature, weights)


def split(dtype, scale):
    """What this rank gets."""
    z, codebook, weights = problem(dtype, scale)
    temperature = torch.tensor(0.7, dtype=torch.promote_types(dtype, torch.float32))
    shard = codebook.split(SIZES)[distributed.get_rank()]
    return results(split_soft_quantize, z, shard, temperature, weights)


def in_a_group_of_its_own():
    """What this rank gets from a group that holds all codes and not the other rank."""
    ranks = range(distributed.get_world_size())
    groups = [distributed.new_group([rank]) for rank in ranks]  # by all ranks, in one order
    rank = distributed.get_rank()
    z, codebook, weights = problem(torch.float64, SCALES[rank])
    operator = functools.partial(split_soft_quantize, group=groups[rank])
    return results(operator, z, codebook, torch.tensor(0.7).double(), weights)


def close_codes():
    """Half-precision latents among codes whose distances half precision cannot tell apart."""
    generator = torch.Generator().manual_seed(4)
    z = 30 * torch.randn(200, 128, generator=generator)
    return z.half(), torch.randn(60, 128, generator=generator).half()


def nearest_of_close_codes():
    """The indices that this rank gets for them."""
    z, codebook = close_codes()
    return split_soft_quantize(z, codebook.chunk(2)[distributed.get_rank()], 1.0).indices


def network():
    """Batch norms of both kinds, one without weights."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 2),
        nn.BatchNorm2d(3),
        nn.Flatten(),
        nn.Linear(12, 4),
        nn.BatchNorm1d(4, affine=False),
    )
    return model.double()


def normalised(model, part, replicas):
    """Two steps of batch norms: outputs, gradients, statistics; and one in evaluation."""
    images = 100 + torch.randn(
        8, 2, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    target = torch.randn(8, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for _ in range(2):
        output = model(images[part])
    (output - target[part]).square().mean().backward()
    grads = {name: p.grad / replicas for name, p in model.named_parameters()}
    statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return output.detach(), grads, statistics, model.eval()(images).detach()


def images_of_half_precision():
    """A batch of all ranks."""
    return torch.randn(8, 3, 2, 2, generator=torch.Generator().manual_seed(1)).bfloat16()


def normalised_in_half_precision(dtype):
    """Output and running variance of a step of a batch norm in `dtype`; float32: as by autocast."""
    rank = distributed.get_rank()
    model = nn.Sequential(nn.BatchNorm2d(3)).to(dtype)
    synchronise_batch_norms(model)
    output = model(images_of_half_precision()[4 * rank : 4 * rank + 4])
    return output.detach(), model[0].running_var


def collectives():
    """Sums and means, and the gradients of the mean of all ranks' losses."""
    rank = distributed.get_rank()
    x = torch.tensor([1.0, 2.0 + rank], requires_grad=True)
    mean = mean_over_replicas(x)
    ((rank + 1) * mean.square().sum()).backward()
    return sum_over_replicas(torch.tensor([rank, 7])), mean.detach(), x.grad


def main(rank, folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    found = {"collectives": collectives(), "close codes": nearest_of_close_codes()}
    for dtype in DTYPES:
        for scale in SCALES:
            found[dtype, scale] = split(dtype, scale)
    found["own group"] = in_a_group_of_its_own()
    model = network()
    synchronise_batch_norms(model)
    rows = slice(4 * rank, 4 * rank + 4)
    output, grads, *rest = normalised(model, rows, distributed.get_world_size())
    grads = {name: sum_over_replicas(grad) for name, grad in grads.items()}
    found["batch norm"] = (output, grads, *rest)
    for dtype in (torch.float32, torch.bfloat16):
        found["half precision", dtype] = normalised_in_half_precision(dtype)
    torch.save(found, folder / f"{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
