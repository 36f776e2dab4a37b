"""python -m benchmarks.studies.support: which guidance goes with which network in which runtime, tried one by one.

Small networks with random weights, one call of the guided denoiser with inputs that nothing was built for. A cell has
the largest error against eager, relative to the largest number of the same sample: compiled, in ONNX Runtime, and, with
--package, all that the row has at once in a package of machine code. A dash is a guidance that the network refuses.
"""

import sys
from collections.abc import Callable
from typing import Any

import click
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.parity import Judge
from benchmarks.workloads import fill_
from dgfast import GuidanceConfig, Networks, UserError, nets
from dgfast.graph.agreement import relative_error
from dgfast.guidance import Guidance, Mask, ObservationGuidance, guided_denoiser
from dgfast.guidance.adaptive_projected import AdaptiveProjectedGuidance
from dgfast.guidance.classifier import ClassifierGuidance
from dgfast.guidance.discriminator import DiscriminatorGuidance
from dgfast.guidance.perturbed_attention import PerturbedAttentionGuidance
from dgfast.guidance.rescale import Rescale
from dgfast.runtimes import RUNTIMES

_SHAPE: dict[str, Any] = {"img_resolution": 8, "img_channels": 2, "label_dim": 3}
_UNET: dict[str, Any] = {**_SHAPE, "channel_mult": [1, 1], "num_blocks": 1, "attn_resolutions": [4]}
_TRANSFORMER: dict[str, Any] = {**_SHAPE, "hidden_size": 32, "depth": 2, "num_heads": 2}
NETWORKS: dict[str, dict[str, Any]] = {
    "SongUNet": {"kind": "EDMPrecond", "model_type": "SongUNet", **_UNET, "model_channels": 16},
    "DhariwalUNet": {"kind": "EDMPrecond", "model_type": "DhariwalUNet", **_UNET, "model_channels": 64},
    "ADM's U-Net": {
        "kind": "DDPMPrecond", "model_type": "create_model", **_SHAPE, "num_channels": 32, "num_res_blocks": 1,
        "channel_mult": "1,1", "attention_resolutions": "4", "num_head_channels": 16, "use_scale_shift_norm": True,
    },
    "EDM2's U-Net": {"kind": "EDM2Precond", **_UNET, "model_channels": 16, "channels_per_head": 8},
    "DiT": {"kind": "DDPMPrecond", "model_type": "DiT", **_TRANSFORMER},
    "SiT": {"kind": "FlowPrecond", "model_type": "SiT", **_TRANSFORMER, "learn_sigma": False},
    "diffusers' UNet2D": {
        "kind": "DiffusersPrecond", "model_type": "UNet2DModel", **_SHAPE, "out_channels": 2,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "block_out_channels": [16, 16], "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 8,
    },
}  # fmt: skip
"""Kind and keywords for `nets.build`; beside them the smallest network of one's own, which has three lines."""
_OWN = "your own module"
COLUMNS = ("discriminator, classifier", "classifier-free, APG, rescaled", "perturbed attention", "by an observation")


class Own(nn.Module):
    """A denoiser with the attributes that `dgfast.networks.ScoreNet` names."""

    img_resolution, img_channels, label_dim, sigma_min, sigma_max = 8, 2, 3, 0.0, float("inf")

    def __init__(self) -> None:
        super().__init__()
        self.first, self.label = nn.Conv2d(2, 8, 3, padding=1), nn.Linear(3, 8)
        self.last = nn.Conv2d(8, 2, 3, padding=1)

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None) -> Tensor:
        labels = x.new_zeros(len(x), 3) if class_labels is None else class_labels
        scaled = (x / (1 + sigma.view(-1, 1, 1, 1) ** 2).sqrt()).float()
        image: Tensor = self.last(F.silu(self.first(scaled) + self.label(labels.float())[:, :, None, None]))
        return image + scaled

    def round_sigma(self, sigma: Tensor) -> Tensor:
        return sigma


