"""Noise and labels of torch's generators on the CPU, and what every source of them is asked for."""

import operator
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

from dgfast.errors import UserError

_BUFFERS = 2  # one is copied to the device while the other is filled

SEEDS = 1 << 32
"""Seeds lie below it: EDM's generator takes them modulo 2^32, where two seeds would give one image."""


class Streams(Protocol):
    """One stream of random numbers a seed. Every draw takes the next numbers of each.

    The order of draws is EDM's: latents, class labels, then the noise of each step.
    """

    def normal(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Unit normal noise [seeds, *shape]."""
        ...

    def normals(
        self, count: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> Generator[Tensor, None, None]:
        """`count` times `normal`. Nothing else may draw until it is closed."""
        ...

    def labels(self, count: int) -> Tensor:
        """Class indices below `count`, int64 [seeds], on the CPU."""
        ...


class SeedStreams:
    """One generator a seed, on the CPU so that every device sees the same numbers; see `Streams`.

    Raises:
        UserError: a seed that is no whole number from 0 to 2^32 - 1.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self._generators = [torch.Generator().manual_seed(checked(seed)) for seed in seeds]

    def normal(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        return self._filled(self._buffer(shape, dtype, device)).to(device, non_blocking=True)

    def normals(
        self, count: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> Generator[Tensor, None, None]:
        """See `Streams`; closing it ends its thread.

        On CUDA the next noise is drawn, in a thread, while the device works, and neither waits for the other. On the
        CPU the network has the cores, and each is drawn when it is asked for.
        """
        if device.type != "cuda":
            yield from (self.normal(shape, dtype, device) for _ in range(count))
            return
        # The thread makes no call of CUDA's: some are forbidden to all threads while one captures a graph.
        buffers = [self._buffer(shape, dtype, device) for _ in range(min(count, _BUFFERS))]
        pool = ThreadPoolExecutor(1)
        try:
            drawn = deque(pool.submit(self._filled, buffer) for buffer in buffers)
            for left in reversed(range(count)):
                buffer = drawn.popleft().result()
                noise, arrival = _sent(buffer, device)
                yield noise
                if left > len(drawn):
                    arrival()  # the device is at work on the step that this noise was for
                    drawn.append(pool.submit(self._filled, buffer))
        finally:
            pool.shutdown(cancel_futures=True)

    def labels(self, count: int) -> Tensor:
        return torch.stack([torch.randint(count, (), generator=g) for g in self._generators])

    def _buffer(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Where noise on its way to the device is drawn; it gets to a GPU without waiting from pinned memory alone."""
        return torch.empty(len(self._generators), *shape, dtype=dtype, pin_memory=device.type == "cuda")

    def _filled(self, buffer: Tensor) -> Tensor:
        for noise, generator in zip(buffer, self._generators, strict=True):
            noise.normal_(generator=generator)
        return buffer


def _sent(buffer: Tensor, device: torch.device) -> tuple[Tensor, Callable[[], None]]:
    """What is in the buffer, on its way to the device, and what waits for its arrival."""
    return buffer.to(device, non_blocking=True), torch.cuda.current_stream(device).record_event().synchronize


def checked(seed: int) -> int:
    """The seed, as a number of Python.

    Raises:
        UserError: it is no whole number from 0 to 2^32 - 1.
    """
    try:
        number = operator.index(seed)
    except TypeError:
        number = -1
    if not 0 <= number < SEEDS:
        raise UserError(f"seed {seed!r:.40} is no whole number from 0 to 4294967295")
    return number
