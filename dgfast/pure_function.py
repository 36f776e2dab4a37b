"""Pure functions of tensors as values: what runtimes execute, files hold and benchmarks time.

`job.Job` makes those of a sampler. That of a one-step generator needs no job and is made here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from dgfast.graph import Function
from dgfast.guidance import Guidance


@dataclass(frozen=True)
class PureFunction:
    """A pure function of tensors, and what it depends on.

    Attributes:
        name: "denoiser", "posterior", "velocity", "step" or "generator".
        inputs, outputs: names of its arguments and results, in their order. An argument "class_labels" may be None.
        guidances: those inside of it. weights, images: of them, those that are inputs, and the job's own values for
            them; the others are constants.
    """

    name: str
    function: Function
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    guidances: tuple[Guidance, ...] = ()
    weights: Mapping[str, float] = field(default_factory=dict)
    images: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def identity(self) -> tuple[object, ...]:
        """Two functions of one job that have it in common are the same."""
        return self.name, self.inputs, self.outputs, self.guidances

    def __call__(self, *arguments: Tensor | None) -> tuple[Tensor, ...]:
        return self.function(*arguments)

    def without_labels(self) -> "PureFunction":
        """The same function for no class at all, without that input."""
        at = self.inputs.index("class_labels")

        def function(*arguments: Tensor | None) -> tuple[Tensor, ...]:
            return self.function(*arguments[:at], None, *arguments[at:])

        return replace(self, function=function, inputs=(*self.inputs[:at], *self.inputs[at + 1 :]))


class GeneratorNet(Protocol):
    """What is asked of a generator; `dgfast.nets.generator.Generator` provides it.

    Called with latents [B, latent_dim] and class_labels [B, label_dim] or None, it returns images [B, C, R, R].

    Attributes:
        latent_dim: width of its latents. label_dim: number of its classes, 0 if unconditional.
    """

    latent_dim: int
    label_dim: int

    def __call__(self, latents: Tensor, class_labels: Tensor | None, /) -> Tensor: ...


def generator(net: GeneratorNet) -> PureFunction:
    """The one function of a one-step job, (latents, class_labels) -> images."""
    return PureFunction("generator", partial(_generated, net), ("latents", "class_labels"), ("images",))


@torch.no_grad()
def _generated(net: GeneratorNet, latents: Tensor, class_labels: Tensor | None) -> tuple[Tensor, ...]:
    return (net(latents, class_labels),)
