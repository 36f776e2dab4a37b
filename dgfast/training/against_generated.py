"""What `dgfast train discriminator` does: its data, its two objectives, when it stops and what it says at the end."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np

from dgfast.bundle import Bundle
from dgfast.config import GuidanceConfig
from dgfast.errors import UserError
from dgfast.guidance.declaration import overridden
from dgfast.latents import IMAGE_CHANNELS
from dgfast.manifest import content_of
from dgfast.nets.adm import EncoderUNetModel
from dgfast.networks import ScoreNet, image_shape, load
from dgfast.training.data import ImageSet, split
from dgfast.training.discriminator import Trial, judge_by_sigma, on_device, told_apart_by_labels, verdict
from dgfast.training.early_stopping import EarlyStopping, mean_of_draws
from dgfast.training.job import SIGMAS, Job
from dgfast.training.loop import Loss

_HELD_OUT_DRAWS = 20  # batches by which a check judges
_FEWEST = 10  # images, of which a tenth is kept apart


@dataclass(frozen=True)
class Setting:
    """
    Attributes:
        generated: folder of unguided samples. own_trunk: whether the network reads the images, not the classifier's
            features. divergence: whether it corrects the denoiser (see `Trial.corrected_denoising`), instead of telling
            real from generated. sigmas: lowest and largest noise level.
        patience: checks without a better held-out loss after which the run ends. dg_weight: default of the bundle.
    """

    generated: Path
    own_trunk: bool
    divergence: bool
    sigmas: tuple[float, float]
    patience: int
    dg_weight: float


def train_discriminator(job: Job, setting: Setting) -> None:
    """
    Raises:
        UserError: images that do not fit one another or the score network, labels missing, too few images.
    """
    fakes, digest = job.read(str(setting.generated), "--generated")
    job.recipe["content of --generated"] = digest
    if len(fakes) < _FEWEST or len(job.train) < _FEWEST:
        raise UserError(
            f"{len(fakes)} generated images and {len(job.train)} to train on beside --holdout: a tenth of either is "
            f"kept apart; {_FEWEST} of each are needed at least"
        )
    _require_own_samples(setting.generated, job.bundle)
    if not setting.own_trunk and "classifier" not in job.bundle.nets:
        raise UserError(
            f"bundle {job.bundle.name} has no classifier whose features a discriminator could read: train or convert "
            "one, or give --trunk own"
        )
    if job.schedule.batch < 2:
        raise UserError(f"--batch {job.schedule.batch}: half of each batch is real, half generated; give 2 at least")
    known = GuidanceConfig() if setting.own_trunk else GuidanceConfig(classifier_scale=1.0)
    networks = load(job.bundle, job.device, guidance=known)
    score, classes = networks.denoiser, networks.denoiser.label_dim
    for data, source in ((job.train, "--data"), (fakes, f"--generated {setting.generated}")):
        _check(data, source, score)
    if not setting.divergence and (said := told_apart_by_labels(job.train.labels, fakes.labels, classes)):
        click.echo(f"Note: {said}", err=True)

    fakes, judged_fakes = split(fakes, len(fakes) // 10)
    fakes, watched_fakes = split(fakes, len(fakes) // 10)
    real, watched = split(job.train, max(1, len(job.train) // 10))
    trunk: Any = None if networks.classifier is None else networks.classifier
    trunk = trunk and trunk.encoder

    def trial(real: ImageSet, generated: ImageSet) -> Trial:
        sets = (on_device(real, job.device), on_device(generated, job.device))
        return Trial(*sets, trunk, classes, networks.time, setting.sigmas)

    def loss_of(on: Trial) -> Loss:
        return on.corrected_denoising(score) if setting.divergence else on.cross_entropy

    judge = mean_of_draws(loss_of(trial(watched, watched_fakes)), job.schedule.batch, _HELD_OUT_DRAWS)
    net = job.fit(
        "EncoderUNetModel", _keywords(score, trunk, classes), loss_of(trial(real, fakes)),
        EarlyStopping(judge, patience=setting.patience),
    )  # fmt: skip
    judged = judge_by_sigma(trial(job.held_out, judged_fakes), net, score, SIGMAS)
    job.finish(
        net, {"held_out_by_sigma": judged},
        about=lambda bundle: replace(bundle, guidance=overridden(bundle.guidance, {"dg_weight": setting.dg_weight})),
    )  # fmt: skip
    low, high = setting.sigmas
    trained = {level: each for level, each in judged.items() if low <= float(level) <= high}
    sentence = verdict(trained or judged, setting.divergence)
    if sentence:
        click.echo(f"Note: {sentence}", err=True)


def _keywords(score: ScoreNet, trunk: EncoderUNetModel | None, classes: int) -> dict[str, Any]:
    """A network for these features, or for the score network's images."""
    shared = {
        "out_channels": 1, "num_res_blocks": 1, "num_head_channels": 24, "dropout": 0.1, "use_scale_shift_norm": True,
        "resblock_updown": True, "pool": "attention", "num_classes": classes,
    }  # fmt: skip
    if trunk is not None:
        read = {"image_size": trunk.feature_size, "in_channels": trunk.feature_channels}
        return shared | read | {"model_channels": 48, "attention_resolutions": [1], "channel_mult": [1]}
    read = dict(zip(("in_channels", "image_size"), image_shape(score), strict=False))
    return shared | read | {"model_channels": 16, "attention_resolutions": [4], "channel_mult": [1, 1.5, 3]}


def _check(data: ImageSet, source: str, score: ScoreNet) -> None:
    channels, height, width = image_shape(score)
    if data.images.shape[1:] == (height, width, channels):
        return
    seen, needed = (" x ".join(map(str, sides)) for sides in (data.images.shape[1:], (height, width, channels)))
    latents = channels not in IMAGE_CHANNELS and data.images.dtype == np.uint8
    remedy = "; if those are latents, name what encodes images as `vae` in bundle.json" if latents else ""
    raise UserError(f"{source}: images of {seen} (height, width, channels); the score network makes {needed}{remedy}")


def _require_own_samples(generated: Path, bundle: Bundle) -> None:
    """
    Raises:
        UserError: the folder's manifest says that other networks drew it than the bundle's score network alone.
    """
    job = (content_of(generated) or {}).get("job") if generated.is_dir() else None
    drawn_by = job.get("weights") if isinstance(job, dict) else None
    if isinstance(drawn_by, str) and drawn_by != bundle.fingerprint(["score"]):
        raise UserError(
            f"--generated {generated}: by its manifest, others drew it than the score network of bundle {bundle.name} "
            "alone; draw it anew, by this bundle with --dg-weight 0"
        )
