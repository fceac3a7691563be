"""The command line: `softvq <command>`."""

import argparse
import dataclasses
import io
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin

import torch

import softvq
from softvq.data import DATASETS, DataError
from softvq.training.advice import is_out_of_memory
from softvq.training.codes import PICTURES, SPLITS
from softvq.training.commands import (
    decode,
    encode,
    encode_pictures,
    evaluate_run,
    reconstruct,
    sample,
)
from softvq.training.config import TrainConfig, read_config
from softvq.training.families import MODELS
from softvq.training.guards import TrainingError
from softvq.training.load import load_task
from softvq.training.plan import plan
from softvq.training.ranks import was_restarted
from softvq.training.report import write_report
from softvq.training.resume import resumed_config
from softvq.training.run_folder import RunError, RunFolder
from softvq.training.settings import (
    ConfigError,
    describe_default,
    nearest_hint,
    read_from,
    value_types,
)
from softvq.training.trainer import train

# what helps a command that takes as few images at once as it can
OUT_OF_MEMORY = "close other programs, or use a machine or a GPU that has more"


class Parser(argparse.ArgumentParser):
    """Errors are one line and exit status 2; a misspelt option names the nearest one."""

    def error(self, message: str) -> NoReturn:
        """Print the one line and exit."""
        line = "\\n".join(message.splitlines())  # a file's name may have several
        print(f"{self.prog}: error: {line}", file=sys.stderr)
        sys.exit(2)

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """As in argparse, but an option that is not known gets a hint."""
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            parser = getattr(known, "parser", self)
            options = [o for action in parser._actions for o in action.option_strings]
            hint = nearest_hint(unknown[0].partition("=")[0], options)
            parser.error(f"unknown option {unknown[0]}{hint}")
        return known


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # help has signs, and paths bytes, of no locale
        sys.stdout.reconfigure(errors="backslashreplace")
    parser = build_parser()
    options = parser.parse_args(arguments)
    try:
        status = options.command(options)
        if sys.stdout:  # may be closed
            sys.stdout.flush()
        return status
    except KeyboardInterrupt as stop:
        print(f"{options.parser.prog}: stopped{stop}", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # nobody reads any more; nothing is to be flushed at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (ConfigError, DataError, RunError) as error:
        options.parser.error(str(error))
    except OSError as error:
        place = "" if error.filename is None else f"{error.filename}: "
        options.parser.error(f"{place}{error.strerror or error}")
    except TrainingError as error:
        print(f"{options.parser.prog}: {error}", file=sys.stderr)
        return 1
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        print(f"{options.parser.prog}: out of memory; {OUT_OF_MEMORY}", file=sys.stderr)
        return 1


def build_parser() -> argparse.ArgumentParser:
    """All commands with their options."""
    parser = Parser(prog="softvq", description=softvq.__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"softvq {softvq.__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    def add(name: str, help: str, command: Any) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
        sub.set_defaults(command=command, parser=sub)
        return sub

    def add_of_run(name: str, help: str, command: Any) -> argparse.ArgumentParser:
        sub = add(name, help, command)
        sub.add_argument("run", type=Path, help="run folder of `softvq train`")
        return sub

    training = add("train", "train a model into a run folder", train_command)
    training.add_argument("--out", type=Path, help="run folder; default: runs/DATA-MODEL")
    training.add_argument("--config", type=Path, help="TOML file of settings; options override it")
    again = training.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on with the run in --out")
    again.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    training.add_argument(
        "--dry-run", action="store_true", help="fetch the data, print the plan, as TOML; no run"
    )
    training.add_argument("--quiet", action="store_true", help="print only warnings while training")
    training.add_argument(
        "--profile",
        type=count,
        default=0,
        metavar="N",
        help="write a trace of N steps to trace.json in the run folder",
    )
    training.add_argument("--tensorboard", action="store_true", help="also write event files")
    add_settings(training)

    evaluation = add_of_run("eval", "measure a run's model over a whole split", eval_command)
    evaluation.add_argument("--split", choices=SPLITS, default="test", help="default: test")
    evaluation.add_argument("--data-dir", type=Path, help="where the data are; default: as trained")
    pictures = add_of_run(
        "reconstruct", "reconstruct pictures with a run's model", reconstruct_command
    )
    pictures.add_argument("images", type=Path, nargs="+", help="picture files or folders of them")
    out = Path("reconstructions")
    pictures.add_argument("-o", "--out", type=Path, default=out, help=f"folder; default: {out}")
    encoding = add_of_run("encode", "turn the images of all splits into codes", encode_command)
    encoding.add_argument(
        "images", type=Path, nargs="*", help="instead: picture files or folders of them"
    )
    encoding.add_argument("--data", choices=DATASETS, help="default: the run's own data")
    encoding.add_argument("--data-dir", type=Path, help="where they are; default: as trained")
    encoding.add_argument("-o", "--out", type=Path, required=True, help="codes.npz")
    decoding = add_of_run("decode", "turn codes back into images", decode_command)
    decoding.add_argument("codes", type=Path, help="codes.npz of `softvq encode`")
    splits = (*SPLITS, PICTURES)
    decoding.add_argument("--split", choices=splits, default="test", help="default: test")
    decoding.add_argument("-o", "--out", type=Path, required=True, help="folder for the pictures")
    sampling = add_of_run("sample", "draw images that are in no data set", sample_command)
    sampling.add_argument("--prior", type=Path, help="run of a pixelcnn, for a model with codes")
    sampling.add_argument("--count", type=int, default=64, help="images; default: 64")
    sampling.add_argument("--class", dest="class_name", help="default: all classes alike")
    sampling.add_argument("--temperature", type=float, help="of the prior's choices; default: 1.0")
    sampling.add_argument("--seed", type=int, default=0, help="default: 0")
    sampling.add_argument("-o", "--out", type=Path, required=True, help="samples.png")
    add_of_run("report", "rebuild a run's report.html", report_command)
    return parser


def count(text: str) -> int:
    """A whole number above 0. Raises ArgumentTypeError."""
    try:
        if (number := int(text)) >= 1:
            return number
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text} is not allowed; it must be at least 1")


def add_settings(parser: argparse.ArgumentParser) -> None:
    """One option for each setting of TrainConfig, grouped as it groups them."""
    groups: dict[str, Any] = {}
    kinds = value_types(TrainConfig)
    for item in dataclasses.fields(TrainConfig):
        name = item.metadata["group"]
        if name not in groups:
            groups[name] = parser.add_argument_group(name)
        text = (item.metadata["help"] + describe_default(item, MODELS)).replace("%", "%%")
        kind = kinds[item.name]
        literal = get_origin(kind) is Literal
        groups[name].add_argument(
            "--" + item.name.replace("_", "-"),
            dest=item.name,
            default=argparse.SUPPRESS,
            help=text,
            **({"choices": get_args(kind)} if literal else {"type": kind, "metavar": "X"}),
        )


def train_command(options: argparse.Namespace) -> int:
    """softvq train: 0 when finished, 130 when stopped by a signal."""
    names = value_types(TrainConfig)
    given = {name: value for name, value in vars(options).items() if name in names}
    values = read_config(options.config) if options.config else {}
    from_file = values.keys() - given.keys()
    given = values | given
    out, resume = options.out, options.resume
    if not resume:
        with read_from(options.config, from_file):
            config = TrainConfig(**given)
        out = out or default_out(config)
        resume = was_restarted() and RunFolder(out).has_checkpoint()
    elif out is None:
        raise ConfigError("--resume needs the run folder: --out RUN")
    if resume:
        config = resumed_config(RunFolder(out), given)
    if options.dry_run:
        print(plan(*load_task(config, torch.device("cpu"))), end="")
        return 0
    finished = train(
        *(config, out),
        resume=resume,
        overwrite=options.overwrite,
        quiet=options.quiet,
        profile=options.profile,
        tensorboard=options.tensorboard,
    )
    return 0 if finished else 130


def default_out(config: TrainConfig) -> Path:
    """Where a run goes that nobody gave a place."""
    source = config.data or config.tokenizer.absolute().name
    return Path("runs") / f"{source}-{config.model}"


def eval_command(options: argparse.Namespace) -> int:
    """softvq eval."""
    values = evaluate_run(RunFolder(options.run), options.split, options.data_dir)
    for name, value in values.items():
        print(f"{name:34} {value:.6g}")
    return 0


def reconstruct_command(options: argparse.Namespace) -> int:
    """softvq reconstruct."""
    for page in reconstruct(RunFolder(options.run), options.images, options.out):
        print(page)
    return 0


def encode_command(options: argparse.Namespace) -> int:
    """softvq encode."""
    run, out = RunFolder(options.run), options.out
    if not options.images:
        print(encode(run, options.data, options.data_dir, out))
        return 0
    for name in ("data", "data_dir"):
        if value := getattr(options, name):
            raise ConfigError(f"{name}: {value} does not go with images that are named one by one")
    print(encode_pictures(run, options.images, out))
    return 0


def decode_command(options: argparse.Namespace) -> int:
    """softvq decode."""
    print(decode(RunFolder(options.run), options.codes, options.split, options.out))
    return 0


def sample_command(options: argparse.Namespace) -> int:
    """softvq sample."""
    prior = None if options.prior is None else RunFolder(options.prior)
    path = sample(
        RunFolder(options.run),
        prior,
        options.count,
        options.class_name,
        temperature=options.temperature,
        seed=options.seed,
        out=options.out,
    )
    print(path)
    return 0


def report_command(options: argparse.Namespace) -> int:
    """softvq report."""
    print(write_report(RunFolder(options.run)))
    return 0
