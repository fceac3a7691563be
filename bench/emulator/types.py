"""The types of PTX, as those of numpy that have their bits."""

import numpy as np

TYPES = {
    name: np.dtype(dtype)
    for name, dtype in {
        "pred": bool,
        "b8": "u1", "b16": "u2", "u16": "u2", "s16": "i2", "f16": "f2", "bf16": "u2",
        "b32": "u4", "u32": "u4", "s32": "i4", "f32": "f4",
        "b64": "u8", "u64": "u8", "s64": "i8", "f64": "f8", "f32x2": "u8",
    }.items()
}  # fmt: skip


def from_16(bits: np.ndarray, kind: str) -> np.ndarray:
    """The numbers that these 16 bits are, bfloat16 or float16, as float32."""
    if kind == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return bits.astype(np.uint16).view(np.float16).astype(np.float32)


def to_16(x: np.ndarray, kind: str) -> np.ndarray:
    """The bits of float32 numbers rounded to the nearest bfloat16 or float16."""
    if kind == "f16":
        return x.astype(np.float16).view(np.uint16)
    bits = np.ascontiguousarray(x).view(np.uint32)
    odd = bits >> np.uint32(16) & np.uint32(1)
    rounded = (bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)
