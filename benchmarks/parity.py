"""python -m benchmarks.parity: does every method draw in every runtime what it draws in eager PyTorch?

Small networks with random weights, one method after the other: the largest error of any call, relative to the largest
number of the same sample, and how far the drawn images end from eager's, as a share of the pixel range.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from benchmarks.workloads import fill_
from dgfast import GuidanceConfig, Networks, SamplingConfig, nets
from dgfast.engines import generated_by, guided_by
from dgfast.export.joint_graph import generator, joint
from dgfast.export.parity import relative_error
from dgfast.export.subject import Subject
from dgfast.guidance import Guidance, guided_denoiser, guided_posterior
from dgfast.nets.discriminator import Discriminator, NoisyClassifier
from dgfast.one_step import OneStep
from dgfast.runtimes import compiled, onnx
from dgfast.runtimes.onnx_writer import convert
from dgfast.sampler import Sampler

Function = Callable[..., tuple[Tensor, ...]]
_CLASSES, _SEEDS = 3, (0, 1, 2)
_ENCODER = {
    "kind": "EncoderUNetModel", "model_channels": 32, "num_res_blocks": 1, "attention_resolutions": [],
    "num_head_channels": 32, "pool": "attention", "use_scale_shift_norm": True,
}  # fmt: skip


@dataclass(frozen=True)
class Method:
    """What is drawn; without `family` by the one-step generator.

    Attributes:
        family: of the networks, "edm", "adm" or "dit". exported: whether a file can hold it.
    """

    family: str = ""
    sampling: SamplingConfig = SamplingConfig(num_steps=3, sigma_min=0.1)
    guidance: GuidanceConfig = GuidanceConfig()
    exported: bool = True


@dataclass(frozen=True)
class Row:
    """How a method fares in a runtime.

    Attributes:
        error: the largest of any call; drift: of the images; moved: what guidance changed them by in eager. The last
            two are shares of the pixel range.
    """

    method: str
    runtime: str
    error: float
    drift: float
    moved: float


_ADM = SamplingConfig(solver="ddpm", respacing="4", clip_denoised=True)
_DIT = SamplingConfig(solver="ddpm", respacing="4")
_TWO_SCALES = {"cfg_scale": 3.0, "cfg_scale_low": 6.0, "cfg_branch": 2.0}
METHODS: dict[str, Method] = {
    "discriminator": Method("edm", SamplingConfig(num_steps=4), GuidanceConfig(dg_weight=3.0)),
    "discriminator, at both points": Method("edm", guidance=GuidanceConfig(dg_weight=3.0, dg_weight_2nd=2.0)),
    "discriminator, boosted": Method("edm", guidance=GuidanceConfig(dg_weight=3.0, boosting=True)),
    "discriminator, gradient reused": Method(
        "edm", guidance=GuidanceConfig(dg_weight=3.0, dg_weight_2nd=3.0, dg_every=2, dg_reuse="linear"), exported=False
    ),
    "classifier": Method("edm", guidance=GuidanceConfig(classifier_scale=3.0)),
    "classifier-free": Method("edm", guidance=GuidanceConfig(cfg_scale=4.0, guidance_interval=(0.2, 50.0))),
    "classifier-free, two scales": Method("edm", guidance=GuidanceConfig(**_TWO_SCALES)),
    "autoguidance": Method("edm", guidance=GuidanceConfig(autoguidance=3.0)),
    "low-density": Method("edm", guidance=GuidanceConfig(diversity=3.0)),
    "predicted clean": Method("edm", guidance=GuidanceConfig(fidelity=3.0, clean_time="0")),
    "low-density, predicted clean, classes mixed": Method(
        "edm",
        guidance=GuidanceConfig(diversity=9.0, fidelity=9.0, normalize="sample_l2", target_class=1, base_class=2),
    ),
    "low-density, discriminator": Method(
        "edm", guidance=GuidanceConfig(diversity=3.0, dg_weight=3.0, dg_weight_2nd=3.0)
    ),
    "ADM, classifier by mean shift": Method("adm", _ADM, GuidanceConfig(classifier_scale=9.0)),
    "ADM, classifier by epsilon shift": Method(
        "adm", SamplingConfig(solver="ddim", respacing="ddim4", eta=0.5, clip_denoised=True),
        GuidanceConfig(classifier_scale=9.0),
    ),
    "ADM-G++": Method(
        "adm", _ADM, GuidanceConfig(classifier_scale=9.0, dg_weight=9.0, dg_schedule=((0.2, 0.0), (0.4, 1.0)))
    ),
    "DiT, classifier-free": Method("dit", _DIT, GuidanceConfig(cfg_scale=4.0, cfg_channels=3)),
    "DiT-G++": Method("dit", _DIT, GuidanceConfig(dg_weight=9.0, dg_window=(0.1, 2.0), cfg_channels=3, **_TWO_SCALES)),
    "one-step": Method(),
}  # fmt: skip


def rows(name: str) -> Iterator[Row]:
    """One row for the compiled and the ONNX runtime each, and one for a file with its weights as inputs."""
    method = METHODS[name]
    wanted, moved = _eager(method)
    for runtime, build in (("compiled", compiled.build), ("onnx", onnx.build)):
        errors: list[float] = []
        drawn = _sampler(method, runtime=partial(_recording, build, errors))(_SEEDS)
        yield Row(name, runtime, max(errors), _share(drawn, wanted), moved)
    if method.exported:
        errors = []
        with tempfile.TemporaryDirectory() as folder:
            drawn = _sampler(method, engine=_recording_file(method, Path(folder), errors))(_SEEDS)
        yield Row(name, "file", max(errors), _share(drawn, wanted), moved)


def _eager(method: Method) -> tuple[Tensor, float]:
    """What eager draws, and how far that is from what it draws without guidance; a generator has none."""
    drawn = _sampler(method)(_SEEDS)
    plain = _sampler(Method(method.family, method.sampling))(_SEEDS) if method.family else torch.zeros_like(drawn)
    return drawn, _share(drawn, plain)


def _sampler(method: Method, **keywords: Any) -> Any:
    if not method.family:
        return OneStep(_generator(), **keywords)
    return Sampler(_networks(method.family), method.sampling, method.guidance, **keywords)


def _recording(build: Any, errors: list[float], function: Function, example: Sequence[Tensor | None]) -> Function:
    return _compared(function, build(function, example), errors)


def _compared(function: Function, candidate: Function, errors: list[float]) -> Function:
    """The candidate; every call of it is held against the function's."""

    def run(*arguments: Tensor | None) -> tuple[Tensor, ...]:
        with torch.no_grad():
            wanted = function(*arguments)
        found = candidate(*arguments)
        errors.extend(relative_error(mine, true) for mine, true in zip(found, wanted, strict=True))
        return found

    return run


