"""Many seeds through one sampler: chunk by chunk, images written while the next chunk is sampled."""

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from dgfast.chunks import Chunk
from dgfast.errors import UserError, one_line
from dgfast.one_step import OneStep
from dgfast.outputs import Drawn, Fetcher
from dgfast.sampler import OnStep, Sampler


def draw(
    sampler: Sampler | OneStep,
    chunks: Iterable[Chunk],
    batch: int,
    write: Callable[[Drawn], None],
    *,
    fetcher: Fetcher = Fetcher(),  # noqa: B008 - frozen
    static: bool = False,
    on_step: OnStep | None = None,
    on_smaller_batch: Callable[[int], None] | None = None,
) -> None:
    """Sample all chunks and give them to `write`, in order; the next is taken once the one before is sampled.

    Out of memory, the batch is halved and sampling goes on; nothing that was made is lost.

    Args:
        batch: images that are sampled at once; a chunk of more is sampled in parts and written as a whole.
        write: called in a thread of its own, with one chunk after the other.
        fetcher: makes the arrays that `write` gets of what the sampler draws.
        static: fill small chunks up, with copies of their last image, so that every batch has one shape.
        on_step: see `Sampler.integrate`. on_smaller_batch: called with the new batch.

    Raises:
        UserError: see `Sampler.__call__`; not even one image fits into memory. And what `write` raises.
    """
    pending: Future[None] | None = None
    with ThreadPoolExecutor(max_workers=1) as pool:
        try:
            for chunk in chunks:
                parts, batch = _parts(sampler, chunk, batch, fetcher, static, on_step, on_smaller_batch)
                if pending is not None:
                    pending.result()
                pending = pool.submit(_write, write, chunk, parts)
        except BaseException as error:
            failed = pending.exception() if pending is not None else None
            if failed is not None and failed is not error:
                raise _both(failed, error) from error
            raise
        if pending is not None:
            pending.result()


def _both(unwritten: BaseException, failed: BaseException) -> BaseException:
    """What went wrong in writing, told with what then went wrong in sampling where one line is all that is shown."""
    if not isinstance(unwritten, UserError) or not isinstance(failed, Exception):
        return unwritten
    return type(unwritten)(f"{unwritten.message}; and then the next batch failed: {one_line(failed)}")


_Part = tuple[dict[str, Callable[[], np.ndarray]], np.ndarray | None]


def _parts(
    sampler: Sampler | OneStep,
    chunk: Chunk,
    batch: int,
    fetcher: Fetcher,
    static: bool,
    on_step: OnStep | None,
    on_smaller_batch: Callable[[int], None] | None,
) -> tuple[list[_Part], int]:
    """The chunk in parts of at most `batch` images, and the batch that fitted into memory."""
    parts: list[_Part] = []
    done = 0
    while done < len(chunk.seeds):
        labels = None if chunk.labels is None else chunk.labels[done : done + batch]
        conditions = {name: rows[done : done + batch] for name, rows in chunk.conditions.items()}
        part = Chunk(chunk.index, chunk.seeds[done : done + batch], labels, conditions)
        size = batch if static else len(part.seeds)
        try:
            parts.append(_sampled(sampler, part, size, fetcher, on_step))
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            if size == 1:
                raise UserError(
                    "out of memory: not even one image fits; try --dtype bf16, or another device"
                ) from error
        else:
            done += len(part.seeds)
            continue
        # Outside of the handler, whose traceback holds the tensors of the batch that did not fit.
        batch = (size + 1) // 2
        sampler.forget()  # a captured function of the batch that did not fit would hold its memory
        if sampler.device.type == "cuda":
            torch.cuda.empty_cache()
        if on_smaller_batch is not None:
            on_smaller_batch(batch)
    return parts, batch


def _sampled(sampler: Sampler | OneStep, part: Chunk, size: int, fetcher: Fetcher, on_step: OnStep | None) -> _Part:
    """The arrays of a chunk, on their way to the host, and its class indices; sampled in a batch of `size`."""
    count = len(part.seeds)
    seeds = [*part.seeds, *[part.seeds[-1]] * (size - count)]
    if part.labels is None:
        classes = sampler.draw_labels(seeds)
    else:
        classes = torch.tensor([*part.labels, *[part.labels[-1]] * (size - count)])
    last = {name: rows[-1:].expand(size - count, *rows.shape[1:]) for name, rows in part.conditions.items()}
    conditions = {name: torch.cat([rows, last[name]]) for name, rows in part.conditions.items()}
    more = {"conditions": conditions} if conditions else {}  # a one-step generator takes none
    drawn: Tensor = sampler(seeds, classes, on_step, **more)[:count]
    return fetcher(drawn), None if classes is None else classes.cpu().numpy()[:count]


def _write(write: Callable[[Drawn], None], chunk: Chunk, parts: list[_Part]) -> None:
    arrays = {name: np.concatenate([waits[name]() for waits, _ in parts]) for name in parts[0][0]}
    labels = [classes for _, classes in parts if classes is not None]
    write(Drawn(chunk, np.concatenate(labels) if labels else None, arrays))


def _is_out_of_memory(error: Exception) -> bool:
    """The CPU allocator raises a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
