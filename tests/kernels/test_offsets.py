"""Offsets beyond 32 bits, forced on few rows by views with holes: the interpreter's share.

The storage is a sparse file: only the pages that are touched exist. The real sizes are in
test_gpu.py.
"""

import pytest
import torch

from bench.bounds import make

pytest.importorskip("triton", reason="the fused kernels are written in Triton")

from softvq.kernels import fused

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the real sizes run instead")
LAYOUTS = [  # elements between two rows, rows
    pytest.param((2**31 + 8, 5), id="far rows"),
    pytest.param((2**26, 70), id="far ends of a tile"),
]


@pytest.fixture(params=LAYOUTS)
def spread(request, tmp_path):
    """A function that copies (1, N, D), cut to a few rows, into a strided view with far rows."""
    stride, rows = request.param
    files = (tmp_path / str(i) for i in range(8))

    def spread(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x[:, :rows].contiguous()
        # Room in front too: an offset that wraps around 32 bits reads holes there, not beyond.
        storage = torch.from_file(
            str(next(files)), shared=True, size=2**31 + rows * stride, dtype=x.dtype
        )
        view = storage.as_strided(x.shape, (0, stride, 1), 2**31)
        view.copy_(x)
        return view, x

    return spread


def problem():
    z, codebook, temperature = make(1, 70, 20, 16)
    return z.bfloat16(), codebook.bfloat16(), temperature


def test_forward_and_nearest(spread):
    z, *rest = problem()
    far, near = spread(z)
    for a, b in zip(fused.soft_forward(far, *rest), fused.soft_forward(near, *rest), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(fused.nearest(far, rest[0]), fused.nearest(near, rest[0]))


def test_backward(spread):
    z, *rest = problem()
    far_z, near_z = spread(z)
    far_g, near_g = spread(torch.randn_like(z))
    others = [torch.randn(1, near_z.shape[1]) for _ in range(2)]
    gradients = (
        fused.soft_backward(x, *rest, g, *others, torch.ones(1, 20), True, True, True)
        for x, g in ((far_z, near_g), (near_z, near_g), (near_z, far_g))
    )
    for far_latents, near, far_gradients in zip(*gradients, strict=True):
        assert torch.equal(far_latents, near)
        assert torch.equal(far_gradients, near)
