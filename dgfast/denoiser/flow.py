"""Flow matching: networks that predict where a path between noise and data leads (SiT, arXiv 2401.08740)."""

import torch
from torch import Tensor, nn

from dgfast.denoiser.preconditioner import Preconditioner, class_indices
from dgfast.flow import PATHS, Path

PREDICTIONS = ("velocity", "noise", "score")


class FlowPrecond(Preconditioner):
    """SiT's network as a denoiser, and its velocity itself.

    The raw network is called with states x(t) as they are, times t [B] in [0, 1] and class indices [B] or None. A
    network with a row for the unknown class says which in its attribute `null_class`.

    Args:
        path: "linear", "gvp" or "vp", see `dgfast.flow`. prediction: "velocity", "noise" or "score" of x(t).
        learn_sigma: the network has a second set of output channels, which says nothing.
        toward_noise: it counts time from data to noise, and its velocity leads there, as REPA's (arXiv 2410.06940).

    Raises:
        ValueError: unknown path or prediction.
    """

    def __init__(
        self, model: nn.Module, img_resolution: int, img_channels: int, label_dim: int,
        path: str = "linear", prediction: str = "velocity", learn_sigma: bool = True, toward_noise: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(model, img_resolution, img_channels, label_dim)
        for what, value, known in (("path", path, tuple(PATHS)), ("prediction", prediction, PREDICTIONS)):
            if value not in known:
                raise ValueError(f"{what} {value!r:.80} is not one of {', '.join(known)}")
        self.path_name, self.prediction, self.toward_noise = path, prediction, toward_noise
        self.null_class: int | None = getattr(model, "null_class", None)
        first, last = self.path.interval(prediction)
        self.sigma_min, self.sigma_max = self._level(last), self._level(first)

    @property
    def path(self) -> Path:
        return PATHS[self.path_name]

    def _level(self, t: float) -> float:
        return float(self.path.sigma(torch.tensor(t, dtype=torch.float64, device="cpu")))

    def labels(self, class_labels: Tensor | None, batch: int) -> Tensor | None:
        """Class indices [B] of one-hot rows [B, label_dim], see `class_indices`."""
        return class_indices(class_labels, batch, self.label_dim, self.null_class, next(self.raw.parameters()).device)

    def coefficients(self, sigma: Tensor) -> tuple[Tensor | float, Tensor, Tensor, Tensor]:
        path, t = self.path, self.path.sigma_inv(sigma)
        s = path.s(t)
        if self.prediction == "noise":
            return 1.0, -sigma, s, t
        if self.prediction == "score":
            return 1.0, sigma * path.spread(t), s, t
        one, none = torch.ones_like(t), torch.zeros_like(t)  # `clean` is linear in state and velocity
        return path.clean(s, none, t), path.clean(none, one, t), s, t

    def velocity(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """The velocity [B, C, H, W], float32, along the path.

        Args:
            x: states x(t) [B, C, H, W] of the path. sigma: their noise levels, relative to the image: [B] or a scalar;
                infinite at t = 0.
            class_labels: rows [B, label_dim]; a row of zeros, or None, is the unknown class.
        """
        path, t = self.path, self.path.sigma_inv(_of_samples(sigma, x))
        out = self._predicted(x, t, class_labels)
        if self.prediction == "velocity":
            return out
        noise = out if self.prediction == "noise" else -path.spread(t) * out
        return path.velocity_of_noise(x, noise, t).float()

    def as_velocity(self) -> "Velocity":
        """Its velocity, called as a denoiser is."""
        return Velocity(self)

    def forward(
        self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None, augment_labels: Tensor | None = None
    ) -> Tensor:
        c_skip, c_out, c_in, t = self.coefficients(_of_samples(sigma, x))
        return (c_skip * x + c_out * self._predicted(c_in * x, t, class_labels)).float()

    def _predicted(self, state: Tensor, t: Tensor, class_labels: Tensor | None) -> Tensor:
        """What the network says of states x(t), as if it counted time toward the data: float32."""
        time = (1 - t if self.toward_noise else t).flatten()
        out = self.raw(state.to(self.dtype), time, self.labels(class_labels, len(state)))
        out = out[:, : self.img_channels].float()
        return -out if self.toward_noise and self.prediction == "velocity" else out


def _of_samples(sigma: Tensor, x: Tensor) -> Tensor:
    return sigma.reshape(-1, 1, 1, 1).expand(len(x), 1, 1, 1)


class Velocity:
    """A flow network's velocity, where a guidance that mixes denoisers asks for denoised images.

    One is linear in the other, so they mix by the same weights. It is called with states x(t), see
    `FlowPrecond.velocity`; it has the attributes of `networks.ScoreNet`.
    """

    def __init__(self, net: FlowPrecond) -> None:
        self.net, self.null_class, self.label_dim = net, net.null_class, net.label_dim
        self.img_channels, self.img_resolution = net.img_channels, net.img_resolution
        self.sigma_min, self.sigma_max = net.sigma_min, net.sigma_max

    def __call__(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None, /) -> Tensor:
        return self.net.velocity(x, sigma, class_labels)

    def round_sigma(self, sigma: Tensor) -> Tensor:
        return sigma
