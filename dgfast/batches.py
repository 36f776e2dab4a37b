"""Many seeds through one sampler: batch by batch, images written while the next batch is sampled."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from dgfast.one_step import OneStep
from dgfast.outputs import fetch_uint8
from dgfast.plan import Step
from dgfast.sampler import Sampler

Write = Callable[[np.ndarray, list[int], np.ndarray | None], None]


def draw(
    sampler: Sampler | OneStep,
    seeds: Sequence[int],
    labels: Sequence[int] | None,
    batch: int,
    write: Write,
    *,
    decode: Callable[[Tensor], Tensor] | None = None,
    static: bool = False,
    on_step: Callable[[Step, Tensor], None] | None = None,
    on_smaller_batch: Callable[[int], None] | None = None,
) -> None:
    """Sample all seeds and give them to `write`, in order.

    Out of memory, the batch is halved and sampling goes on; nothing that was made is lost.

    Args:
        labels: one class index a seed; None takes those that the seeds give.
        write: gets uint8 images [N, H, W, C], their seeds, and their class indices [N] or None.
        decode: makes images of what the sampler draws, where those are latents.
        static: fill the last batch up, with copies of its last image, so that every batch has one shape.
        on_step: see `Sampler.integrate`. on_smaller_batch: called with the new batch.

    Raises:
        UserError: see `Sampler.__call__`. torch.OutOfMemoryError: not even one image fits.
    """
    done = 0
    pending: Future[None] | None = None
    with ThreadPoolExecutor(max_workers=1) as pool:
        while done < len(seeds):
            chunk = list(seeds[done : done + batch])
            filled = chunk + chunk[-1:] * (batch - len(chunk)) if static else chunk
            try:
                classes = _classes(sampler, filled, labels, done)
                drawn = sampler(filled, classes, on_step)[: len(chunk)]
                fetch = fetch_uint8(drawn if decode is None else decode(drawn))
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error) or len(filled) == 1:
                    raise
            else:
                known = None if classes is None else classes.cpu().numpy()[: len(chunk)]
                if pending is not None:
                    pending.result()
                pending = pool.submit(_write, write, fetch, chunk, known)
                done += len(chunk)
                continue
            # Outside of the handler, whose traceback holds the tensors of the batch that did not fit.
            batch = (len(filled) + 1) // 2
            if sampler.device.type == "cuda":
                torch.cuda.empty_cache()
            if on_smaller_batch is not None:
                on_smaller_batch(batch)
        if pending is not None:
            pending.result()


def _classes(sampler: Sampler | OneStep, seeds: list[int], labels: Sequence[int] | None, start: int) -> Tensor | None:
    if labels is None:
        return sampler.draw_labels(seeds)
    given = list(labels[start : start + len(seeds)])
    return torch.tensor(given + given[-1:] * (len(seeds) - len(given)))


def _write(write: Write, fetch: Callable[[], np.ndarray], seeds: list[int], labels: np.ndarray | None) -> None:
    write(fetch(), seeds, labels)


def _is_out_of_memory(error: Exception) -> bool:
    """The CPU allocator raises a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
