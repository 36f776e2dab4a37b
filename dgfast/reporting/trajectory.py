"""Guided beside unguided trajectories from equal seeds: what is predicted on the way, and what the guidances add."""

import json
import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dgfast import bounds
from dgfast.bundle import Bundle
from dgfast.config import GuidanceConfig, SamplingConfig
from dgfast.devices import pick_device, precision
from dgfast.errors import UserError, one_line
from dgfast.files import replacing
from dgfast.graph import Function
from dgfast.guidance import OUTSIDE_WINDOW
from dgfast.manifest import recorded, strict
from dgfast.networks import Networks, load
from dgfast.outputs import to_uint8
from dgfast.plan import Step
from dgfast.pure_function import PureFunction
from dgfast.ranges import Ranges
from dgfast.runtimes import Example
from dgfast.sampler import Sampler

FORMAT = "dgfast-trajectory-1"
MOST_SEEDS = 8
"""Trajectories in one file: each is two rows of the picture."""
_BYTES = 256 * 2**20  # of the arrays of a file
_KINDS = {
    "sigmas": "f", "seeds": "i", "labels": "i", "guided": "u", "unguided": "u", "corrections": "f", "log_ratios": "f",
    "about": "U",
}  # fmt: skip


@dataclass(frozen=True)
class Trajectory:
    """Two runs from the same N seeds, in S steps.

    Attributes:
        sigmas: noise levels [S] that the steps set out from.
        guided, unguided: predicted clean images at these, and the finished ones: uint8 [S + 1, N, H, W, C].
        corrections: root mean square of what the guidances add to the predicted clean image, [S, N].
        log_ratios: the discriminator's along the guided run [S, N]; NaN where it was not asked.
        seeds, labels: int64 [N], -1 for no class.
        about: the bundle's name, and the settings of the guided run.
    """

    sigmas: np.ndarray
    guided: np.ndarray
    unguided: np.ndarray
    corrections: np.ndarray
    log_ratios: np.ndarray
    seeds: np.ndarray
    labels: np.ndarray
    about: Mapping[str, Any]

    @property
    def distances(self) -> np.ndarray:
        """Root mean square between the predicted clean images of the two runs, and the finished ones: [S + 1, N]."""
        difference = (self.guided.astype(np.float64) - self.unguided) / 127.5
        return np.sqrt(np.square(difference).mean(axis=(2, 3, 4)))


# Recording ------------------------------------------------------------------------------------------------------------
def record(
    bundle: Bundle, sampling: SamplingConfig, guidance: GuidanceConfig, seeds: Ranges, labels: Ranges | None
) -> Trajectory:
    """Draw the seeds twice, with the guidance and without.

    Args:
        labels: class indices, repeated over the seeds; None leaves them to the seeds.

    Raises:
        UserError: too many seeds, a guidance that does nothing, or a solver that calls no denoiser.
    """
    if len(seeds) > MOST_SEEDS:
        raise UserError(
            f"--seeds {seeds}: {len(seeds)} trajectories are more than a page shows; give {MOST_SEEDS} at most"
        )
    device = pick_device(None)
    with precision("float32"):
        networks = load(bundle, device, torch.float32, guidance)
        classes = None if labels is None else [labels[k % len(labels)] for k in range(len(seeds))]
        guided = _Recorder(networks, sampling, guidance)
        if not any(step.predictor or step.corrector for step in guided.sampler.steps):
            raise UserError(f"--trajectory {bundle.name}: no guidance acts; give one, such as --dg-weight 1")
        unguided = _Recorder(networks, sampling, GuidanceConfig())
        for recorder in (guided, unguided):
            recorder.run([*seeds], classes)
        drawn = guided.sampler.draw_labels([*seeds]) if classes is None else torch.tensor(classes)
    none = torch.full((len(seeds),), -1)
    about = {
        "bundle": bundle.name, "sampling": strict(asdict(sampling)), "guidance": strict(recorded(guidance))
    }  # fmt: skip
    return Trajectory(
        sigmas=np.array([step.sigma for step in guided.sampler.steps]),
        guided=np.stack(guided.predicted), unguided=np.stack(unguided.predicted),
        corrections=np.stack(guided.corrections), log_ratios=np.stack(guided.log_ratios),
        seeds=np.array([*seeds]), labels=(none if drawn is None else drawn).numpy().astype(np.int64), about=about,
    )  # fmt: skip


