"""What is measured, in one place: networks, grid, guidance and batch sizes of every workload.

Speed does not depend on what the weights have learned, so the full-size networks get random ones, drawn anew from a
fixed seed. Layers that are zero before training are filled too: nothing may be trivially zero, neither the images nor
the guidance's gradient.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

import dgfast
from dgfast import GuidanceConfig, Networks, SamplingConfig, bundle, nets
from dgfast.denoiser import DDPMPrecond
from dgfast.nets.adm_unet import PUBLISHED
from dgfast.nets.discriminator import Discriminator, NoisyClassifier
from dgfast.nets.dit import PRESETS
from dgfast.presets import CHANNELS, SAMPLING
from dgfast.vp import TIME_SCHEDULES
from dgfast.weights import placed

_SEED = 0
_GPU_BATCHES = (512, 1, 64)  # throughput, latency, and what lies between: in the order of interest


@dataclass(frozen=True)
class Workload:
    """A model to sample from, and how it is sampled.

    Attributes:
        load: (device, dtype) -> its networks, frozen, in eval mode and channels-last, as `dgfast.load` gives them.
        batches: (group of benchmarks, type of device) -> batch sizes; a group that is left out is not run.
    """

    load: Callable[[torch.device, torch.dtype], Networks]
    sampling: SamplingConfig
    guidance: GuidanceConfig
    batches: Mapping[tuple[str, str], tuple[int, ...]]


@dataclass(frozen=True)
class RandomNetworks:
    """Networks of published shape with random weights.

    Attributes:
        score, trunk, head: kind and keywords for `nets.build`; the head reads the trunk's features.
        time_schedule: the time that trunk and head read; beside a score network of discrete time, they read its own.
    """

    score: dict[str, Any]
    trunk: dict[str, Any]
    head: dict[str, Any]
    time_schedule: str = "linear"

    def load(self, device: torch.device, dtype: torch.dtype) -> Networks:
        """The same weights at every call, rounded to `dtype`."""
        generator = torch.Generator().manual_seed(_SEED)
        score = fill_(nets.build(**self.score), generator)
        trunk = fill_(nets.build(**self.trunk), generator)
        head = fill_(nets.build(**self.head, in_channels=trunk.feature_channels), generator)
        score, trunk, head = (placed(net, device, dtype) for net in (score, trunk, head))
        time = score.time if isinstance(score, DDPMPrecond) else TIME_SCHEDULES[self.time_schedule]
        return Networks(score, Discriminator(trunk, head).eval(), NoisyClassifier(trunk).eval(), time=time)


@dataclass(frozen=True)
class RandomPair:
    """A score network of published shape and a worse one that guides it, with random weights.

    Attributes:
        score, reference: kind and keywords for `nets.build`.
    """

    score: dict[str, Any]
    reference: dict[str, Any]

    def load(self, device: torch.device, dtype: torch.dtype) -> Networks:
        """The same weights at every call, rounded to `dtype`."""
        generator = torch.Generator().manual_seed(_SEED)
        nets_ = (fill_(nets.build(**keywords), generator) for keywords in (self.score, self.reference))
        score, reference = (placed(net, device, dtype) for net in nets_)
        return Networks(score, reference=reference)


def fill_(net: nn.Module, generator: torch.Generator) -> Any:
    """Draw every weight anew so that activations, logits and gradients are of order one; returns `net`."""
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.normal_(generator=generator)
            if name.endswith("_gain"):  # EDM2's, which are near 1 after training
                parameter.mul_(0.1).add_(1)
            elif not name.endswith("weight"):
                parameter.mul_(0.1)
            elif parameter.dim() == 1:
                parameter.mul_(0.1).add_(1)
            else:
                gain = 4 if name.endswith("c_proj.weight") else 1  # the discriminator's last layer: its logit
                parameter.mul_(gain / math.sqrt(parameter[0].numel()))
        for name, buffer in net.named_buffers():
            if name.endswith(("fourier.freqs", "fourier.phases")):  # drawn once, like weights
                buffer.normal_(generator=generator).mul_(2 * math.pi)
    return net


def flops(function: Callable[..., object], *arguments: Tensor | None) -> int:
    """Operations of one call in its matrix products and convolutions, input gradients included, by counting."""
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = _NoModules()
    # The counter does not know every fused attention kernel; written out as matrix products, it knows all.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        function(*arguments)
    return counter.get_total_flops()


class _NoModules(ModuleTracker):
    """Counts nothing by module: the hooks for that fail inside `torch.autograd.grad`."""

    def __enter__(self) -> "_NoModules":
        return self

    def __exit__(self, *exception: object) -> None:
        return None


def _classifier(image_size: int, depth: int, **keywords: Any) -> dict[str, Any]:
    """An ADM encoder with the options that DG gives to both its trunk and its head (arXiv 2211.17091)."""
    return {
        "kind": "create_classifier", "image_size": image_size, "classifier_use_fp16": False, "classifier_width": 128,
        "classifier_depth": depth, "classifier_attention_resolutions": "32,16,8",
        "classifier_use_scale_shift_norm": True, "classifier_resblock_updown": True, "classifier_pool": "attention",
        **keywords,
    }  # fmt: skip


def _ddpmpp(resolution: int, channel_mult: list[int]) -> dict[str, Any]:
    """EDM's unconditional DDPM++ (arXiv 2206.00364, table 7)."""
    return {
        "kind": "EDMPrecond", "model_type": "SongUNet", "img_resolution": resolution, "img_channels": 3,
        "augment_dim": 9, "model_channels": 128, "channel_mult": channel_mult, "num_blocks": 4,
        "attn_resolutions": [16],
    }  # fmt: skip


