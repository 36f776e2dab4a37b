"""What the guidances share that hold a network against itself, run differently in some of its layers.

Each is autoguidance by a copy of the score network that has the same weights: no second set is kept in memory.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

from dgfast.errors import UserError
from dgfast.guidance.declaration import Guidance
from dgfast.guidance.options import option
from dgfast.guidance.schedule import inside, reaches

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dgfast.guidance.compose import Denoiser

_MIDDLES = ("middle_block", "_in0")  # of ADM's U-Net; of EDM's and EDM2's


@dataclass(frozen=True, eq=False)
class Perturbed(Guidance):
    """D' = D + weight (D - D_per), D_per the same network with some layers changed.

    Attributes:
        reference: D_per.
        weight: 0 guides nothing; autoguidance's weight less 1.
        interval: (low, high], the noise levels sigma at which it acts, judged for each sample.
    """

    reference: Denoiser
    weight: float | Tensor
    interval: tuple[float, float]

    cost = "1 forward of the score net in the interval"
    evaluations, mixes_velocities = 1, True

    def active(self, sigma_low: float, sigma_high: float) -> bool:
        return bool(self.weight != 0) and reaches(self.interval, sigma_low, sigma_high)

    def correct(
        self, x: Tensor, sigma: Tensor, class_labels: Tensor | None, denoised: Tensor
    ) -> tuple[Tensor, Tensor, None]:
        worse = self.reference(x, sigma, class_labels).to(denoised.dtype)
        return denoised - worse, self.weight * inside(self.interval, sigma), None


def layers_option(of: str, default: str) -> str | None:
    """The option that names the layers, of a guidance that changes `of` them."""
    return option(
        None, f"Names of the {of}, joined by commas; default: {default}. An unknown one gets them listed.", "NAMES"
    )


def interval_option() -> tuple[float, float]:
    """The option of the noise levels at which a guidance acts."""
    return option((0.0, float("inf")), "Noise levels between which it acts.", "sigma,sigma")


def perturbed_copy(
    kind: type[Perturbed], denoiser: object, names: str | None, option: str, changes: Mapping[str, object]
) -> nn.Module:
    """The denoiser with some of its layers changed, which shares its weights.

    Args:
        names: of the layers, joined by commas; None: those in the network's middle, of numbered blocks three from
            7/24 of the depth on.
        option: what names them. changes: attribute and value, the first one that the network's layers have.

    Raises:
        UserError: no network of modules, or none of its layers has that name.
    """
    from torch import nn

    if not isinstance(denoiser, nn.Module):
        raise UserError(f"{kind.name} changes layers, and this score network, a {type(denoiser).__name__}, shows none")
    tensors = {id(tensor): tensor for tensor in chain(denoiser.parameters(), denoiser.buffers())}
    changed = copy.deepcopy(denoiser, tensors)  # which takes a tensor for its own copy
    for attribute in changes:
        layers = {
            name.removeprefix("model."): module
            for name, module in changed.named_modules()
            if getattr(module, attribute, None) is not None
        }
        if layers:
            break
    else:
        raise UserError(f"{kind.name} changes layers of a kind that this score network does not have")
    chosen = names.split(",") if names else _middle([*layers])
    unknown = next((name for name in chosen if name not in layers), None)
    if unknown is not None:
        raise UserError(f"{option} {unknown:.60}: such layers of this network are {', '.join(layers)}")
    for name in chosen:
        setattr(layers[name], attribute, changes[attribute])
    return changed


def _middle(names: list[str]) -> list[str]:
    middle = [name for name in names if any(part in name for part in _MIDDLES)]
    first = round(7 / 24 * len(names))
    return middle or names[first : first + 3]
