"""Functions to export, and what an exported file is tried with: calls it has not seen, and a whole run."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from dgfast.export.parity import Case, Row, Runs, Tensors, ValueMismatchError
from dgfast.flow import Path
from dgfast.graph.agreement import least_sizes
from dgfast.guidance.declaration import off_values
from dgfast.noise_levels import posterior_log_variances
from dgfast.solvers import LAST, ancestral_step, ddim_step

Forms = dict[str, tuple[tuple[int | str, ...], torch.dtype]]
Function = Callable[..., tuple[Tensor, ...]]
_DOUBLE = ("x", "sigma", "sigma_next", "noise", "log_least", "log_most", *LAST)
_LEVELS = 80.0, 0.5, 5.0, 0.01, 0.1, 160.0, 1.0, 20.0, 0.002, 2.0  # the window is 0.0447 to 152 by default
_MOST_STEPS = 40
_LEAST_OF_EVEN_STEPS = 0.004  # of 250 in a path's time; a shorter one is lost in a float32 of t


class Subject(Protocol):
    """One function to export.

    Attributes:
        what: its name; function: of the tensors `inputs` names, in that order; outputs: names of its results.
        weights: the guidance weights among its inputs, and the values that the export was asked for.
    """

    @property
    def what(self) -> str: ...

    @property
    def function(self) -> Function: ...

    @property
    def inputs(self) -> tuple[str, ...]: ...

    @property
    def outputs(self) -> tuple[str, ...]: ...

    @property
    def weights(self) -> Mapping[str, float]: ...

    def __call__(self, inputs: Tensors) -> dict[str, Tensor]:
        """The eager reference."""
        ...

    def varied(self) -> tuple[str, ...]:
        """The inputs that have one entry a sample."""
        ...

    def forms(self, batch: int | None) -> Forms:
        """Sizes of inputs and outputs, "batch" where that is open, and their types."""
        ...

    def dtypes(self) -> dict[str, torch.dtype]:
        """Types of the outputs."""
        ...

    def example(self, batch: int, seed: int) -> Tensors:
        """Some inputs."""
        ...

    def cases(self, batch: int) -> list[Case]:
        """Inputs of every kind that the function may meet."""
        ...

    def whole_run(
        self, reference: Runs, candidate: Runs, batch: int, tolerance: float, share: float = 1.0
    ) -> list[Row]:
        """Images drawn by both, where more than one call makes them: the largest difference in the pixel range of 2.

        Args:
            share: of the images, those that differ least, among which the largest is.
        """
        ...


class _OfSamples(ABC):
    """What functions of samples in single precision have in common."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: dict[str, float]

    @abstractmethod
    def sizes(self) -> dict[str, tuple[int, ...]]:
        """The shape of one sample of every tensor that has one a sample."""

    def varied(self) -> tuple[str, ...]:
        return tuple(name for name in self.inputs if name not in self.weights)

    def forms(self, batch: int | None) -> Forms:
        size, sizes = batch or "batch", self.sizes()
        shapes = {n: (size, *sizes[n]) if n in sizes else (1,) for n in (*self.inputs, *self.outputs)}
        return {name: (shape, torch.float32) for name, shape in shapes.items()}

    def dtypes(self) -> dict[str, torch.dtype]:
        return dict.fromkeys(self.outputs, torch.float32)


