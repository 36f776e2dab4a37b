"""python -m benchmarks.parity: does every method draw in every runtime what it draws in eager PyTorch?

Small networks with random weights, one method after the other: the largest error of any call, relative to the largest
number of the same sample, and how far the drawn images end from eager's, as a share of their largest value.
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.workloads import fill_
from dgfast import GuidanceConfig, Networks, SamplingConfig, nets
from dgfast.denoiser import EDMPrecond
from dgfast.engines import runtime_of
from dgfast.export.joint_graph import generator, joint
from dgfast.export.subject import Subject
from dgfast.graph import Function
from dgfast.graph.agreement import relative_error
from dgfast.one_step import OneStep
from dgfast.runtimes import RUNTIMES, Build, Example, RuntimeLike
from dgfast.runtimes.onnx.file import save
from dgfast.runtimes.onnx.session import OnnxEngine
from dgfast.runtimes.onnx.writer import convert
from dgfast.sampler import Sampler

WAYS = ("compiled", "onnx", "file")
"""Runtimes of the function as it is, and an exported file whose inputs the guidance weights are."""
_CLASSES, _SEEDS = 3, (0, 1, 2)


@dataclass(frozen=True)
class Method:
    """What is drawn.

    Attributes:
        family: of the networks, "edm", "adm" or "dit"; "" for the one-step generator.
    """

    family: str
    sampling: SamplingConfig
    guidance: GuidanceConfig


@dataclass(frozen=True)
class Row:
    """How a method fares in a runtime.

    Attributes:
        error: the largest of any call; drift: of the images; moved: what guidance changed them by in eager. The last
            two are shares of their largest value.
    """

    method: str
    runtime: str
    error: float
    drift: float
    moved: float


_GRID = SamplingConfig(num_steps=3, solver="euler", sigma_min=0.1)
_HEUN = SamplingConfig(num_steps=3)
_ADM = SamplingConfig(solver="ddpm", respacing="3", clip_denoised=True)
METHODS: dict[str, Method] = {
    "discriminator": Method("edm", _HEUN, GuidanceConfig(dg_weight=0.03)),
    "discriminator, boosted": Method("edm", _GRID, GuidanceConfig(dg_weight=0.03, boosting=True)),
    "discriminator, gradient reused": Method(
        "edm", _HEUN, GuidanceConfig(dg_weight=0.03, dg_weight_2nd=0.03, dg_every=2, dg_reuse="linear")
    ),
    "classifier": Method("edm", _GRID, GuidanceConfig(classifier_scale=0.2)),
    "classifier-free": Method("edm", _GRID, GuidanceConfig(cfg_scale=2.0, guidance_interval=(0.2, 50.0))),
    "classifier-free, two scales": Method(
        "edm", _GRID, GuidanceConfig(cfg_scale=2.0, cfg_scale_low=3.0, cfg_branch=2.0)
    ),
    "autoguidance": Method("edm", _GRID, GuidanceConfig(autoguidance=2.0)),
    "low-density": Method("edm", _GRID, GuidanceConfig(diversity=0.2)),
    "predicted clean": Method("edm", _GRID, GuidanceConfig(fidelity=0.2, clean_time="0")),
    "both, with classes mixed": Method(
        "edm", _GRID, GuidanceConfig(diversity=0.2, fidelity=0.2, normalize="sample_l2", target_class=1, base_class=2)
    ),
    "low-density, discriminator": Method(
        "edm", _GRID, GuidanceConfig(diversity=0.2, dg_weight=0.03, dg_weight_2nd=0.03)
    ),
    "classifier by epsilon shift: ADM, ddim": Method(
        "adm", replace(_ADM, solver="ddim", eta=0.5), GuidanceConfig(classifier_scale=3.0)
    ),
    "classifier by mean shift, discriminator: ADM-G++": Method(
        "adm", _ADM,
        GuidanceConfig(classifier_scale=9.0, dg_weight=9.0, dg_schedule=((0.2, 0.5), (0.4, 1.0))),
    ),
    "classifier-free, discriminator: DiT-G++": Method(
        "dit", SamplingConfig(solver="ddpm", respacing="3"),
        GuidanceConfig(
            dg_weight=9.0, dg_window=(0.1, 2.0), cfg_scale=1.1, cfg_scale_low=1.4, cfg_branch=2.0, cfg_channels=3
        ),
    ),
    "one-step": Method("", _GRID, GuidanceConfig()),
}  # fmt: skip


def rows(name: str, runtimes: Sequence[str] = WAYS) -> Iterator[Row]:
    """One row for each runtime; no file holds the gradient that is to be reused."""
    method = METHODS[name]
    drawn = _sampler(method)(_SEEDS)
    plain = _sampler(replace(method, guidance=GuidanceConfig()))(_SEEDS) if method.family else drawn
    for runtime in runtimes:
        if runtime == "file" and method.guidance.dg_every > 1:
            continue
        errors: list[float] = []
        with tempfile.TemporaryDirectory() as folder:
            executing = runtime_of(_file(method, Path(folder))) if runtime == "file" else RUNTIMES[runtime]
            mine = _sampler(method, partial(_recording, executing.build, errors))(_SEEDS)
        yield Row(name, runtime, max(errors), _share(mine, drawn), _share(plain, drawn))


def _sampler(method: Method, runtime: RuntimeLike = "eager") -> Any:
    if not method.family:
        return OneStep(_generator(), runtime=runtime)
    return Sampler(_networks(method.family), method.sampling, method.guidance, runtime=runtime)


def _recording(build: Build, errors: list[float], function: Function, example: Example) -> Function:
    """The function built; every call of it is held against the function's."""
    candidate = build(function, example)

    def run(*arguments: Tensor | None) -> tuple[Tensor, ...]:
        with torch.no_grad():
            true_results = function(*arguments)
        results = candidate(*arguments)
        errors.extend(relative_error(mine, true) for mine, true in zip(results, true_results, strict=True))
        return results

    return run


