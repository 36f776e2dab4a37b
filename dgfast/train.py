"""Train the networks of a bundle, one after the other.

Each command adds one network to the bundle folder, with its held-out metrics. Interrupted, the same command goes on
where it was; its state lies in BUNDLE/training/ROLE, which the finished bundle no longer needs.
"""

import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from dgfast.options import CommandGroup, Group, command_line, option

Callback = Callable[..., None]


def _shared(images: int, batch: int, lr: float, weight_decay: float, ema: float) -> Callable[[Callback], Callback]:
    """The options that every command takes, with this network's defaults."""
    options = [
        option(
            "--bundle",
            "folder",
            group=Group.OUTPUT,
            required=True,
            type=click.Path(path_type=Path),
            help="Folder to add to.",
        ),
        option(
            "--data",
            group=Group.INPUT,
            default="mnist",
            show_default=True,
            help="`mnist`, or an npz with images and labels.",
        ),
        option("--holdout", group=Group.INPUT, default=1000, show_default=True, help="Images kept for the metrics."),
        option(
            "--images", group=Group.TRAINING, default=images, show_default=True, help="Training images to draw in all."
        ),
        option("--batch", group=Group.TRAINING, default=batch, show_default=True, help="Images a step."),
        option("--lr", group=Group.TRAINING, default=lr, show_default=True, help="Largest learning rate."),
        option("--weight-decay", group=Group.TRAINING, default=weight_decay, show_default=True),
        option("--ema", group=Group.TRAINING, default=ema, show_default=True, help="Decay of the averaged weights."),
        option("--seed", group=Group.TRAINING, default=0, show_default=True),
        option(
            "--net", "net_json", group=Group.TRAINING, default="{}", help="Constructor keywords to change, as JSON."
        ),
        option("--device", group=Group.RUNTIME, default=None, help="cpu or cuda; default: what is there."),
    ]

    def decorate(command: Callback) -> Callback:
        for shared in reversed(options):
            command = shared(command)
        return command

    return decorate


@click.group(cls=CommandGroup, help=__doc__)
def main() -> None:
    pass


@main.command()
@_shared(images=320_000, batch=128, lr=2e-3, weight_decay=0.0, ema=0.999)
@option("--role", group=Group.OUTPUT, type=click.Choice(["score", "reference"]), default="score", show_default=True)
@option("--name", group=Group.OUTPUT, default=None, help="Name of a new bundle; default: its folder's.")
@option("--license", "license_text", group=Group.OUTPUT, default="", help="Licence of the weights.")
@option("--provenance", group=Group.OUTPUT, default="", help="Where the data came from.")
def score(role: str, name: str | None, license_text: str, provenance: str, **options: Any) -> None:
    """A class-conditional EDM denoiser (DDPM++), with label dropout for classifier-free guidance."""
    from dgfast.training.score import denoising_loss

    job = _Job(role, **options)
    size, channels = job.train.images.shape[1], job.train.images.shape[3]
    keywords = {
        "img_resolution": size, "img_channels": channels, "label_dim": job.classes, "model_type": "SongUNet",
        "model_channels": 16, "channel_mult": [1, 2, 2], "num_blocks": 1, "attn_resolutions": [8], "dropout": 0.0,
        "label_dropout": 0.1, "sigma_data": round(float(job.train.tensors()[0].std()), 2),
    }  # fmt: skip
    net = job.fit("EDMPrecond", keywords, denoising_loss(job.train, job.device))
    held_out = job.mean_loss(net, denoising_loss(job.held_out, job.device))
    class_names = tuple(str(k) for k in range(job.classes))
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

    job = _Job("classifier", **options)
    size, channels = job.train.images.shape[1], job.train.images.shape[3]
    keywords = {
        "image_size": size, "in_channels": channels, "model_channels": 16, "out_channels": job.classes,
        "num_res_blocks": 1, "attention_resolutions": [4], "channel_mult": [1, 1.5, 3], "num_head_channels": 24,
        "dropout": 0.1, "use_scale_shift_norm": True, "resblock_updown": True, "pool": "attention",
    }  # fmt: skip
    net = job.fit("EncoderUNetModel", keywords, noisy_classifier_loss(job.train, job.device))
    right = accuracy_by_sigma(NoisyClassifier(net), job.held_out, _SIGMAS, job.device)
    job.finish(net, {"held_out_accuracy_by_sigma": right}, time_schedule="linear")