@click.command(help=__doc__)
@click.option("--network", "names", multiple=True, type=click.Choice([*NETWORKS, _OWN]), help="Default: all.")
@click.option("--package", is_flag=True, help="Build a package of each network too: a minute of a core each.")
def main(names: tuple[str, ...], package: bool) -> None:
    columns = (*COLUMNS, "package") if package else COLUMNS
    click.echo(f"| network | {' | '.join(columns)} |\n|---|" + "---|" * len(columns))
    failed = False
    for name in names or (*NETWORKS, _OWN):
        cells, failure = _row(name, package)
        click.echo(f"| {name} | {' | '.join(cells)} |")
        failed |= failure
    sys.exit(failed)


def _row(name: str, package: bool) -> tuple[list[str], bool]:
    """The cells of one network, and whether any error is too large."""
    networks = _networks(name)
    cells, worst, together = list[str](), 0.0, list[Guidance]()
    for column in COLUMNS:
        try:
            guidances = _guidances(column, networks)
        except UserError:
            cells.append("-")
            continue
        together += guidances
        errors = [_error(networks.denoiser, guidances, RUNTIMES[runtime].build) for runtime in ("compiled", "onnx")]
        worst = max(worst, *errors)
        cells.append(", ".join(f"{error:.0e}" for error in errors))
    if package:
        error = _error(networks.denoiser, together, RUNTIMES["package"].build)
        worst = max(worst, error)
        cells.append(f"{error:.0e}")
    return cells, worst > 2e-5


def _networks(name: str) -> Networks:
    draws = torch.Generator().manual_seed(0)

    def frozen(net: nn.Module) -> Any:
        return fill_(net, draws).eval().requires_grad_(False)

    score = frozen(Own() if name == _OWN else nets.build(**NETWORKS[name]))
    time = {"time": score.time} if hasattr(score, "time") else {}
    return Networks(score, frozen(Judge(2)), frozen(Judge(2)), **time)


def _guidances(column: str, networks: Networks) -> list[Guidance]:
    """
    Raises:
        UserError: the network lacks what the guidance changes.
    """
    config = GuidanceConfig(
        dg_weight=1.0, classifier_scale=1.0, apg_scale=3.0, cfg_rescale=0.7, pag_scale=2.0, dg_window=(0.0, 1.0)
    )
    if column == COLUMNS[0]:
        return [kind.make(networks, config) for kind in (DiscriminatorGuidance, ClassifierGuidance)]
    if column == COLUMNS[1]:
        return [kind.make(networks, config) for kind in (AdaptiveProjectedGuidance, Rescale)]
    if column == COLUMNS[2]:
        return [PerturbedAttentionGuidance.make(networks, config)]
    where = (torch.arange(64).view(8, 8) % 3 > 0).double()
    known = torch.linspace(-1, 1, 128, dtype=torch.float64).view(2, 8, 8)
    return [ObservationGuidance(Mask(where), known, 0.1).fitted((2, 8, 8), torch.device("cpu"))]


def _error(denoiser: Any, guidances: list[Guidance], build: Callable[..., Any]) -> float:
    """
    Raises:
        RuntimeError: the guidance does nothing here, so that nothing would be proved.
    """
    function = guided_denoiser(denoiser, guidances)
    run, fresh = build(function, _inputs(0)), _inputs(1)
    with torch.no_grad():
        reference, plain = function(*fresh), denoiser(*fresh).double()
        results = run(*fresh)
    if relative_error(plain, reference[0]) < 1e-3:
        raise RuntimeError(f"{guidances} change nothing of a {type(denoiser).__name__}")
    return max(relative_error(mine, true) for mine, true in zip(results, reference, strict=True))


def _inputs(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sigma = torch.tensor([0.1, 1.0, 20.0], dtype=torch.float64).roll(seed)
    x = (0.5 + sigma.view(-1, 1, 1, 1) ** 2).sqrt() * torch.randn(3, 2, 8, 8, dtype=torch.float64, generator=generator)
    return x, sigma, F.one_hot((torch.arange(3) + seed) % 3, 3).float()


if __name__ == "__main__":
    main()
