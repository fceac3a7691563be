"""Optional autotuning: the fastest of a few tiles, timed once and remembered on disk.

Off unless SOFTVQ_AUTOTUNE=1 when the process first asks. Another tile adds up in another order, so
that tuned results may differ from untuned ones in the last bits: each is deterministic for a given
cache, and the cache makes runs repeatable on one machine. It is one JSON file,
``softvq/tiles.json`` in $SOFTVQ_CACHE, $XDG_CACHE_HOME or ~/.cache; no file, no memory of it.
"""

import functools
import hashlib
import json
import math
import os
import tempfile
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch

Tile = TypeVar("Tile", bound=tuple[int, ...])
# Launches a kernel with a tile: the compiled kernel, and what it computed.
Run = Callable[[Tile], tuple[object, object]]

MARGIN = 0.03  # noise: whatever is to replace the shipped tile must be faster by more
DIFFERENCE = 0.1  # far above rounding, far below what a wrong operand makes
_lock = threading.Lock()  # a backward runs in another thread than its forward


@functools.cache
def _on() -> bool:
    return os.environ.get("SOFTVQ_AUTOTUNE") == "1"


def applies(device: torch.device) -> bool:
    """Whether calls on this device are tuned."""
    return _on() and device.type == "cuda"


class Cache:
    """Chosen tiles by key: the file's, read once, and those chosen since, each written at once.

    A damaged file counts as empty, and one that cannot be written as absent; each warns once.
    """

    def __init__(self, path: Path):
        self._path, self._damaged, self._unwritable = path, False, False
        self._tiles = self._read()

    def get(self, key: str, candidates: Sequence[Tile]) -> Tile | None:
        """The tile chosen for this key, if it still is one of the candidates."""
        saved = self._tiles.get(key)
        return next((tile for tile in candidates if list(tile) == saved), None)

    def put(self, key: str, tile: Tile, keep: bool) -> None:
        """Remember it; `keep` also on disk, beside what other processes wrote there meanwhile."""
        self._tiles[key] = list(tile)
        if self._unwritable or not keep:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps(self._read() | {key: list(tile)}, indent=0, sort_keys=True)
            with tempfile.NamedTemporaryFile("w", dir=self._path.parent, delete=False) as aside:
                aside.write(text)
            os.replace(aside.name, self._path)
        except OSError as error:
            self._unwritable = True
            warnings.warn(f"tuned tiles are not kept: {error}", stacklevel=2)

    def _read(self) -> dict[str, list[int]]:
        try:
            return {**json.loads(self._path.read_text())}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError) as error:
            if not self._damaged:
                warnings.warn(f"{self._path} is ignored: {error}", stacklevel=2)
            self._damaged = True
            return {}


@functools.cache
def _cache() -> Cache:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Cache(Path(os.environ.get("SOFTVQ_CACHE") or home) / "softvq" / "tiles.json")


@functools.cache
def environment(device: torch.device) -> str:
    """What a time depends on besides the call: the card, Triton, the kernels' source."""
    import triton

    source = b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py")))
    digest, card = hashlib.sha256(source).hexdigest()[:8], torch.cuda.get_device_name(device)
    return f"{card}, triton {triton.__version__}, softvq {digest}"


def fastest(device: torch.device, key: str, candidates: Sequence[Tile], run: Run) -> Tile:
    """The remembered tile for this key or, unless a CUDA graph is being captured, the fastest now.

    The first candidate is the shipped one. All run on the tensors of the call at hand, which fill
    the outputs that its own launch then overwrites.
    """
    key, shipped = f"{environment(device)}: {key}", candidates[0]
    with _lock:
        best = _cache().get(key, candidates)
        if best is None:
            if torch.cuda.is_current_stream_capturing():
                return shipped
            times = {tile: milliseconds(run, tile) for tile in candidates}
            # Once more, for it came first, and an idle card's clock is slow.
            times[shipped] = min(times[shipped], milliseconds(run, shipped))
            faster = [x for x in candidates if times[x] < (1 - MARGIN) * times[shipped]]
            faster.sort(key=times.__getitem__)
            best = next((x for x in faster if agree(run, x, shipped)), shipped)
            _cache().put(key, best, keep=math.isfinite(times[best]))
    return best


def agree(run: Run, tile: Tile, shipped: Tile) -> bool:
    """Whether both compute the same, up to rounding: some compilers got some tiles wrong."""
    results = []
    for each in (tile, shipped):
        result = run(each)[1]
        tensors = result if isinstance(result, tuple) else (result,)
        # The next run may fill the same memory.
        results.append([x.clone() for x in tensors if x is not None])
    for found, expected in zip(*results, strict=True):
        if expected.is_floating_point():
            difference = (found.float() - expected.float()).norm()
            if not difference <= DIFFERENCE * expected.float().norm():  # nor with a NaN
                return False
        elif (found != expected).float().mean() > DIFFERENCE:  # indices, which may tie
            return False
    return True


def milliseconds(run: Run, tile: Tile) -> float:
    """Median time of a run; infinite for a tile that spills, does not fit or does not compile."""
    from triton.errors import TritonError
    from triton.testing import do_bench

    try:
        compiled, _ = run(tile)
        if any(kernel.n_spills for kernel in compiled):
            return math.inf
        return do_bench(lambda: run(tile), warmup=10, rep=50, return_mode="median")
    except (TritonError, RuntimeError):  # PyTorch's "out of memory" is one of the latter
        return math.inf
