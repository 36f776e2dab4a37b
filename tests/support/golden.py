"""A file of the golden folder: its inputs, its networks, and how one of its outputs is judged."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dgfast.guidance import OUTSIDE_WINDOW
from dgfast.nets.discriminator import Discriminator

# Tolerances of the folder's README: times the standard deviation of the reference, of each call or step on its own.
NET_TOL, UNCONDITIONAL_GRADIENT_TOL, SAMPLER_TOL, VE_SCHEDULE_TOL = 2e-4, 4e-4, 5e-4, 1e-2
DIT_SAMPLER_TOL = 2e-3
SIGMA_TOL = 1e-6  # noise levels are a formula, not a network; judged relative to each of them, small ones too
TABLE_TOL = 1e-3  # iDDPM's are a table that the official code sums in float32; neighbours lie 3e-3 apart and more
NO_LABEL_SIGMA = 0.5  # at which the pickle's network was called without labels; the file does not say, its values do
NO_LABEL_CALL = 2  # which of the calls EDM2's networks repeated without labels
ADM_FRACTION = 0.25  # added to the first timesteps where ADM's network was called with fractions; ditto
INPUTS_AMONG_OUTPUTS = {"t_vec", "grid_sigma", "grid_t"}  # some files list them there

NetFactory = Callable[..., nn.Module]


def correction_of(guidance: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
    """What the guidance adds to the denoised images, and its log-ratio."""
    direction, gate, log_ratio = guidance.correct(*arguments)
    return gate.view(-1, 1, 1, 1) * direction, log_ratio


class Golden:
    """One file, and a record of which of its outputs were judged and how."""

    def __init__(self, path: Path, filled_net: NetFactory) -> None:
        with np.load(path) as stored:
            self.arrays = {key: stored[key] for key in stored.files}
        self.path, self.filled_net = path, filled_net
        self.meta: dict[str, Any] = json.loads(str(self.arrays.pop("meta")))
        self.judged: set[str] = set()
        self.failures: list[str] = []
        self.ratio = self.relative = 0.0

    def tensor(self, key: str) -> Tensor:
        """An input."""
        self.judged |= {key} & INPUTS_AMONG_OUTPUTS
        return torch.from_numpy(self.arrays[key])

    def labels(self) -> Tensor | None:
        return self.tensor("class_labels") if "class_labels" in self.arrays else None

    def net(self, kind: str, config: str, prefix: str, state_dict: str | None = None) -> Any:
        """The network of those entries of `meta`, of the class that its kind names; its state dict is compared too."""
        net = self.filled_net(kind, self.meta[config], self.meta[prefix])
        if state_dict is not None:
            self.compare_names(net, self.meta[state_dict], state_dict)
        return net

    def compare_names(self, net: nn.Module, official: dict[str, list[int]], where: str) -> None:
        """Hold names and shapes of its state dict against the official ones."""
        mine = {name: list(value.shape) for name, value in net.state_dict().items()}
        wrong = [name for name in mine.keys() | official.keys() if mine.get(name) != official.get(name)]
        self.failures += [f"{where}: {', '.join(sorted(wrong))}"] if wrong else []

    def discriminator(self) -> Discriminator:
        return Discriminator(
            self.net("create_classifier", "classifier", "prefix_classifier"),
            self.net("create_classifier", "discriminator", "prefix_discriminator"),
        )

    def wants(self, base: str) -> bool:
        """Whether the file records `base`, or a part or a summary of it."""
        return any(base + suffix in self.arrays for suffix in ("", *_SUMMARIES))

    def judge(self, key: str, mine: Tensor | np.ndarray | float, tol: float, how: str = "std") -> None:
        """Compare one output; `how` says what `tol` is a share of: "std", "relative" to each number, or "absolute"."""
        self.judged.add(key)
        reference = self.arrays[key]
        ours = np.asarray(mine)
        if ours.shape != reference.shape:
            self.failures.append(f"{key}: shape {ours.shape}, not {reference.shape}")
            return
        if np.issubdtype(reference.dtype, np.integer):
            self._record(key, 0.0 if np.array_equal(ours, reference) else np.inf, tol)
            return
        ours, reference = ours.astype(np.float64), reference.astype(np.float64)
        stacked = reference.ndim >= 4
        for a, b in zip(ours, reference, strict=True) if stacked else [(ours, reference)]:
            self._record(key, _error(a, b, how), tol)

    def judge_all(self, base: str, mine: Tensor, tol: float) -> None:
        """Compare whatever the file records of `base`: all of it, every n-th entry, means, deviations, norms."""
        if base in self.arrays:
            self.judge(base, mine, tol)
        for suffix, summary in _SUMMARIES.items():
            if base + suffix in self.arrays:
                self.judge(base + suffix, summary(mine, self.arrays[base + suffix].shape), tol)

    def judge_log_ratio(self, key: str, mine: Tensor, tol: float) -> None:
        """As `judge`, but samples outside the window must be marked exactly, and do not count for the spread."""
        outside = self.arrays[key] == OUTSIDE_WINDOW
        if not np.array_equal(mine.numpy() == OUTSIDE_WINDOW, outside):
            self.failures.append(f"{key}: {mine.tolist()} is outside the window at other places than the reference")
        self.arrays[key] = self.arrays[key][~outside]
        self.judge(key, mine[torch.from_numpy(~outside)], tol)

    def _record(self, key: str, error: float, tol: float) -> None:
        error = np.inf if np.isnan(error) else error
        self.ratio, self.relative = max(self.ratio, error / tol if error else 0.0), max(self.relative, error)
        if error > tol:
            self.failures.append(f"{key}: error {error:.3g}, tolerance {tol:.3g}")


def _error(mine: np.ndarray, reference: np.ndarray, how: str) -> float:
    difference = np.abs(mine - reference)
    if how == "absolute" or not difference.any():
        return float(difference.max(initial=0.0))
    if how == "relative":
        differs = difference != 0
        return float((difference[differs] / np.abs(reference[differs])).max()) if reference[differs].all() else np.inf
    # A single number has no spread, and a guidance of zeros must be zeros.
    scale = reference.std() or np.abs(reference).max()
    return float(difference.max() / scale) if scale else np.inf


def every_nth(full: Tensor, shape: tuple[int, ...]) -> Tensor:
    """What the file keeps of a large array: its shape tells the stride along each axis."""
    return full[tuple(slice(None, None, -(-whole // kept)) for whole, kept in zip(full.shape, shape, strict=True))]


def _over_trailing(reduce: Callable[..., Tensor]) -> Callable[[Tensor, tuple[int, ...]], Tensor]:
    return lambda full, shape: reduce(full.double(), dim=tuple(range(len(shape), full.ndim)))


_SUMMARIES: dict[str, Callable[[Tensor, tuple[int, ...]], Tensor]] = {
    "_sub": every_nth,
    "_mean": _over_trailing(torch.mean),
    "_std": _over_trailing(lambda full, dim: full.std(dim=dim, correction=0)),
    "_norm": _over_trailing(lambda full, dim: full.square().sum(dim=dim).sqrt()),
}
