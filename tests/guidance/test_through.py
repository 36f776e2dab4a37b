"""Guidance through the denoiser in every runtime: one graph, in which the network runs once, backward pass and all."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dgfast.denoiser import DDPMPrecond
from dgfast.graph.agreement import relative_error
from dgfast.graph.trace import trace
from dgfast.guidance import Guidance, LossGuidance, Mask, ObservationGuidance, guided_denoiser
from dgfast.runtimes.cpu import build as cpu
from dgfast.runtimes.onnx import build as onnx
from tests.support.guidance import column

SHAPE = {"img_resolution": 8, "img_channels": 2, "label_dim": 3}
SIZE = {"model_channels": 16, "channel_mult": [1, 1], "num_blocks": 1, "attn_resolutions": [4]}
FILTER = {"encoder_type": "skip", "decoder_type": "skip", "resample_filter": [1, 3, 3, 1]}
ADM = {
    "image_size": 8, "in_channels": 2, "model_channels": 32, "out_channels": 4, "num_res_blocks": 1,
    "attention_resolutions": [2], "channel_mult": [1, 1], "num_classes": 3, "num_heads": 2,
    "use_scale_shift_norm": True,
}  # fmt: skip
DIT = {"input_size": 8, "in_channels": 2, "hidden_size": 32, "depth": 1, "num_heads": 2, "num_classes": 3}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddpmpp": ("EDMPrecond", {"model_type": "SongUNet", **SHAPE, **SIZE}),
    "skip": ("EDMPrecond", {"model_type": "SongUNet", **SHAPE, **SIZE, **FILTER}),
    "dhariwal": ("EDMPrecond", {"model_type": "DhariwalUNet", **SHAPE, **SIZE}),
    "adm": ("UNetModel", ADM),
    "dit": ("DiT", DIT),
}
aten = torch.ops.aten


@pytest.fixture
def network(request: pytest.FixtureRequest, filled_net: Callable[..., Any]) -> Any:
    kind, keywords = KINDS[request.param]
    net = filled_net(kind, keywords, f"through/{request.param}/")
    return DDPMPrecond(net, 8, 2, 3).eval().requires_grad_(False) if kind in ("UNetModel", "DiT") else net


def inputs(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sigma = torch.tensor([0.1, 1.0, 20.0], dtype=torch.float64).roll(seed)
    x = (0.5 + column(sigma) ** 2).sqrt() * torch.randn(3, 2, 8, 8, dtype=torch.float64, generator=generator)
    return x, sigma, F.one_hot((torch.arange(3) + seed) % 3, 3).float()


def observed(**how: Any) -> ObservationGuidance:
    where = (torch.arange(64).view(8, 8) % 3 > 0).double()
    y = torch.linspace(-1, 1, 128, dtype=torch.float64).view(2, 8, 8)
    return ObservationGuidance(Mask(where), y, 0.1, **how).fitted((2, 8, 8), torch.device("cpu"))


def distance(x: Tensor, t: Tensor, x_0: Tensor) -> Tensor:
    return F.softplus(3 * x_0 - 1).mean((1, 2, 3))


GUIDANCES: dict[str, list[Guidance]] = {
    "sda": [observed()],
    "mmps": [observed(method="mmps", iterations=2)],
    "losses": [LossGuidance(distance, 2.0), LossGuidance(distance, 0.1, normalize="rms")],
    "others": [replace(observed(method="tmpd"), std=3.0), observed(method="pigdm"), observed(method="dps")],
    "without": [observed(through_network=False), LossGuidance(distance, 2.0, through_network=False)],
}
BACKWARDS = {"sda": 1, "mmps": 2, "losses": 2, "others": 4, "without": 0}


class Small(nn.Module):
    """A network of two layers, for what is the guidances' own."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        first, last = torch.randn(8, 2, 3, 3, generator=generator), torch.randn(2, 8, 3, 3, generator=generator)
        self.first, self.last = (nn.Parameter(w / 6, requires_grad=False) for w in (first, last))

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None) -> Tensor:
        scaled = x.float() / (1 + column(sigma).float())
        return F.conv2d(F.silu(F.conv2d(scaled, self.first, padding=1)), self.last, padding=1) + scaled


def compared(network: Any, guidances: list[Guidance], build: Any) -> None:
    function = guided_denoiser(network, guidances)
    run, fresh = build(function, inputs(0)), inputs(1)
    with torch.no_grad():
        wanted, plain = function(*fresh)[0], network(*fresh)
        found = run(*fresh)[0]
    assert relative_error(found, wanted) < 2e-5
    assert relative_error(plain.double(), wanted) > 1e-3


@pytest.mark.parametrize("network", [kind for kind in KINDS if kind != "ddpmpp"], indirect=True)
def test_through_the_denoiser_of_every_kind_onnx_runtime_agrees_with_eager(network: Any) -> None:
    compared(network, GUIDANCES["sda"], onnx.build)


@pytest.mark.parametrize("network", ["ddpmpp"], indirect=True)
def test_through_the_denoiser_of_a_unet_compiled_agrees_with_eager(network: Any) -> None:
    compared(network, GUIDANCES["sda"], cpu.build)


@pytest.mark.parametrize("build", [onnx.build, cpu.build], ids=["onnx", "compiled"])
@pytest.mark.parametrize("name", GUIDANCES)
def test_through_the_denoiser_by_every_method_agrees_with_eager(name: str, build: Any) -> None:
    compared(Small(), GUIDANCES[name], build)


@pytest.mark.parametrize("name", GUIDANCES)
def test_through_the_denoiser_the_network_runs_once_whatever_guides(name: str) -> None:
    guidances = GUIDANCES[name]
    targets = [node.target for node in trace(guided_denoiser(Small(), guidances), inputs(0)).graph.nodes]
    backwards = sum(guidance.backwards for guidance in guidances)
    assert backwards == BACKWARDS[name]
    assert targets.count(aten.convolution.default) == 2
    assert targets.count(aten.convolution_backward.default) == 2 * backwards
