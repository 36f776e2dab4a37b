"""Noise of CUDA as dgfast computes it against what torch draws on the GPU itself."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.part import Rows, Setting
from dgfast.randomness import CudaStreams, SeedStreams, Streams
from dgfast.randomness.cuda import Words, radius_and_angle, words

_SHAPE, _SEEDS = (3, 32, 32), range(16)
Draw = Callable[[Streams], Tensor]
_DRAWS: dict[str, Draw] = {  # in EDM's order
    "latents, float32": lambda streams: streams.normal(_SHAPE, torch.float32, torch.device("cpu")),
    "labels of 10": lambda streams: streams.labels(10),
    "churn, float64": lambda streams: streams.normal(_SHAPE, torch.float64, torch.device("cpu")),
    "churn, float32": lambda streams: streams.normal(_SHAPE, torch.float32, torch.device("cpu")),
    "labels of 1000": lambda streams: streams.labels(1000),
}


class _Generators:
    """A generator of torch on CUDA for each seed, as EDM's code has them: what `CudaStreams` is to give."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in _SEEDS]

    def normal(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        drawn = [torch.randn(shape, generator=g, device=self._device, dtype=dtype) for g in self.generators]
        return torch.stack(drawn).to(device)

    def labels(self, count: int) -> Tensor:
        return torch.stack([torch.randint(count, [], generator=g, device=self._device) for g in self.generators]).cpu()


def cuda_noise(at: Setting) -> Rows:
    """What EDM draws of a seed, draw by draw; where there is no GPU, that of the CPU's generator against itself."""
    yield None
    theirs: _Generators | SeedStreams
    on_gpu = at.device.type == "cuda"
    theirs, ours = (
        (_Generators(at.device), CudaStreams(_SEEDS)) if on_gpu else (SeedStreams(_SEEDS), SeedStreams(_SEEDS))
    )
    whose = "torch on this GPU" if on_gpu else "itself: needs a GPU"
    for name, draw in _DRAWS.items():
        expected, difference = draw(theirs), draw(ours).double()  # type: ignore[arg-type]  # the two that are called
        difference = (difference - expected.double()).abs()
        yield {
            "draw": name, "compared with": whose, "not equal": int((difference > 0).sum()), "of": expected.numel(),
            "largest difference": float(difference.max()), "mean difference": float(difference.mean()),
        }  # fmt: skip
    if isinstance(theirs, _Generators):
        offset = int.from_bytes(bytes(theirs.generators[0].get_state()[8:].tolist()), "little")
        yield {"draw": "offset after all five", "compared with": "20", "not equal": int(offset != 20), "of": 1}
        yield from _sines(at.device)


def _sines(device: torch.device) -> Rows:
    """Which sine of its angle the GPU's fast one is: the exact one, or that of the angle reduced by 1 / (2 pi)."""
    torch_draws = torch.randn(_SHAPE, generator=torch.Generator(device).manual_seed(0), device=device).flatten().cpu()
    drawn: Words = words(torch.zeros(1, dtype=torch.int64), torch.arange(math.prod(_SHAPE)), 0)
    radius, angle = radius_and_angle(drawn, 0, torch.float32)
    turn = 2 * math.pi
    reduced = (angle * (1 / torch.tensor(turn))).double().frac() * turn
    for name, sine in (("exact", angle.double().sin()), ("reduced in float32", reduced.sin())):
        difference = (radius * sine.float() - torch_draws).abs()
        yield {"sine": name, "largest difference": float(difference.max()), "mean difference": float(difference.mean())}
