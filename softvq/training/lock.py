"""One trainer to a run folder."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from softvq.training.run_folder import RunError


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the folder and hold folder/.lock, which the kernel lets go however the process ends.

    Folders that it made are removed again where they are still empty in the end.
    Raises RunError where the folder cannot be written, and naming the process that holds the lock.
    """
    path = folder / ".lock"
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _lock(path)
    except OSError as error:
        raise RunError(
            f"{folder}: cannot write a run there ({error.strerror}); choose another folder with "
            "--out"
        ) from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)
        with suppress(OSError):  # not empty, or no longer there
            for place in made:
                place.rmdir()


def _lock(path: Path) -> int:
    """A descriptor of the locked file, which names this process."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its last owner may have removed it meanwhile; such a lock is worth nothing.
            if path.exists() and os.path.samestat(os.stat(path), os.fstat(descriptor)):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
                return descriptor
        except BlockingIOError:
            owner = os.read(descriptor, 1000).decode() or "another process"
            os.close(descriptor)
            raise RunError(
                f"{path.parent}: {owner} is training there; wait for it, or choose another folder "
                "with --out"
            ) from None
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)
