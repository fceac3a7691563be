"""Reading in other processes, in order."""

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from threading import Thread
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from softvq.data.types import DataError

AHEAD = 2  # results that each process has ready
CAN_WAIT = hasattr(signal, "sigwaitinfo")  # for signals, and who sent them; not on macOS
# Not a server of forks, Python's own choice on Linux from 3.14 on: a process would be that one's
# child, and not end when this one says so.
START = "fork" if CAN_WAIT else None

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_workers(
    read: Callable[[Item], Result], items: Iterable[Item], workers: int, *, pin: bool = False
) -> Iterator[Result]:
    """read(item) of each item, in the items' order, from so many processes; 0: from this one.

    No random number is drawn here. A DataError of `read` is raised as it is, at its item's turn.
    pin: put the results' tensors in page-locked memory, for copies to a GPU that nobody waits for.
    """
    items = iter(items)
    first = list(islice(items, 2))
    if len(first) < 2:
        workers = 0  # one alone is not worth a process
    loader = DataLoader(
        _Items(read),
        batch_size=None,
        sampler=chain(first, items),
        num_workers=workers,
        multiprocessing_context=START if workers else None,
        prefetch_factor=AHEAD if workers else None,
        pin_memory=pin,
        collate_fn=_as_it_is,
        worker_init_fn=_obey_the_parent_alone,
        generator=torch.Generator(),  # the default one would be drawn from
    )
    with _held_back_signals():
        results = iter(loader)
    try:
        for result in results:
            if isinstance(result, DataError):
                raise result
            yield result
    finally:
        del results  # its processes end with it; an error would keep it in its traceback


class _Items(Dataset[Any]):
    """What a function makes of each item; a DataError is a result, that none is wrapped."""

    def __init__(self, read: Callable[[Any], Any]):
        self.read = read

    def __getitem__(self, item: Any) -> Any:
        try:
            return self.read(item)
        except DataError as error:
            return error


def _as_it_is(result: Any) -> Any:
    return result


@contextmanager
def _held_back_signals() -> Iterator[None]:
    """Processes that start inside begin with these signals blocked, in all of their threads."""
    if not CAN_WAIT:
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _obey_the_parent_alone(worker: int) -> None:
    """Ctrl-C, and many a scheduler, signal all processes; the training one decides when to end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if CAN_WAIT:
        Thread(target=_end_when_told_by, args=[os.getppid()], daemon=True).start()


def _end_when_told_by(process: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != process:
        pass
    os._exit(0)
