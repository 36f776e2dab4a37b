"""One forward an image: a generator in the place of a denoiser, a solver and its steps."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dgfast import bundle as bundles
from dgfast.devices import device_of, seconds_of
from dgfast.errors import UserError
from dgfast.graph import Function
from dgfast.guidance import OUTSIDE_WINDOW
from dgfast.networks import described, one_hot
from dgfast.plan import Step
from dgfast.pure_function import GeneratorNet, generator
from dgfast.randomness import MakeStreams, source
from dgfast.runtimes import Kept, RuntimeLike, chosen
from dgfast.sampler import OnStep


class OneStep:
    """Draws images from a one-step generator; it is called as a `Sampler` is.

    ```python
    sampler = dgfast.OneStep.load("mnist32")
    images = sampler(seeds=range(64))  # [64, 1, 32, 32], in [-1, 1]
    ```

    Attributes:
        steps: its one step, which no guidance takes part in.
        score_evaluations, score_backwards, guidance_gradients: 0 all; an image costs one forward of the generator.
    """

    score_evaluations = score_backwards = guidance_gradients = 0
    steps = (Step(0, t=1.0, t_next=0.0, sigma=1.0, gamma=0.0, boost_gamma=None, predictor=(), corrector=None),)

    def __init__(
        self,
        generator: GeneratorNet,
        device: torch.device | str | None = None,
        runtime: RuntimeLike = "eager",
        noise: str | MakeStreams = "cpu",
    ) -> None:
        """
        Args:
            device: where to draw; None: where the generator's weights are.
            runtime, noise: what executes the generator, and what the seeds stand for; see `Sampler`.

        Raises:
            UserError: no runtime or source of noise of that name.
        """
        self.generator = generator
        self.device = device_of(generator) if device is None else torch.device(device)
        self._runtime, self._streams = chosen(runtime), source(noise, generator.latent_dim)
        self._functions = Kept()

    @classmethod
    def load(
        cls,
        bundle: str | Path | bundles.Bundle = bundles.DEFAULT,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        runtime: RuntimeLike = "eager",
    ) -> "OneStep":
        """The generator of a bundle, as `networks.load` finds bundles.

        Raises:
            UserError: unknown or broken bundle, or one without a generator.
        """
        opened = bundle if isinstance(bundle, bundles.Bundle) else bundles.read(bundle)
        generator = opened.load("generator", device, dtype)
        return cls(generator, device, runtime)  # type: ignore[arg-type]  # a module types no attributes

    def __repr__(self) -> str:
        """Two lines: the generator, cost and device."""
        classes = f"{self.generator.label_dim} classes" if self.generator.label_dim else "unconditional"
        return (
            f"OneStep: {described(self.generator)}, {self.generator.latent_dim} latents, {classes}\n"
            f"  one forward an image; on {self.device}"
        )

    def __call__(
        self,
        seeds: Sequence[int],
        labels: Sequence[int] | Tensor | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Images of the seeds in one batch: float32 [N, C, R, R] in [-1, 1], on the sampler's device.

        Args:
            seeds: one a sample. Image k depends on seed k (and label k) alone.
            labels: class indices [N]; None takes those of `draw_labels` if the generator is conditional.
            on_step: called once, as `Sampler.integrate` calls it, with the images as both state and denoised images.

        Raises:
            UserError: no seeds, labels out of range or of another number, NaN in the images.
        """
        if not len(seeds):
            raise UserError("no seeds: give one an image")
        latents, drawn = self._draw(seeds)
        class_labels = self.class_labels(drawn if labels is None else labels, len(latents))
        images = self._function(latents, class_labels)(latents, class_labels)[0]
        if on_step is not None:
            changed = on_step(self.steps[0], images, images, images.new_full((len(images),), OUTSIDE_WINDOW))
            images = images if changed is None else changed
        if not bool(images.isfinite().all()):
            raise UserError("the generator's images are NaN or infinite; use --dtype float32, or train it anew")
        return images

    def draw_labels(self, seeds: Sequence[int]) -> Tensor | None:
        """The class indices [N] that the seeds themselves give; None without classes."""
        return self._draw(seeds)[1]

    def class_labels(self, labels: Sequence[int] | Tensor | None, count: int) -> Tensor | None:
        """One-hot rows [count, label_dim] of class indices; None for an unconditional generator.

        Raises:
            UserError: see `one_hot`.
        """
        return None if labels is None else one_hot(labels, self.generator.label_dim, count, self.device)

    def prepare(self, batch: int) -> None:
        """Build the function for batches of this size, so that drawing itself compiles none."""
        self([0] * batch)

    def forget(self) -> None:
        """As `Sampler.forget`."""
        self._functions.clear()

    def estimate(self, batch: int) -> float:
        """Seconds that a batch takes, timed once, warm."""
        return seconds_of(lambda: self([0] * batch), self.device)

    def _draw(self, seeds: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """Latents [N, latent_dim], and the class indices that come after them in the seeds' streams."""
        streams, classes = self._streams(seeds), self.generator.label_dim
        latents = streams.normal((self.generator.latent_dim,), torch.float32, self.device)
        return latents, streams.labels(classes) if classes else None

    def _function(self, latents: Tensor, class_labels: Tensor | None) -> Function:
        """(latents, class_labels) -> (images,), in this sampler's runtime, built once for each form of arguments."""
        example = latents, class_labels
        function = generator(self.generator)
        return self._functions(function.identity, example, lambda: self._runtime.whole(function, example))
