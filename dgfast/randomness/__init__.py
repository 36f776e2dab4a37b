"""Seeds to noise and labels: image k depends on seed k alone, whatever the batch it is drawn in."""

from collections.abc import Callable, Sequence

from dgfast.errors import UserError
from dgfast.randomness.cuda import CudaStreams, require_one_wave
from dgfast.randomness.seeds import SEEDS, SeedStreams, Streams

__all__ = ["SEEDS", "CudaStreams", "MakeStreams", "SeedStreams", "Streams", "source"]

MakeStreams = Callable[[Sequence[int]], Streams]
"""Streams of these seeds, from their beginning."""
_SOURCES: dict[str, MakeStreams] = {"cpu": SeedStreams, "cuda": CudaStreams}
"""By the names of `config.NOISES`."""


def source(noise: str | MakeStreams, numbers: int) -> MakeStreams:
    """The source of noise of that name, or the given one.

    Args:
        numbers: how many the largest draw of one seed has.

    Raises:
        UserError: there is none of that name, or it cannot draw so many.
    """
    if callable(noise):
        return noise
    if noise not in _SOURCES:
        raise UserError(f"noise {noise!r:.40} is not one of {', '.join(_SOURCES)}, and makes no streams of seeds")
    if noise == "cuda":
        require_one_wave(numbers)
    return _SOURCES[noise]
