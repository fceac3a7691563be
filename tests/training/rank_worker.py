"""One rank of test_training_ranks: python rank_worker.py RANK FOLDER TOKENIZER."""

import shutil
import signal
import sys
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import torch
from torch import distributed

from softvq.quantizers.restart import restart_codes
from softvq.training import evaluation, prior_evaluation, steering
from softvq.training.build import build_data, build_model
from softvq.training.codes import encode_splits, load_tokenizer
from softvq.training.config import TrainConfig
from softvq.training.families import IMAGES, QUANTISED
from softvq.training.ranks import joined
from softvq.training.run_folder import RunFolder
from softvq.training.settings import ConfigError
from softvq.training.trainer import Trainer, train
from tests.launch import use_store

CPU = torch.device("cpu")


def tiny(model, steps, **options):
    """Settings of a run of a few steps on the digits."""
    sizes = {"width": 2, "latent_dim": 3} if model in IMAGES else {"width": 4, "layers": 2}
    sizes |= {"codebook_size": 8} if model in QUANTISED else {}
    cadence = {"evaluate_every": 10, "checkpoint_every": 4}
    settings = {"batch_size": 32, "device": "cpu", **sizes, **cadence, **options}
    return TrainConfig(model=model, steps=steps, **settings)


# Models that draw nothing at random but their first weights: two ranks train as one.
EQUAL = {
    "soft": tiny("soft-vqvae", 30, kl_weight=0.0, decoder_input="quantized"),
    "soft-beside": tiny("soft-vqvae", 30, kl_weight=0.0, entropy_weight=0.1),
    "ema": tiny("vqvae-ema", 30, codebook_start="random", dead_code_threshold=0.0, decay=0.9),
}
DENSE = {"architecture": "dense", "hidden": "16", "width": None}
SMALL = {"evaluate_every": 200, "checkpoint_every": 200, **DENSE}
LONG = {
    "soft-200": tiny("soft-vqvae", 200, dead_code_threshold=0.5, **SMALL),
    "ema-200": tiny("vqvae-ema", 200, dead_code_threshold=0.5, decay=0.9, **SMALL),
}
OTHERS = {
    model: tiny(model, 3) for model in ("vqvae", "vqvae-gumbel", "vqvae2", "ae", "vae", "cvae")
}
# Noise, and codes that are restarted.
BUSY = tiny("soft-vqvae", 12, dead_code_threshold=0.9, decoder_input="quantized")
STOPPED_AT = 7


def precisely():
    """Patches: images and models of images are float64."""

    def build(*arguments):
        return build_model(*arguments).double()

    def to_pixels(images, device):
        return images.to(device).double() / 255

    def steer(*arguments):
        built = steering.build_steering(*arguments)
        if isinstance(built, steering.SoftSteering):
            built.annealing.double()
        return built

    patches = ExitStack()
    patches.enter_context(patch("softvq.training.images.build_steering", steer))
    patches.enter_context(patch("softvq.training.images.build_model", build))
    for module in ("images", "evaluation"):
        patches.enter_context(patch(f"softvq.training.{module}.to_pixels", to_pixels))
    return patches


def trained(config, out, **options):
    """The trainer of a run after its last step, without test split and pictures.

    Its `restarted` is how many codes were moved.
    """
    trainers, moves, steps = [], [], Trainer.run_to_the_end

    def run_and_keep(self):
        trainers.append(self)
        return steps(self)

    def restart_and_count(*arguments):
        codes, moved = restart_codes(*arguments)
        moves.append(moved.sum())
        return codes, moved

    with (
        patch.object(Trainer, "run_to_the_end", run_and_keep),
        patch.object(Trainer, "finish"),
        patch.object(steering, "RESTART_EVERY", 2),
        patch.object(steering, "RESTART_FROM", 0.0),
        patch("softvq.quantizers.ema.restart_codes", restart_and_count),
        patch("softvq.quantizers.restart.restart_codes", restart_and_count),
    ):
        train(config, out, quiet=True, **options)
    trainers[0].restarted = int(sum(moves))
    return trainers[0]


def state_of(trainer):
    """Everything that has to be the same on every rank."""
    parts = {name: part.state_dict() for name, part in trainer.parts.items()}
    parts |= {"step": trainer.progress.step, "best": trainer.progress.best_error}
    return parts | {"restarted": trainer.restarted}


def after_step(number, act):
    """A patch: do something right after a step."""
    step = Trainer._step

    def step_and_act(self, batch):
        step(self, batch)
        if self.progress.step == number:
            act()

    return patch.object(Trainer, "_step", step_and_act)


def stop():
    signal.raise_signal(signal.SIGTERM)


def fail():
    raise RuntimeError("the disk of this rank is on fire")


def validations(tokenizer):
    """Metrics of a model of images and of a prior over whole splits, in small batches."""
    run = RunFolder(tokenizer)
    model, images = load_tokenizer(run, CPU), build_data(run.read_config())
    codes = encode_splits(model, images, CPU)
    torch.manual_seed(0)
    predictor = build_model(
        tiny("pixelcnn", 1, tokenizer=tokenizer), {"levels": codes.levels, "classes": 0}
    )
    torch.nn.init.normal_(predictor.networks["codes"].head[-1].weight)
    with patch.object(evaluation, "BATCH", 50):
        seen = evaluation.evaluate(model, images.validation, CPU)
    bits = prior_evaluation.code_metrics(predictor, codes.validation, 50, CPU)
    return {"values": seen.values, "counts": seen.counts, "bits": bits}


def main(rank, folder, tokenizer):
    torch.set_num_threads(1)
    found, groups = {}, iter(range(100))

    def run(name, config, out=None, **options):
        use_store(next(groups))
        found[name] = state_of(trained(config, folder / (out or name), **options))

    with precisely():
        for name, config in EQUAL.items():
            run(name, config)
    for name, config in (LONG | OTHERS).items():
        run(name, config)
    run("pixelcnn", tiny("pixelcnn", 3, tokenizer=tokenizer, dropout=0.5))

    run("whole", BUSY)
    with after_step(STOPPED_AT, stop if rank == 1 else int):
        run("stopped", BUSY, "parts")
    if rank == 0:
        shutil.copytree(folder / "parts", folder / "fewer")
    run("resumed", BUSY, "parts", resume=True)
    run("more ranks", BUSY, "alone", resume=True)  # a single process began it

    use_store(next(groups))
    found["alone"] = validations(tokenizer)
    with joined("cpu"):
        found["together"] = validations(tokenizer)

    use_store(next(groups))
    try:
        train(tiny("ae", 1, batch_size=33), folder / "odd", quiet=True)
    except ConfigError as error:
        found["error"] = str(error)
        distributed.destroy_process_group()
    torch.save(found, folder / f"{rank}.pt")

    use_store(next(groups))
    with after_step(2, fail if rank == 1 else int):
        trained(tiny("ae", 100), folder / "failed")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