def _file(method: Method, folder: Path) -> OnnxEngine:
    """The function that the method calls, exported and opened."""
    path = folder / "function.onnx"
    subject: Subject = (
        joint(_networks(method.family), method.sampling, method.guidance) if method.family else generator(_generator())
    )
    save(convert(subject.function, dict(subject.example(len(_SEEDS), seed=1)), subject.outputs), path)
    return OnnxEngine(path)


def _share(drawn: Tensor, reference: Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    return float((drawn - reference).abs().max() / reference.abs().max())


class _Raw(nn.Module):
    """What `EDMPrecond` makes a denoiser of; DiT and ADM's U-Net are there as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.label = nn.Linear(_CLASSES, 16)
        self.first, self.last = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 1, 3, padding=1)
        self.norm = nn.GroupNorm(4, 16)

    def forward(self, x: Tensor, c_noise: Tensor, class_labels: Tensor, _: None) -> Tensor:
        shift = self.label(class_labels) + c_noise.view(-1, 1)
        image: Tensor = self.last(F.silu(self.norm(self.first(x)) + shift[:, :, None, None]))
        return image


class Judge(nn.Module):
    """(u, t) -> logits [B, classes], as a classifier; with class_labels the one of each class, as a discriminator."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 32, 3, padding=1, stride=2)
        self.norm, self.out = nn.GroupNorm(8, 32), nn.Linear(32, _CLASSES)

    def forward(self, u: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        features = F.silu(self.norm(self.conv(u)) + t.float().view(-1, 1, 1, 1)).mean(dim=(2, 3))
        logits: Tensor = self.out(features)
        return logits if class_labels is None else (logits * class_labels).sum(dim=1)


@cache
def _networks(family: str) -> Networks:
    """Score network, a worse one, classifier and discriminator with random weights, none of them trivially zero."""
    kinds: dict[str, dict[str, Any]] = {
        "adm": {
            "model_type": "create_model", "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1",
            "attention_resolutions": "8", "num_head_channels": 32, "use_scale_shift_norm": True,
        },
        "dit": {"model_type": "DiT", "hidden_size": 32, "depth": 1, "num_heads": 2},
    }  # fmt: skip
    draws, channels = torch.Generator().manual_seed(0), {"edm": 1, "adm": 3, "dit": 4}[family]

    def net() -> Any:
        if family == "edm":
            return _frozen(EDMPrecond(_Raw(), 8, channels, _CLASSES), draws)
        shape = {"img_resolution": 8, "img_channels": channels, "label_dim": _CLASSES}
        return _frozen(nets.build("DDPMPrecond", **kinds[family], **shape), draws)

    score, worse = net(), net()
    classifier, discriminator = (_frozen(Judge(channels), draws) for _ in range(2))
    time = {"time": score.time} if family != "edm" else {}
    return Networks(score, discriminator, classifier, worse, **time)


@cache
def _generator() -> Any:
    keywords = {"img_resolution": 8, "img_channels": 1, "label_dim": _CLASSES, "latent_dim": 8, "channels": (16, 8)}
    return _frozen(nets.build("Generator", **keywords), torch.Generator().manual_seed(0))


def _frozen(net: nn.Module, draws: torch.Generator) -> Any:
    return fill_(net, draws).eval().requires_grad_(False)


@click.command(help=__doc__)
@click.option("--method", "methods", multiple=True, type=click.Choice(list(METHODS)), help="Default: all.")
def main(methods: tuple[str, ...]) -> None:
    click.echo(f"| method | {' | '.join(WAYS)} | guidance moves the images by |\n{'|---' * (len(WAYS) + 2)}|")
    for name in methods or METHODS:
        by_runtime = {row.runtime: row for row in rows(name)}
        cells = [f"{by_runtime[r].error:.1e}, {by_runtime[r].drift:.1e}" if r in by_runtime else "" for r in WAYS]
        moved = f"{by_runtime['onnx'].moved:.2g}" if METHODS[name].family else ""
        click.echo(f"| {name} | {' | '.join(cells)} | {moved} |")


if __name__ == "__main__":
    main()