@main.command()
@_shared(images=160_000, batch=128, lr=2e-3, weight_decay=1e-4, ema=0.99)
def features(**options: Any) -> None:
    """A small classifier of clean images, whose features `dgfast.evaluate` compares."""
    from dgfast.training.classifier import accuracy, clean_classifier_loss

    job = _Job("features", **options)
    keywords = {"in_channels": job.train.images.shape[3], "channels": 16, "num_classes": job.classes}
    net = job.fit("FeatureNet", keywords, clean_classifier_loss(job.train, job.device))
    job.finish(net, {"held_out_accuracy": round(accuracy(net, job.held_out, job.device), 4)})


@main.command()
@_shared(images=160_000, batch=128, lr=1e-3, weight_decay=1e-7, ema=0.999)
@option(
    "--generated", group=Group.INPUT, required=True, type=click.Path(path_type=Path),
    help="Unguided images of the same score net: a folder of `dgfast sample --format npz`.",
)  # fmt: skip
@option(
    "--dg-weight",
    group=Group.OUTPUT,
    default=1.0,
    show_default=True,
    help="Default guidance weight of the finished bundle.",
)
def discriminator(generated: Path, dg_weight: float, **options: Any) -> None:
    """DG's discriminator: a head on the frozen classifier, real against generated images."""
    from dgfast.errors import UserError
    from dgfast.image_folder import read_images
    from dgfast.nets.discriminator import Discriminator
    from dgfast.training.data import ImageSet, split
    from dgfast.training.discriminator import discriminator_loss, judge_by_sigma

    job = _Job("discriminator", **options)
    images, labels = read_images(generated)
    if len(images) < 5:
        raise UserError(f"{generated} holds {len(images)} images: a fifth of them is held out, so draw at least 5")
    fakes, held_out_fakes = split(ImageSet(images, labels), len(images) // 5)
    trunk: Any = job.bundle.load("classifier", job.device)
    keywords = {
        "image_size": trunk.feature_size, "in_channels": trunk.feature_channels, "model_channels": 48,
        "out_channels": 1, "num_res_blocks": 1, "attention_resolutions": [1], "channel_mult": [1],
        "num_head_channels": 24, "dropout": 0.1, "use_scale_shift_norm": True, "resblock_updown": True,
        "pool": "attention", "num_classes": job.classes,
    }  # fmt: skip
    loss = discriminator_loss(trunk, job.train, fakes, job.classes, job.device)
    net: Any = job.fit("EncoderUNetModel", keywords, loss)
    judged = judge_by_sigma(Discriminator(trunk, net), job.held_out, held_out_fakes, job.classes, _SIGMAS, job.device)
    job.finish(
        net, {"held_out_by_sigma": judged},
        about=lambda bundle: replace(bundle, guidance=replace(bundle.guidance, dg_weight=dg_weight)),
    )  # fmt: skip


@main.command()
@_shared(images=224_000, batch=32, lr=1e-3, weight_decay=0.0, ema=0.999)
@option(
    "--score-net", "score_json", group=Group.TRAINING, default="{}", help="The same as --net, for the score network."
)
@option("--r1", group=Group.TRAINING, default=0.1, show_default=True, help="Weight gamma of the gradient penalty.")
def generator(score_json: str, r1: float, **options: Any) -> None:
    """A one-step generator by Score Mismatching (arXiv 2309.11043), class-conditional.

    BUNDLE/training/generator/samples.png shows the averaged generator as it learns.
    """
    from dgfast.training.score_mismatching import LEVELS, Game, write_sheet

    job = _Job("generator", **options)
    size, channels = job.train.images.shape[1], job.train.images.shape[3]
    shape = {"img_resolution": size, "img_channels": channels, "label_dim": job.classes}
    net = job.build("Generator", shape | {"latent_dim": 64, "style_dim": 128, "channels": [64, 48, 24]})
    keywords = shape | {"levels": LEVELS, "channels": [16, 32, 64], "minibatch_std": True}
    keywords |= _json_object("--score-net", score_json)
    score = _build("--score-net", "NoisePredictor", keywords)
    players = Game(job.train.tensors(), net, score, job.device).players(r1)
    averaged = job.fit_together(players, watch=lambda nets: write_sheet(nets[1], job.folder / "samples.png"))[1]
    job.finish(averaged, {})


_SIGMAS = (0.002, 0.01, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 40.0)


class _Job:
    """One network's training: the data, the bundle it joins, the loop and what is written at the end."""

    def __init__(
        self, role: str, *, folder: Path, data: str, holdout: int, net_json: str, device: str | None, **schedule: Any
    ) -> None:
        from dgfast import bundle
        from dgfast.devices import pick_device
        from dgfast.training.data import load_images, split
        from dgfast.training.loop import Schedule

        self._changes = _json_object("--net", net_json)
        self.role, self.device = role, pick_device(device)
        self.schedule = Schedule(**schedule)
        everything = load_images(data)
        self.classes = int(everything.labels.max()) + 1
        self.train, self.held_out = split(everything, holdout)
        self.bundle = bundle.read_or_new(folder)
        self.folder = self.bundle.folder / "training" / role

    def build(self, kind: str, keywords: dict[str, Any]) -> Any:
        """The job's network, as --net changes it and as the seed draws it."""
        import torch

        self._kind, self._keywords = kind, {**keywords, **self._changes}
        torch.manual_seed(self.schedule.seed)
        return _build("--net", kind, self._keywords)

    def fit(self, kind: str, keywords: dict[str, Any], loss: Any) -> Any:
        from dgfast.training.loop import Player

        return self.fit_together([Player(self.build(kind, keywords), loss)])[0]

    def fit_together(self, players: Any, watch: Any = None) -> Any:
        from dgfast.training.loop import fit_together

        return fit_together(players, self.schedule, self.folder, self.device, watch)

    def mean_loss(self, net: Any, loss: Any, batches: int = 20) -> float:
        """`loss` of `net` over fixed draws."""
        import torch

        torch.manual_seed(0)
        with torch.no_grad():
            return round(sum(float(loss(net, self.schedule.batch)) for _ in range(batches)) / batches, 4)

    def finish(
        self, net: Any, metrics: dict[str, Any], time_schedule: str | None = None,
        about: Callable[[Any], Any] = lambda bundle: bundle,
    ) -> None:  # fmt: skip
        """Add the network to the bundle as it is by now: others may have joined it while this one was trained.

        Args:
            about: what else changes in the bundle.
        """
        from dgfast import bundle
        from dgfast.checkpoints.joining import alone

        command = f"dgfast train {click.get_current_context().info_name} {shlex.join(command_line())}"
        parameters = sum(p.numel() for p in net.parameters())
        record = {"command": command, "parameters": parameters, **metrics}
        with alone(self.bundle.folder):
            present = about(bundle.read_or_new(self.bundle.folder))
            done = bundle.with_net(present, self.role, net, self._kind, self._keywords, time_schedule)
            bundle.write(replace(done, metrics={**done.metrics, self.role: record}))
        click.echo(f"{self.bundle.folder}: {self.role}, {parameters:,} parameters, {json.dumps(metrics)}")


def _json_object(option: str, text: str) -> dict[str, Any]:
    from dgfast.errors import UserError

    try:
        return dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise UserError(f"{option} {text!r} is not a JSON object: {error}") from error


def _build(option: str, kind: str, keywords: dict[str, Any]) -> Any:
    from dgfast import nets
    from dgfast.errors import UserError

    try:
        return nets.build(kind, **keywords)
    except ValueError as error:
        raise UserError(f"{option}: {error}") from error


if __name__ == "__main__":
    main()
