"""What several processes of torch.distributed do together."""

from softvq.distributed.split_codebook import split_soft_quantize

__all__ = ["split_soft_quantize"]
