"""Nested states as JSON and safetensors: nothing of what is read is ever run."""

import json
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

TENSOR, PAIRS = "__tensor__", "__pairs__"


def to_bytes(state: dict[str, Any]) -> tuple[bytes, bytes]:
    """JSON of the state, in which names stand for the tensors, and the tensors as safetensors.

    The state consists of tensors, numbers, strings, None, lists, and dictionaries whose keys are
    strings or numbers. Tuples come back as lists.
    """
    tensors: dict[str, Tensor] = {}
    skeleton = _without_tensors(state, "", tensors)
    return json.dumps(skeleton, indent=1).encode(), save(tensors)


def from_bytes(skeleton: bytes, tensors: bytes) -> dict[str, Any]:
    """The state of `to_bytes`, on the CPU. Raises ValueError, KeyError or SafetensorError."""
    return _with_tensors(json.loads(skeleton), load(tensors))


def _without_tensors(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[path] = value.detach().cpu().contiguous()
        return {TENSOR: path}
    if isinstance(value, dict):
        inside = {
            key: _without_tensors(item, f"{path}/{key}", tensors) for key, item in value.items()
        }
        names = all(isinstance(key, str) for key in inside)
        return inside if names else {PAIRS: list(inside.items())}
    if isinstance(value, list | tuple):
        return [
            _without_tensors(item, f"{path}/{index}", tensors) for index, item in enumerate(value)
        ]
    return value


def _with_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_with_tensors(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if TENSOR in value:
        return tensors[value[TENSOR]]
    items = value[PAIRS] if PAIRS in value else value.items()
    return {key: _with_tensors(item, tensors) for key, item in items}