def _mnist32() -> Workload:
    shipped = bundle.read("mnist32")
    batches = {(group, "cpu"): (64,) for group in ("guided-step", "sampler")}
    return Workload(
        load=lambda device, dtype: dgfast.load(shipped, device, dtype, shipped.guidance),
        sampling=shipped.sampling,
        guidance=shipped.guidance,
        batches=batches | {(group, "cuda"): _GPU_BATCHES for group, _ in batches},
    )


def _edm_cifar10() -> Workload:
    networks = RandomNetworks(
        score=_ddpmpp(32, [2, 2, 2]), trunk=_classifier(32, 4), head=_classifier(8, 2, out_channels=1)
    )
    return Workload(
        load=networks.load,
        sampling=SamplingConfig(),
        guidance=GuidanceConfig(dg_weight=2.0),  # DG's for unconditional CIFAR-10
        batches={
            ("guided-step", "cpu"): (2,),
            ("guided-step", "cuda"): _GPU_BATCHES,
            ("sampler", "cuda"): _GPU_BATCHES,
        },
    )


def _edm_ffhq64() -> Workload:
    networks = RandomNetworks(
        score=_ddpmpp(64, [1, 2, 2, 2]),
        trunk=_classifier(64, 4),
        head=_classifier(8, 2, out_channels=1),
        time_schedule="cosine",  # what ADM's 64 x 64 classifier was trained on
    )
    return Workload(
        load=networks.load,
        sampling=SamplingConfig(num_steps=40),  # EDM's for FFHQ
        guidance=GuidanceConfig(dg_weight=1.0),
        batches={("guided-step", "cpu"): (1,), ("guided-step", "cuda"): _GPU_BATCHES},
    )


def _adm_64() -> Workload:
    networks = RandomNetworks(
        score={
            "kind": "DDPMPrecond", "model_type": "create_model", "img_resolution": 64, "img_channels": 3,
            "label_dim": 1000, "noise_schedule": "cosine", **PUBLISHED["adm-64"],
        },
        trunk=_classifier(64, 4),
        head=_classifier(8, 2, out_channels=1, condition=True),
    )  # fmt: skip
    return Workload(
        load=networks.load,
        sampling=SamplingConfig(solver="ddpm", respacing="250", clip_denoised=True),
        guidance=GuidanceConfig(dg_weight=1.0, classifier_scale=1.0),  # ADM-G++; its weights by time are not published
        batches={("guided-step", "cpu"): (1,), ("guided-step", "cuda"): _GPU_BATCHES},
    )