class _Recorder:
    """One run of a sampler, and what is seen on its way."""

    def __init__(self, networks: Networks, sampling: SamplingConfig, guidance: GuidanceConfig) -> None:
        self.predicted: list[np.ndarray] = []
        self.corrections: list[np.ndarray] = []
        self.log_ratios: list[np.ndarray] = []
        self._plain: list[Tensor] = []  # predictions without guidance, one a call of the step under way
        self.sampler = Sampler(networks, sampling, guidance, runtime=self._build)
        if self.sampler.job.solver.function != "denoiser":
            raise UserError(
                f"--trajectory shows runs of a denoiser, and the solver {sampling.solver} calls a "
                f"{self.sampler.job.solver.function}; give --solver heun, euler, dpmpp-2m or ddim"
            )

    def run(self, seeds: Sequence[int], labels: Sequence[int] | None) -> None:
        images = self.sampler(seeds, labels, on_step=self._on_step)
        self.predicted.append(_pixels(images))

    def _build(self, function: Function, example: Example) -> Function:
        """A runtime that asks the plain denoiser as well, of the very state and noise level that are guided."""
        assert isinstance(function, PureFunction), "a sampler hands over what its job calls"

        def call(*arguments: Tensor | None) -> tuple[Tensor, ...]:
            results = function(*arguments)
            plain = results[0]
            if function.guidances:
                plain = self.sampler.job.guided("denoiser", ())(*arguments[:3])[0]
            self._plain.append(plain)
            return results

        return call

    def _on_step(self, step: Step, x: Tensor, denoised: Tensor, log_ratio: Tensor) -> None:
        added = (
            (denoised - self._plain[0]).double().flatten(1)
        )  # the first call is the point that the step set out from
        self._plain.clear()
        self.predicted.append(_pixels(denoised))
        self.corrections.append(added.square().mean(1).sqrt().cpu().numpy())
        asked = torch.where(log_ratio < OUTSIDE_WINDOW, log_ratio.double(), math.nan)
        self.log_ratios.append(asked.cpu().numpy())


def _pixels(images: Tensor) -> np.ndarray:
    """uint8 [N, H, W, C]; of other channels than grey and colour have, they stand side by side, each in grey."""
    pixels = to_uint8(images)
    count, height, _, channels = pixels.shape
    return pixels if channels in (1, 3) else pixels.transpose(0, 1, 3, 2).reshape(count, height, -1, 1)


# Files ----------------------------------------------------------------------------------------------------------------
def save(trajectory: Trajectory, path: Path) -> None:
    """Write it in one move."""
    arrays: dict[str, Any] = {name: getattr(trajectory, name) for name in _KINDS if name != "about"}
    about = json.dumps({"format": FORMAT, **trajectory.about}, allow_nan=False)
    with replacing(path) as file:
        np.savez(file, **arrays, about=np.array(about))


def read(path: Path) -> Trajectory:
    """What `save` wrote.

    Raises:
        UserError: it cannot be read, or is something else.
    """
    with bounds.open_file(path) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                size = sum(member.file_size for member in archive.infolist())
            if size > _BYTES:
                raise ValueError(f"it holds {size:,} bytes, and {_BYTES:,} are the most")
            file.seek(0)
            with np.load(file, allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in _KINDS}
            about = bounds.parse_json(str(arrays.pop("about")))
            _check(arrays, about)
        except Exception as error:  # zip, deflate and npy have errors of their own, of a dozen classes
            raise UserError(
                f"{path} is no trajectory that `dgfast report --trajectory` wrote ({one_line(error)})"
            ) from error
    return Trajectory(**arrays, about=about)


def _check(arrays: Mapping[str, np.ndarray], about: object) -> None:
    """Raises ValueError for what does not belong together."""
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise ValueError(f"its format is not {FORMAT}")
    if any(array.dtype.kind != _KINDS[name] for name, array in arrays.items()):
        raise ValueError("an array of another type")
    steps, seeds = len(arrays["sigmas"]), len(arrays["seeds"])
    pixels = arrays["guided"].shape[2:]
    shapes = {
        "sigmas": (steps,), "seeds": (seeds,), "labels": (seeds,), "corrections": (steps, seeds),
        "log_ratios": (steps, seeds), "guided": (steps + 1, seeds, *pixels), "unguided": (steps + 1, seeds, *pixels),
    }  # fmt: skip
    wrong = [name for name, shape in shapes.items() if arrays[name].shape != shape]
    if wrong or len(pixels) != 3 or pixels[-1] not in (1, 3) or not 0 < seeds <= MOST_SEEDS or not steps:
        raise ValueError(f"the arrays do not fit together{': ' + ', '.join(wrong) if wrong else ''}")
    if not np.isfinite(arrays["corrections"]).all() or not (arrays["sigmas"] > 0).all():
        raise ValueError("a correction or a noise level is no number above 0")
