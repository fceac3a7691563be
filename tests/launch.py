"""Starting a script as two ranks on this machine, as torchrun does."""

import os
import subprocess
import sys
from pathlib import Path

from torch.distributed import TCPStore

ROOT = Path(__file__).parent.parent
RANKS = 2


def environment():
    """For processes that are to find this checkout, and to share few cores."""
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def launch(script, *arguments, groups=1):
    """Run the script on every rank; returns what each left: a list of CompletedProcess.

    It is called with the rank, and then with the arguments. It may join `groups` process groups,
    one after the other, each after `use_store(number)`.
    """
    stores = [
        TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in range(groups)
    ]
    common = environment() | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORTS": " ".join(str(store.port) for store in stores),
        "MASTER_PORT": str(stores[0].port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the stores are here
        "WORLD_SIZE": str(RANKS),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), *map(str, arguments)],
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(RANKS)
    ]
    done = []
    for process in processes:
        try:
            output, errors = process.communicate(timeout=300)
        except BaseException:
            for other in processes:
                other.kill()
            raise
        done.append(subprocess.CompletedProcess(process.args, process.returncode, output, errors))
    return done


def use_store(number):
    """In a launched script: let the next process group be number `number`."""
    os.environ["MASTER_PORT"] = os.environ["MASTER_PORTS"].split()[number]