def _dit(preset: str, devices: tuple[str, ...]) -> Workload:
    networks = RandomNetworks(
        score={
            "kind": "DDPMPrecond", "model_type": "DiT", "img_resolution": 32, "img_channels": 4, "label_dim": 1000,
            **PRESETS[preset],
        },
        trunk=_classifier(32, 2, in_channels=4),
        head=_classifier(8, 2, out_channels=1, condition=True),
    )  # fmt: skip
    batches = {("guided-step", "cpu"): (1,), ("guided-step", "cuda"): _GPU_BATCHES}
    return Workload(
        load=networks.load,
        sampling=SamplingConfig(solver="ddpm", respacing="250"),
        guidance=GuidanceConfig(  # DiT-G++'s: two scales that change at timestep 200, discriminator above 100
            dg_weight=1.0, dg_window=(0.1011, 2.0), cfg_scale=1.25, cfg_scale_low=3.0, cfg_branch=0.7257
        ),
        batches={(group, device): sizes for (group, device), sizes in batches.items() if device in devices},
    )


def _edm2(channels: int, worse: int, **keywords: Any) -> Workload:
    """EDM2's network of pixels, guided by one of fewer channels; keywords go to both."""
    common = {"kind": "EDM2Precond", "img_resolution": 64, "img_channels": 3, "label_dim": 1000} | keywords
    networks = RandomPair(common | {"model_channels": channels}, common | {"model_channels": worse})
    return Workload(
        load=networks.load,
        sampling=SamplingConfig(**SAMPLING),
        guidance=GuidanceConfig(autoguidance=1.7),  # the preset edm2-img64-s-autog-fid
        batches={("guided-step", "cpu"): (1,), ("guided-step", "cuda"): _GPU_BATCHES},
    )


def _tiny() -> Workload:
    encoder = {
        "kind": "EncoderUNetModel", "image_size": 8, "model_channels": 32, "num_res_blocks": 1, "channel_mult": [1],
        "attention_resolutions": [], "num_head_channels": 32,
    }  # fmt: skip
    networks = RandomNetworks(
        score={
            "kind": "EDMPrecond", "model_type": "SongUNet", "img_resolution": 8, "img_channels": 1,
            "model_channels": 16, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": [],
        },
        trunk=encoder | {"in_channels": 1, "out_channels": 10},
        head=encoder | {"out_channels": 1, "pool": "attention"},
    )  # fmt: skip
    groups = ("guided-step", "sampler")
    return Workload(
        load=networks.load,
        sampling=SamplingConfig(num_steps=4),
        guidance=GuidanceConfig(dg_weight=1.0),
        batches={(group, device): (2,) for group in groups for device in ("cpu", "cuda")},
    )


WORKLOADS: dict[str, Callable[[], Workload]] = {
    "mnist32": _mnist32,
    "edm-cifar10": _edm_cifar10,
    "edm-ffhq64": _edm_ffhq64,
    "adm-64": _adm_64,
    "dit-s2": partial(_dit, "DiT-S/2", ("cpu", "cuda")),
    "dit-xl2": partial(_dit, "DiT-XL/2", ("cuda",)),
    "edm2-img64-s": partial(_edm2, CHANNELS["s"], CHANNELS["xs"]),
    "tiny": _tiny,
    "edm2-tiny": partial(
        _edm2, 16, 16, img_resolution=8, label_dim=3, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4],
        channels_per_head=8,
    ),
}  # fmt: skip
STAND_INS = ("tiny", "edm2-tiny")
"""Workloads that try the benchmarks themselves and say nothing about speed; run only if asked for."""

LONG_ON_A_CPU = ("adm-64", "dit-s2", "edm2-img64-s")
"""Workloads that run there only if asked for: all together would take more than ten minutes."""
