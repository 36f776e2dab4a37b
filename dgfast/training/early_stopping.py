"""The best average of a run by a held-out loss, and when to stop waiting for a better one."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class EarlyStopping:
    """How a run is judged while it goes on.

    Attributes:
        judge: held-out loss of the averaged network, by the same draws each time.
        checks: how often in a whole run. patience: checks without a better loss after which the run ends.
    """

    judge: Callable[[nn.Module], float]
    checks: int = 25
    patience: int = 6


@dataclass
class Best:
    """The best averaged weights that were seen; a part of the state of a run, and empty without early stopping."""

    stopping: EarlyStopping | None
    loss: float = math.inf
    step: int = 0
    waited: int = 0
    weights: dict[str, Tensor] = field(default_factory=dict)

    @property
    def settled(self) -> bool:
        return self.stopping is not None and self.waited >= self.stopping.patience

    def see(self, averages: nn.Module, step: int, steps: int) -> dict[str, float]:
        """Judge the first averaged network if it is time to; what is to be recorded of it."""
        if self.stopping is None or (step % max(1, steps // self.stopping.checks) and step != steps):
            return {}
        averages.eval()
        loss = self.stopping.judge(next(averages.children()))
        self.waited += 1
        if loss < self.loss:
            self.loss, self.step, self.waited = loss, step, 0
            self.weights = copy.deepcopy(averages.state_dict())
        return {"held_out_loss": loss}

    def told(self, step: int, steps: int) -> str | None:
        """A sentence on which average of a run of so many steps, which ended at `step`, is kept; None: the last one."""
        if not self.weights or self.step == steps:
            return None
        ended = f"ended at step {step} of {steps}: " if step < steps else ""
        return f"{ended}the held-out loss was lowest at step {self.step}, whose average is kept"

    def restore(self, averages: nn.Module) -> None:
        """Give the averages the best weights, if any were judged."""
        if self.weights:
            averages.load_state_dict(self.weights)

    def state_dict(self) -> dict[str, Any]:
        return {"loss": self.loss, "step": self.step, "waited": self.waited, "weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loss, self.step, self.waited = float(state["loss"]), int(state["step"]), int(state["waited"])
        self.weights = dict(state["weights"])


def mean_of_draws(loss: Callable[[nn.Module, int], Tensor], batch: int, batches: int) -> Callable[[nn.Module], float]:
    """A judge by the mean of a training loss over the same draws each time; it leaves torch's generator as it was."""

    def judge(net: nn.Module) -> float:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return sum(float(loss(net, batch).detach()) for _ in range(batches)) / batches

    return judge
