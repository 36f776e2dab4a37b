"""Noise and labels as torch's generator on CUDA draws them, on any device and without one.

That generator is Philox4x32-10 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, 2011): a function of the
seed and of a counter of 128 bits. Its lower half counts the calls of the generator, its upper half is the thread of the
GPU that asks. So a number can be computed where no such thread is. How a GPU's threads share out the elements of a
tensor is that of ATen's `distribution_elementwise_grid_stride_kernel`; words become normal numbers as in cuRAND's
`curand_normal4` and `curand_normal2_double`.
"""

import math
from collections.abc import Generator, Sequence

import torch
from torch import Tensor

from dgfast.errors import UserError
from dgfast.randomness.seeds import checked

SMALLEST_WAVE = 40_960
"""Threads that the smallest GPU of a data centre, the T4, runs at once. Draws of up to so many elements are the same on
all such GPUs; larger ones depend on how many processors a GPU has."""

_MASK = 0xFFFFFFFF
_MULTIPLIERS, _WEYL = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)
_ROUNDS, _BLOCK = 10, 256  # threads of a block
_TURN = 6.2831854820251465 * 2.0**-32  # float32(2 pi), for words of 32 bits
_LANES = {torch.float32: 4, torch.float64: 2}  # numbers that one thread makes of four words
_AT_ONCE = {"cpu": 1 << 16}  # elements: as many as stay in a core's cache; of a GPU, whose memory is large, many more
_AT_ONCE_ON_GPUS = 1 << 24
Words = tuple[Tensor, Tensor, Tensor, Tensor]


def words(keys: Tensor, threads: Tensor, calls: int) -> Words:
    """Four random words of 32 bits each: Philox4x32-10 at the counter (calls, threads), both of 64 bits.

    Args:
        keys, threads: int64, of shapes that broadcast. The words have the shape of both together.
    """
    call = torch.full((), calls, dtype=torch.int64, device=threads.device)
    c0, c1, c2, c3 = _low(call), call >> 32, _low(threads), threads >> 32
    k0, k1 = keys, keys >> 32
    for _ in range(_ROUNDS):
        # Products have 64 bits, whatever int64 takes for their sign. What has more than 32 is cut where it is a factor.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = _low((p1 >> 32) ^ c1 ^ k0), p1, _low((p0 >> 32) ^ c3 ^ k1), p0
        k0, k1 = k0 + _WEYL[0], k1 + _WEYL[1]
    return c0, _low(c1), c2, _low(c3)


def _low(value: Tensor) -> Tensor:
    """The lower 32 of 64 bits."""
    return value & _MASK


def radius_and_angle(drawn: Words, lane: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The pair of Box and Muller that a lane's number is the sine (even lanes) or cosine (odd ones) of.

    In float32 every operation is rounded as the GPU rounds it, but for its logarithm and its fast sine: those are the
    exact ones here, rounded once.
    """
    if dtype == torch.float64:
        x, y = (drawn[k] ^ (drawn[k + 1] << 21) for k in (0, 2))
        uniform, angle = x * 2.0**-53 + 2.0**-54, (y * 2.0**-52 + 2.0**-53) * math.pi
        return (-2 * uniform.log()).sqrt(), angle
    p, q = drawn[:2] if lane < 2 else drawn[2:]
    uniform = (p.float().double() * 2.0**-32 + 2.0**-33).float()
    angle = (q.float().double() * _TURN + _TURN / 2).float()
    return (-2 * uniform.double().log().float()).sqrt(), angle


def _normal(drawn: Words, lane: int, dtype: torch.dtype) -> Tensor:
    radius, angle = radius_and_angle(drawn, lane, dtype)
    exact = angle.double()
    return radius * (exact.cos() if lane % 2 else exact.sin()).to(dtype)


class CudaStreams:
    """One generator a seed, each as `torch.Generator("cuda")` draws; see `randomness.Streams`.

    Draws of other types than float64 are made in float32. Drawn where they are wanted: nothing waits for the device.

    Raises:
        UserError: a seed that is no whole number from 0 to 2^32 - 1.
    """

    def __init__(self, seeds: Sequence[int], threads: int | None = None) -> None:
        """
        Args:
            threads: that the GPU runs at once: its processors (SMs) x the threads of one, in whole blocks of 256. None:
                only what does not depend on it is drawn.
        """
        self._seeds = self._keys = torch.tensor([checked(seed) for seed in seeds])
        self._most_threads, self._calls = threads, 0

    def normal(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """
        Raises:
            UserError: without a number of threads, a draw for which it must be known.
        """
        count, drawn_in = math.prod(shape), dtype if dtype == torch.float64 else torch.float32
        if self._most_threads is None:
            require_one_wave(count)
        threads = min(math.ceil(count / _BLOCK) * _BLOCK, self._most_threads or SMALLEST_WAVE)
        self._keys = self._keys.to(device)
        at_once = max(1, _AT_ONCE.get(device.type, _AT_ONCE_ON_GPUS) // max(count, 1))
        parts = [_drawn(keys, count, self._calls, threads, drawn_in) for keys in self._keys.split(at_once)]
        self._calls += _calls(count, threads, _LANES[drawn_in])
        return torch.cat(parts).view(-1, *shape).to(dtype)

    def normals(
        self, count: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> Generator[Tensor, None, None]:
        yield from (self.normal(shape, dtype, device) for _ in range(count))

    def labels(self, count: int) -> Tensor:
        first = words(self._seeds, torch.zeros(1, dtype=torch.int64), self._calls)[0]
        self._calls += 1
        return first % count


def require_one_wave(numbers: int) -> None:
    """
    Raises:
        UserError: which numbers such a draw has depends on the GPU.
    """
    if numbers > SMALLEST_WAVE:
        raise UserError(
            f"noise cuda: an image has {numbers:,} numbers, and above {SMALLEST_WAVE:,} GPUs draw by their model; "
            "use that of the CPU"
        )


def _calls(count: int, threads: int, lanes: int) -> int:
    """How often each thread asks the generator for four words, for that many numbers."""
    return (count - 1) // (threads * lanes) + 1


def _drawn(keys: Tensor, count: int, calls: int, threads: int, dtype: torch.dtype) -> Tensor:
    """Unit normal numbers [keys, count] of generators that were called `calls` times before."""
    parts, lanes = [], _LANES[dtype]
    for k in range(_calls(count, threads, lanes)):
        first = k * threads * lanes
        asking = torch.arange(min(threads, count - first), device=keys.device)
        drawn = words(keys[:, None], asking, calls + k)
        parts += [
            _normal(drawn, lane, dtype)[:, : max(count - first - lane * threads, 0)]
            for lane in range(lanes)
            if first + lane * threads < count
        ]
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
