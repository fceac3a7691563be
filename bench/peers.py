"""The same operator by attention and by KeOps. Where each setup comes from: bench/README.md."""

import math
import multiprocessing
from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import pad, scaled_dot_product_attention

from bench.candidates import Candidate, Outputs, Run, Setting, batches

KEOPS_DIM = 16  # its own advice: small D


def peer_candidates(setting: Setting) -> list[Candidate]:
    """Every attention PyTorch offers on the device, FlexAttention, and KeOps where D is small."""
    names = ["FLASH_ATTENTION", "MATH"]
    if setting.device.type == "cuda":
        names += ["EFFICIENT_ATTENTION", "CUDNN_ATTENTION"]
    found = [
        Candidate(
            f"attention, {name.partition('_')[0].lower()}",
            partial(attention, getattr(SDPBackend, name)),
            "q",
        )
        for name in names
    ]
    found.append(Candidate("FlexAttention", flex, "q"))
    if setting.dim <= KEOPS_DIM:
        found.append(Candidate("KeOps", keops, "q", "pykeops"))
    return found


def attention(backend: SDPBackend, setting: Setting) -> Run:
    """scaled_dot_product_attention of (z, 1) with keys (c, −‖c‖²/2), scale 2/T, values c."""
    split, dim = batches(setting), setting.dim
    columns = 1 if setting.dtype == torch.float32 else 3
    width = math.ceil((dim + columns) / 8) * 8  # what the GPU backends ask for

    def run(z: Tensor, codebook: Tensor) -> Outputs:
        bias = split_bias(codebook, columns)
        filling = width - dim - columns
        queries = pad(pad(z, (0, columns), value=1.0), (0, filling))
        keys = pad(torch.cat([codebook, bias], 1), (0, filling))
        values = pad(codebook, (0, width - dim))
        shape = (split, 1, -1, width)
        keys, values = keys.expand(shape), values.expand(shape)
        if z.is_cuda:  # not every backend takes a stride of zero; a few megabytes
            keys, values = keys.contiguous(), values.contiguous()
        with sdpa_kernel(backend):
            out = scaled_dot_product_attention(
                queries.view(shape), keys, values, scale=2 / setting.temperature
            )
        return Outputs(out.reshape(setting.rows, width)[:, :dim])

    return run


def split_bias(codebook: Tensor, columns: int) -> Tensor:
    """−‖c‖²/2 as a sum of columns of the codebook's dtype: one 16-bit number is too coarse.

    The first column carries the whole gradient; the others are the remainders of its rounding.
    """
    bias = codebook.float().square().sum(1) / -2
    found = [bias.to(codebook.dtype)]
    rest = bias.detach()
    for _ in range(columns - 1):
        rest = rest - found[-1].detach().float()
        found.append(rest.to(codebook.dtype))
    return torch.stack(found, 1)


def flex(setting: Setting) -> Run:
    """FlexAttention, compiled, the codes' bias added to the score."""
    fused: Callable[..., Tensor] = torch.compile(flex_attention, dynamic=False)
    split = batches(setting)

    temperature = torch.tensor(setting.temperature, device=setting.device)

    def run(z: Tensor, codebook: Tensor) -> Outputs:
        bias = codebook.float().square().sum(1) / -temperature
        scale = 2 / temperature

        def scale_and_add_bias(score, batch, head, row, code):
            return score * scale + bias[code]

        keys = codebook.expand(split, 1, -1, -1)
        queries = z.view(split, 1, -1, setting.dim)
        out = fused(queries, keys, keys, score_mod=scale_and_add_bias, scale=1.0)
        return Outputs(out.reshape(z.shape))

    return run


def keops(setting: Setting) -> Run:
    """KeOps' softmax-weighted sum of the codes: no N×K matrix, (z−c)² formed in registers."""
    if setting.device.type == "cuda" and find_spec("pykeops"):
        _try_keops(setting._replace(rows=8, codes=8))
    return _keops(setting)


def _keops(setting: Setting) -> Run:
    """The candidate itself, once it is known not to end the process."""
    import pykeops
    from pykeops.torch import LazyTensor

    pykeops.set_verbose(False)

    def run(z: Tensor, codebook: Tensor) -> Outputs:
        codes = LazyTensor(codebook[None, :, :])
        distance = ((LazyTensor(z[:, None, :]) - codes) ** 2).sum(-1)
        return Outputs((-distance / setting.temperature).sumsoftmaxweight(codes, dim=1))

    return run


@cache
def _try_keops(setting: Setting) -> None:
    """Raise RuntimeError where KeOps ends the process, which the other candidates need: on an H200,
    KeOps 2.3 with the CUDA 13 of torch 2.11 does.
    """
    process = multiprocessing.get_context("spawn").Process(target=_use_keops, args=(setting,))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"ends its process with exit code {process.exitcode}")


def _use_keops(setting: Setting) -> None:
    z, codebook, grad = setting.draw(0)
    torch.autograd.grad(_keops(setting)(z, codebook).quantized, (z, codebook), grad)
