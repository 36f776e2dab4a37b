"""How long and how fast a network is trained."""

import math
from dataclasses import dataclass

from dgfast.errors import UserError
from dgfast.training.averaging import kept_share


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train.

    Attributes:
        images: training images to draw in all, with replacement.
        batch: images a step.
        lr: Adam's largest learning rate, reached after `warmup` of the run and falling linearly to 0.
        weight_decay: Adam's, as DG uses it.
        ema: decay of the averaged weights, which are the ones that are kept.
        ema_rel: relative width of EDM2's power-function average, which takes the place of `ema`; None: `ema` it is.
        seed: step k draws its batch and its noise from seed and k alone, so an interrupted run goes on exactly.
        dtype: of `devices.DTYPES`; bf16 rounds what convolutions and matrix products read. Weights, their average,
            normalisations and Adam stay in float32 (torch's autocast).
    """

    images: int
    batch: int = 128
    lr: float = 2e-3
    weight_decay: float = 0.0
    warmup: float = 0.05
    ema: float = 0.999
    ema_rel: float | None = None
    seed: int = 0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        """
        Raises:
            UserError: numbers that make no training, by the names of their options.
        """
        for name in ("images", "batch"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: one image is needed at least")
        if not 0 < self.lr < math.inf:
            raise UserError(f"--lr {self.lr:g}: a learning rate is a number above 0")
        if not 0 <= self.weight_decay < math.inf:
            raise UserError(f"--weight-decay {self.weight_decay:g}: it is a number, 0 at least")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"--seed {self.seed}: seeds go from 0 to {2**32 - 1}")
        kept_share(self.ema, self.ema_rel)

    @property
    def steps(self) -> int:
        return max(1, self.images // self.batch)

    def factor(self, step: int) -> float:
        """Learning rate at `step`, as a share of `lr`."""
        progress = step / self.steps
        return min((step + 1) / (self.warmup * self.steps + 1), (1 - progress) / (1 - self.warmup))
