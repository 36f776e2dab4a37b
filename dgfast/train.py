"""Train the networks of a bundle, one after the other.

Each command adds one network to the bundle folder, with its held-out metrics. Interrupted, the same command goes on
where it was; its state lies in BUNDLE/training/ROLE, which the finished bundle no longer needs.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial, wraps
from pathlib import Path
from typing import Any

import click

from dgfast.errors import UserError
from dgfast.option_types import PATH
from dgfast.options import CommandGroup, Group, option
from dgfast.stopping import interruptible

Callback = Callable[..., None]
_training = partial(option, group=Group.TRAINING)


def _shared(images: int, batch: int, lr: float, weight_decay: float, ema: float) -> Callable[[Callback], Callback]:
    """The options that every command takes, with this network's defaults."""
    options = [
        option("--bundle", "folder", group=Group.OUTPUT, required=True, type=PATH, help="Folder to add to."),
        option(
            "--data", group=Group.INPUT, default="mnist",
            help="`mnist`, an npz with images or latents and labels, or a folder of pictures or of `dgfast sample`.",
        ),
        option("--holdout", group=Group.INPUT, default=1000, help="Images kept for the metrics."),
        _training("--images", default=images, help="Training images to draw in all."),
        _training("--batch", default=batch, help="Images a step."),
        _training("--lr", default=lr, help="Largest learning rate."),
        _training("--weight-decay", default=weight_decay),
        _training("--ema", default=ema, help="Decay of the averaged weights."),
        _training(
            "--ema-rel", type=float, help="Average by EDM2's power function of this relative width, say 0.1, instead."
        ),
        _training("--seed", default=0),
        _training(
            "--start", type=PATH, help="Bundle whose network of this role is trained on; default: random weights."
        ),
        _training("--net", "net_json", default="{}", help="Constructor keywords to change, as JSON."),
        _training(
            "--dtype", type=click.Choice(["float32", "bf16"]), default="float32",
            help="bf16: what convolutions and matrix products read.",
        ),
        option(
            "--overwrite", "replaced", group=Group.OUTPUT, is_flag=True,
            help="Replace a network of this role that no training in this folder made.",
        ),
        option("--device", group=Group.RUNTIME, help="cpu or cuda; default: what is there."),
    ]  # fmt: skip

    def decorate(command: Callback) -> Callback:
        command = _interruptible(command)
        for shared in reversed(options):
            command = shared(command)
        return command

    return decorate


def _interruptible(command: Callback) -> Callback:
    @wraps(command)
    def run(**options: Any) -> None:
        with interruptible("stopped; the same command goes on from its last state, if it had one"):
            command(**options)

    return run


@click.group(cls=CommandGroup, help=__doc__)
def main() -> None:
    pass


@main.command()
@_shared(images=320_000, batch=128, lr=2e-3, weight_decay=0.0, ema=0.999)
@_training("--p-mean", default=-1.2, help="Mean of ln sigma.")
@_training("--p-std", default=1.2, help="Standard deviation of ln sigma.")
@option("--role", group=Group.OUTPUT, type=click.Choice(["score", "reference"]), default="score")
@option("--name", group=Group.OUTPUT, help="Name of a new bundle; default: its folder's.")
@option("--license", "license_text", group=Group.OUTPUT, default="", help="Licence of the weights.")
@option("--provenance", group=Group.OUTPUT, default="", help="Where the data came from.")
def score(
    role: str, name: str | None, license_text: str, provenance: str, p_mean: float, p_std: float, **options: Any
) -> None:  # fmt: skip
    """A class-conditional EDM denoiser (DDPM++), with label dropout for classifier-free guidance."""
    from dgfast.training.job import Job
    from dgfast.training.score import denoising_loss, deviation

    if not (math.isfinite(p_mean) and 0 < p_std < math.inf):
        raise UserError(f"--p-mean {p_mean:g} must be a finite number, --p-std {p_std:g} one above 0")
    job = Job(role, recipe={"p_mean": p_mean, "p_std": p_std}, **options)
    size, channels = job.train.images.shape[1], job.train.images.shape[3]
    keywords = {
        "img_resolution": size, "img_channels": channels, "label_dim": job.classes, "model_type": "SongUNet",
        "model_channels": 16, "channel_mult": [1, 2, 2], "num_blocks": 1, "attn_resolutions": [8], "dropout": 0.0,
        "label_dropout": 0.1, "sigma_data": deviation(job.train),
    }  # fmt: skip
    net = job.fit("EDMPrecond", keywords, denoising_loss(job.train, job.device, p_mean, p_std))
    held_out = job.mean_loss(net, denoising_loss(job.held_out, job.device))
    named = job.class_names and all(map(str.isprintable, job.class_names))
    class_names = job.class_names if named else tuple(str(k) for k in range(job.classes))
    job.finish(
        net, {"held_out_loss": held_out},
        about=lambda bundle: replace(
            bundle, name=name or bundle.name, class_names=class_names, license=license_text or bundle.license,
            provenance=provenance or bundle.provenance,
        ),
    )  # fmt: skip