@dataclass(frozen=True)
class Joint(_OfSamples):
    """A guided denoiser, its posterior, or a whole step; see `Subject`.

    Attributes:
        sigmas: the plan's noise levels, 0 last. image: shape of one. label_dim: number of classes, 0 for none.
        predicts_noise: the network does, see `agreement.least_sizes`.
        path: of flow matching, of which x are states; None: they are clean images with noise.
        conditions: the denoiser's extra inputs, by name: one sample's shape.
        images: what the guidances know of images [1 or B, C, H, W], which are inputs too.
    """

    what: str
    function: Function
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: dict[str, float]
    sigmas: tuple[float, ...]
    image: tuple[int, int, int]
    label_dim: int
    predicts_noise: bool = False
    path: Path | None = None
    conditions: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    images: Mapping[str, Tensor] = field(default_factory=dict)

    def __call__(self, inputs: Tensors) -> dict[str, Tensor]:
        """The eager reference: state and noise levels in double precision, as a sampler has them."""
        arguments = [inputs[n].double() if n in _DOUBLE else inputs[n] for n in self.inputs]
        return _run(self.function, arguments, self.outputs)

    def sizes(self) -> dict[str, tuple[int, ...]]:
        names = "x", "x_next", "noise", "denoised_last", "denoised", "shift", "variance", "velocity", *self.images
        images = dict.fromkeys(names, self.image)
        numbers = dict.fromkeys(("sigma", "sigma_next", "sigma_last", "log_least", "log_most", "log_ratio"), ())
        return {**images, **numbers, **self.conditions, "class_labels": (self.label_dim,)}

    def case(self, name: str, levels: Sequence[float], seed: int, weights: Mapping[str, float] | None = None) -> Case:
        """Noise of those levels, one a sample, with classes, under the export's own weights or others."""
        generator = torch.Generator().manual_seed(seed)
        count, sigma = len(levels), torch.tensor(levels)
        clean = 0.5 * torch.randn(count, *self.image, generator=generator)
        x = self._noisy(clean, sigma.view(-1, 1, 1, 1), torch.randn(clean.shape, generator=generator))
        classes = torch.randint(max(self.label_dim, 1), (count,), generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        values = {"x": x, "sigma": sigma, "sigma_next": 0.8 * sigma, "sigma_last": 1.25 * sigma}
        values |= {"noise": noise, "denoised_last": clean + 0.1 * noise}
        values["log_least"], values["log_most"] = (s * sigma**2 / (1 + sigma**2) for s in (0.2, 0.4))
        values |= {key: values[key].log() for key in ("log_least", "log_most")}
        values["class_labels"] = F.one_hot(classes, max(self.label_dim, 1)).float()
        values |= {key: torch.randn(count, *shape, generator=generator) for key, shape in self.conditions.items()}
        values |= {key: torch.tensor([value]) for key, value in (self.weights | dict(weights or {})).items()}
        values |= {key: image[:1].expand(count, *self.image).contiguous() for key, image in self.images.items()}
        return Case(name, {key: values[key] for key in self.inputs}, least_sizes(self.predicts_noise, values))

    def _noisy(self, clean: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
        if self.path is None:
            return clean + sigma * noise
        t = self.path.sigma_inv(sigma)
        return self.path.s(t) * clean + self.path.spread(t) * noise

    def example(self, batch: int, seed: int) -> Tensors:
        return self.case("", [1.5] * batch, seed).inputs

    def last(self, case: Case) -> Case:
        """The same case as the last step, which goes to sigma 0."""
        to_zero = {**case.inputs, "sigma_next": torch.zeros_like(case.inputs["sigma"])}
        return replace(case, name=f"{case.name}, last step", inputs=to_zero)

    def amplified(self, name: str, levels: Sequence[float], seed: int) -> Case:
        """A case whose weights make the guidance as large as the image, so that an error in it cannot hide.

        As large in the sample where it is largest: errors are a share of each sample's own image.
        """
        zero = off_values()

        def raised(factor: float) -> Case:
            weights = {k: zero[k] + factor * (w - zero[k]) for k, w in self.weights.items() if k != "dg_boost"}
            return self.case(name, levels, seed, weights)

        plain = self(self.case(name, levels, seed, {key: zero[key] for key in self.weights}).inputs)[self.outputs[0]]

        def share(case: Case) -> float:
            added = (self(case.inputs)[self.outputs[0]] - plain).abs().flatten(1).amax(1)
            return float((added / plain.abs().flatten(1).amax(1).clamp(min=1e-12)).max())

        usual = share(raised(1.0))
        factor = min(1 / usual, 1e6) if usual else 1.0
        return raised(factor / max(share(raised(factor)), 1.0))  # not every correction is proportional to its weight

    def cases(self, batch: int) -> list[Case]:
        """Noise levels inside and outside of the window; the guidance as it is and amplified."""
        least = _LEAST_OF_EVEN_STEPS if self.path and self.what == "step" else 0.0
        levels = [s for s in _LEVELS if least <= s <= max(*self.sigmas, 160.0)]
        cases = []
        for i, start in enumerate(range(0, len(levels), max(batch, 2))):
            chosen = [levels[(start + k) % len(levels)] for k in range(batch)]
            name = f"batch {batch}, sigma {', '.join(f'{s:g}' for s in chosen[:5])}{', ...' if batch > 5 else ''}"
            cases.append(self.case(name, chosen, seed=100 + i))
            if self.weights:
                cases.append(self.amplified(f"{name}, amplified", chosen, seed=200 + i))
            if self.what == "step" and i == 0:
                cases.append(self.last(cases[0]))
        return cases

    def whole_run(
        self, reference: Runs, candidate: Runs, batch: int, tolerance: float, share: float = 1.0
    ) -> list[Row]:
        """The plan with its own steps, or with Euler's or ancestral ones; of a long plan every so many-th level."""
        steps = len(self.sigmas) - 1
        kept = [*self.sigmas[: -1 : -(-steps // _MOST_STEPS)], 0.0]
        expected, drawn = (self._draw(runs, batch, kept).double() for runs in (reference, candidate))
        drifts = (drawn - expected).abs().flatten(1).amax(1) / 2
        error = float(drifts.quantile(share))
        error = error if error == error else float("inf")
        count = f"all {steps}" if len(kept) == steps + 1 else f"{len(kept) - 1} of {steps}"
        problem = "" if error <= tolerance else ValueMismatchError.__name__
        case = f"{count} steps, share of the pixel range{f', {share:.0%} of the images' if share < 1 else ''}"
        return [Row(case, "x", error, tolerance, problem, f"drifts by {error:.1e} of the pixel range")]

    def _draw(self, runs: Runs, batch: int, sigmas: Sequence[float]) -> Tensor:
        start = self.case("", [sigmas[0]] * batch, seed=7)
        inputs, x, generator = dict(start.inputs), start.inputs["x"], torch.Generator().manual_seed(8)
        bounds = posterior_log_variances(torch.tensor(sigmas[:-1])).tolist()
        last = {"denoised_last": torch.zeros_like(x), "sigma_last": torch.full((batch,), torch.inf)}
        for sigma, sigma_next, (least, most) in zip(sigmas[:-1], sigmas[1:], bounds, strict=True):
            numbers = {"sigma": sigma, "sigma_next": sigma_next, "log_least": least, "log_most": most}
            noise = torch.randn(x.shape, generator=generator)
            values = {key: torch.full((batch,), value) for key, value in numbers.items()} | {"x": x, "noise": noise}
            results = runs(inputs | {key: value for key, value in (values | last).items() if key in inputs})
            t, t_next = (torch.full((batch, 1, 1, 1), level) for level in (sigma, sigma_next))
            if self.what == "step":
                x = results["x_next"]
                last = {"denoised_last": results.get("denoised", x), "sigma_last": values["sigma"]}
            elif self.what == "denoiser":
                x = ddim_step(x, results["denoised"], t, t_next, None, 0.0)
            elif self.path is not None:
                x = x + (self.path.sigma_inv(t_next) - self.path.sigma_inv(t)) * results["velocity"]
            else:
                x = ancestral_step(x, results["denoised"], results["shift"], results["variance"], t, t_next, noise)
        return x


@dataclass(frozen=True)
class GeneratorSubject(_OfSamples):
    """A one-step generator; see `Subject`.

    Attributes:
        latent_dim, label_dim: sizes of its inputs. image: shape of one.
    """

    function: Function
    inputs: tuple[str, ...]
    latent_dim: int
    label_dim: int
    image: tuple[int, ...]
    what: str = "generator"
    outputs: tuple[str, ...] = ("images",)
    weights: dict[str, float] = field(default_factory=dict)

    def __call__(self, inputs: Tensors) -> dict[str, Tensor]:
        return _run(self.function, [inputs[n] for n in self.inputs], self.outputs)

    def sizes(self) -> dict[str, tuple[int, ...]]:
        return {"latents": (self.latent_dim,), "class_labels": (self.label_dim,), "images": self.image}

    def example(self, batch: int, seed: int) -> Tensors:
        generator = torch.Generator().manual_seed(seed)
        classes = torch.randint(max(self.label_dim, 1), (batch,), generator=generator)
        labels = F.one_hot(classes, max(self.label_dim, 1)).float()
        values = {"latents": torch.randn(batch, self.latent_dim, generator=generator), "class_labels": labels}
        return {name: values[name] for name in self.inputs}

    def cases(self, batch: int) -> list[Case]:
        """Latents as they are drawn, and far from any that is; with classes, none too."""
        latents = self.example(batch, seed=100)
        cases = [Case(f"batch {batch}", latents)]
        cases.append(Case(f"batch {batch}, 4 x the latents", {**latents, "latents": 4 * latents["latents"]}))
        if self.label_dim:
            none = torch.zeros_like(latents["class_labels"])
            cases.append(Case(f"batch {batch}, no class", {**latents, "class_labels": none}))
        return cases

    def whole_run(
        self, reference: Runs, candidate: Runs, batch: int, tolerance: float, share: float = 1.0
    ) -> list[Row]:
        return []


def _run(function: Function, arguments: Sequence[Any], outputs: Sequence[str]) -> dict[str, Tensor]:
    with torch.no_grad():
        results = function(*arguments)
    return {name: value.float() for name, value in zip(outputs, results, strict=True)}