def _recording_file(method: Method, folder: Path, errors: list[float]) -> Any:
    """What a sampler takes for `engine`: the exported function, every call of it held against eager."""
    if not method.family:
        return _compared(
            lambda *given: (_generator()(*given),), generated_by(_file(generator(_generator()), folder)), errors
        )
    networks = _networks(method.family)
    guided = guided_by(_file(joint(networks, method.sampling, method.guidance), folder))
    make: Any = guided_posterior if method.sampling.solver == "ddpm" else guided_denoiser

    def engine(guidances: tuple[Guidance, ...]) -> Function:
        eager = make(networks.denoiser, guidances, method.sampling.clip_denoised)
        return _compared(eager, guided(guidances), errors)

    return engine


def _file(subject: Subject, folder: Path) -> onnx.OnnxEngine:
    path = folder / "function.onnx"
    onnx.save(convert(subject.function, dict(subject.example(2, seed=1)), subject.outputs, dynamic=True), path)
    return onnx.OnnxEngine(path)


def _share(drawn: Tensor, wanted: Tensor) -> float:
    return float((drawn.double() - wanted.double()).abs().max()) / 2


@cache
def _networks(family: str) -> Networks:
    """Score network, reference, classifier and discriminator with random weights, none of them trivially zero."""
    shape = {"img_resolution": 8, "img_channels": {"edm": 1, "adm": 3, "dit": 4}[family], "label_dim": _CLASSES}
    kinds: dict[str, dict[str, Any]] = {
        "edm": {
            "kind": "EDMPrecond", "model_type": "SongUNet", "model_channels": 16, "channel_mult": [1, 2],
            "num_blocks": 1, "attn_resolutions": [4],
        },
        "adm": {
            "kind": "DDPMPrecond", "model_type": "create_model", "num_channels": 32, "num_res_blocks": 1,
            "channel_mult": "1,2", "attention_resolutions": "4", "num_head_channels": 32, "use_scale_shift_norm": True,
            "resblock_updown": True,
        },
        "dit": {"kind": "DDPMPrecond", "model_type": "DiT", "hidden_size": 32, "depth": 2, "num_heads": 2},
    }  # fmt: skip
    trunk = {"image_size": 8, "in_channels": shape["img_channels"], "out_channels": _CLASSES, "channel_mult": [1, 2]}
    head = {"image_size": 4, "in_channels": 64, "out_channels": 1, "channel_mult": [1], "num_classes": _CLASSES}
    draws = torch.Generator().manual_seed(0)
    score, worse = (_filled(draws, **kinds[family], **shape) for _ in range(2))
    encoder = _filled(draws, **_ENCODER, **trunk, resblock_updown=True)
    discriminator = Discriminator(encoder, _filled(draws, **_ENCODER, **head)).eval()
    time = {"time": score.time} if family != "edm" else {}
    return Networks(score, discriminator, NoisyClassifier(encoder), worse, **time)


@cache
def _generator() -> Any:
    keywords = {"img_resolution": 8, "img_channels": 1, "label_dim": _CLASSES, "latent_dim": 8, "channels": (16, 8)}
    return _filled(torch.Generator().manual_seed(0), kind="Generator", **keywords)


def _filled(draws: torch.Generator, **keywords: Any) -> Any:
    return fill_(nets.build(**keywords), draws).eval().requires_grad_(False)


@click.command(help=__doc__)
@click.option("--method", "methods", multiple=True, type=click.Choice(list(METHODS)), help="Default: all.")
def main(methods: tuple[str, ...]) -> None:
    click.echo(
        "| method | runtime | error of a call | drift of the images | guidance moves them by |\n" + "|---" * 5 + "|"
    )
    for name in methods or METHODS:
        for row in rows(name):
            moved = f"{row.moved:.2g}" if METHODS[name].family else ""
            click.echo(f"| {row.method} | {row.runtime} | {row.error:.1e} | {row.drift:.1e} | {moved} |")


if __name__ == "__main__":
    main()
