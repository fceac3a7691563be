"""One long CSV a device: every row is one measurement of one candidate in one setting."""

import csv
import datetime
import hashlib
import platform
import re
import shlex
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import torch

import softvq

COLUMNS = (
    *("command", "candidate", "version", "outputs", "pass"),
    *("rows", "codes", "dim", "dtype", "precision", "temperature", "offset"),
    *("metric", "unit", "p20", "p50", "p80", "plain", "allowed"),
    *("times_eager", "percent_matmul", "percent_copy", "percent_exp", "extra_bytes", "status"),
    *("device", "threads", "torch", "triton", "softvq", "date", "line"),
)
SAME_RUN = ("device", "threads", "torch", "triton", "softvq")  # what makes two rows comparable
OUT = Path("bench/results")
Row = dict[str, object]


class Results:
    """The CSV of one device below a folder. A command that runs again replaces its own rows."""

    def __init__(self, out: Path, device: torch.device):
        self.environment = environment(device)
        name = self.environment["device"]
        if device.type == "cpu":
            name += f" {self.environment['threads']} threads"
        self.folder = out / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        self.path = self.folder / "results.csv"

    def read(self, command: str | None = None) -> list[dict[str, str]]:
        """The rows written so far, of one command or all."""
        if not self.path.exists():
            return []
        with self.path.open(newline="") as file:
            return [row for row in csv.DictReader(file) if command in (None, row["command"])]

    def current(self, command: str) -> list[dict[str, str]]:
        """The rows of a command that were measured by these versions on this device."""
        return [
            row
            for row in self.read(command)
            if all(row[name] == str(self.environment[name]) for name in SAME_RUN)
        ]

    def replace(self, command: str, rows: list[Row]) -> list[dict[str, str]]:
        """Write a command's rows in the place of its earlier ones, and return them as text."""
        kept = [row for row in self.read() if row["command"] != command]
        common = {**self.environment, "command": command, "line": line()}
        written = [
            {name: as_text((common | row).get(name, "")) for name in COLUMNS} for row in rows
        ]
        write_csv(self.path, COLUMNS, kept + written)
        return written


def write_csv(path: Path, columns: Iterable[str], rows: Iterable[Row]) -> None:
    """A table with a header; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def environment(device: torch.device) -> dict[str, object]:
    """What a number depends on besides its setting: machine, versions, date."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else "",
        "torch": torch.__version__,
        "triton": version("triton"),
        "softvq": f"{softvq.__version__}+{source_digest()}",
        "date": datetime.date.today().isoformat(),
    }


def version(package: str) -> str:
    """The installed version, "" when the package is missing; ours need not be installed."""
    if package == "softvq":
        return softvq.__version__
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def source_digest() -> str:
    """Changes with the operator's source, so that no result outlives the code it measured."""
    root = Path(softvq.__file__).parent
    files = [*root.rglob("*.py"), *(root.parent / "kernels").glob("*.py")]
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:8]


def device_name(device: torch.device) -> str:
    """The card's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def line() -> str:
    """The command line, as anyone would type it."""
    return f"python -m bench {shlex.join(sys.argv[1:])}".strip()


def as_text(value: object) -> str:
    """A cell of a table; numbers to four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def headline(row: dict[str, str]) -> str:
    """Machine, versions and date above a table."""
    threads = f", {row['threads']} threads" if row["threads"] else ""
    return (
        f"{row['device']}{threads}, torch {row['torch']}, triton {row['triton'] or 'none'}, "
        f"softvq {row['softvq']}, {row['date']}: {row['line']}"
    )


def print_table(columns: list[str], rows: list[list[str]]) -> None:
    """Columns as wide as their content; numbers to the right."""
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    for cells in [columns, *rows]:
        aligned = (
            cell.rjust(width) if _is_number(rows, i) else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        print("  ".join(aligned).rstrip())


def _is_number(rows: list[list[str]], column: int) -> bool:
    """Whether most cells of a column start with a digit."""
    cells = [row[column] for row in rows if row[column]]
    return sum(cell[0].isdigit() for cell in cells) > len(cells) / 2