@main.command()
@_shared(images=160_000, batch=128, lr=2e-3, weight_decay=0.0, ema=0.999)
def classifier(**options: Any) -> None:
    """A noise-aware ADM classifier, for classifier guidance and as the discriminator's trunk."""
    from dgfast.nets.discriminator import NoisyClassifier
    from dgfast.training.classifier import accuracy_by_sigma, noisy_classifier_loss
    from dgfast.training.job import SIGMAS, Job

    job = Job("classifier", **options)
    size, channels = job.train.images.shape[1], job.train.images.shape[3]
    keywords = {
        "image_size": size, "in_channels": channels, "model_channels": 16, "out_channels": job.classes,
        "num_res_blocks": 1, "attention_resolutions": [4], "channel_mult": [1, 1.5, 3], "num_head_channels": 24,
        "dropout": 0.1, "use_scale_shift_norm": True, "resblock_updown": True, "pool": "attention",
    }  # fmt: skip
    net = job.fit("EncoderUNetModel", keywords, noisy_classifier_loss(job.train, job.device))
    right = accuracy_by_sigma(NoisyClassifier(net), job.held_out, SIGMAS, job.device)
    job.finish(net, {"held_out_accuracy_by_sigma": right}, time_schedule="linear")


@main.command()
@_shared(images=160_000, batch=128, lr=2e-3, weight_decay=1e-4, ema=0.99)
def features(**options: Any) -> None:
    """A small classifier of clean images, whose features `dgfast.evaluate` compares."""
    from dgfast.training.classifier import accuracy, clean_classifier_loss
    from dgfast.training.job import Job

    job = Job("features", **options)
    keywords = {"in_channels": job.train.images.shape[3], "channels": 16, "num_classes": job.classes}
    net = job.fit("FeatureNet", keywords, clean_classifier_loss(job.train, job.device))
    job.finish(net, {"held_out_accuracy": round(accuracy(net, job.held_out, job.device), 4)})


@main.command()
@_shared(images=160_000, batch=128, lr=1e-3, weight_decay=1e-7, ema=0.999)
@option(
    "--generated",
    group=Group.INPUT,
    required=True,
    type=PATH,
    help="Unguided images of the same score net: a folder of `dgfast sample`, for a bundle of latents of its "
    "`--format latents`; or as --data.",
)
@_training(
    "--trunk",
    type=click.Choice(["classifier", "own"]),
    default="classifier",
    help="What reads the images: the bundle's frozen classifier, under a head, or the network itself.",
)
@_training(
    "--objective",
    type=click.Choice(["cross-entropy", "kl"]),
    default="cross-entropy",
    help="Tell real from generated, or correct the denoiser on real images.",
)
@_training("--sigma-min", default=0.001, help="Lowest noise level.")
@_training("--sigma-max", default=152.17, help="Largest noise level.")
@_training(
    "--patience", default=6, help="Checks, of 25 in the run, without a better held-out loss after which it ends."
)
@option("--dg-weight", group=Group.OUTPUT, default=1.0, help="Default guidance weight of the finished bundle.")
def discriminator(
    generated: Path, trunk: str, objective: str, sigma_min: float, sigma_max: float, patience: int, dg_weight: float,
    **options: Any,
) -> None:  # fmt: skip
    """DG's discriminator, real against generated images, ended by its loss on images that it is not trained on.

    A tenth of the training images and a tenth of the generated ones are kept for that, and as many generated ones for
    the metrics. Data may be latents.
    """
    from dgfast.training.against_generated import Setting, train_discriminator
    from dgfast.training.job import Job

    if not 0 < sigma_min < sigma_max < math.inf:
        raise UserError(f"--sigma-min {sigma_min:g} must be above 0 and below --sigma-max {sigma_max:g}, both finite")
    if patience < 1 or not math.isfinite(dg_weight):
        raise UserError(f"--patience {patience} must be 1 check at least, --dg-weight {dg_weight:g} a finite number")
    recipe = {"generated": str(generated), "trunk": trunk, "objective": objective, "sigmas": [sigma_min, sigma_max]}
    job = Job("discriminator", recipe=recipe, **options)
    setting = Setting(generated, trunk == "own", objective == "kl", (sigma_min, sigma_max), patience, dg_weight)
    train_discriminator(job, setting)


@main.command()
@_shared(images=224_000, batch=32, lr=1e-3, weight_decay=0.0, ema=0.999)
@_training("--score-net", "score_json", default="{}", help="The same as --net, for the score network.")
@_training("--r1", default=0.1, help="Weight gamma of the gradient penalty.")
def generator(score_json: str, r1: float, **options: Any) -> None:
    """A one-step generator by Score Mismatching (arXiv 2309.11043), class-conditional.

    BUNDLE/training/generator/samples.png shows the averaged generator as it learns.
    """
    from dgfast.training.job import Job, build, json_object
    from dgfast.training.score_mismatching import LEVELS, Game, write_sheet

    if not 0 <= r1 < math.inf:
        raise UserError(f"--r1 {r1:g} must be a finite number, 0 at least")
    job = Job("generator", recipe={"score_net": score_json, "r1": r1}, **options)
    size, channels = job.train.images.shape[1], job.train.images.shape[3]
    shape = {"img_resolution": size, "img_channels": channels, "label_dim": job.classes}
    net = job.build("Generator", shape | {"latent_dim": 64, "style_dim": 128, "channels": [64, 48, 24]})
    keywords = shape | {"levels": LEVELS, "channels": [16, 32, 64], "minibatch_std": True}
    keywords |= json_object("--score-net", score_json)
    score = build("--score-net", "NoisePredictor", keywords)
    players = Game(job.train.tensors(), net, score, job.device).players(r1)
    averaged = job.fit_together(players, watch=lambda nets: write_sheet(nets[1], job.folder / "samples.png"))[1]
    job.finish(averaged, {})


if __name__ == "__main__":
    main()
