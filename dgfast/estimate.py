"""What a job will take, before it is drawn: `python -m dgfast.sample --dry-run`."""

import shutil

import torch

from dgfast.drawing import Drawing, cost
from dgfast.one_step import OneStep
from dgfast.progress import duration
from dgfast.sampler import Sampler

_CPU_BATCH = 8  # on the CPU the time of a call grows with the batch, and a call of a whole one may take a minute
_MANIFEST, _LINE, _HEADERS = 4096, 128, 1024  # bytes: of the manifest, of a chunk's line in it, of a file's own


def estimate(drawing: Drawing) -> str:
    """Images, network calls, time and disk of what is missing in the job's folder, a line each.

    One call of each function of the plan is timed, in eager mode: another runtime would have to be made first.
    """
    folder, sampler = drawing.folder, drawing.make("eager")
    missing = folder.chunks.images(folder.missing)
    batch = folder.chunks.size if sampler.device.type == "cuda" else min(_CPU_BATCH, folder.chunks.size)
    seconds = sampler.estimate(batch) / batch * missing / drawing.team.size
    there = f", {drawing.images - missing:,} of them there already" if missing < drawing.images else ""
    size = _most_bytes(drawing, sampler, missing)
    path = folder.path.absolute()
    free = shutil.disk_usage(next(place for place in (path, *path.parents) if place.exists())).free
    return "\n".join(
        (
            f"images  {drawing.images:,}{there}; {len(folder.missing):,} chunks of {folder.chunks.size} to draw",
            f"calls   {cost(sampler)} an image",
            f"time    about {duration(seconds)} on {sampler.device}, {_timed(drawing)}" + _processes(drawing),
            f"disk    at most {_size(size)} in {folder.path}/, where {_size(free)} are free"
            + (", too few" if size > free else ""),
        )
    )


def _timed(drawing: Drawing) -> str:
    return "eager" if drawing.runtime == "eager" else f"as eager has it; {drawing.runtime} was not timed"


def _processes(drawing: Drawing) -> str:
    return f", by {drawing.team.size} processes" if drawing.team.size > 1 else ""


def _most_bytes(drawing: Drawing, sampler: Sampler | OneStep, missing: int) -> int:
    """Of all files that are to come, as if nothing in them could be compressed."""
    folder = drawing.folder
    image = sampler([0]) if isinstance(sampler, OneStep) else torch.zeros(1, *sampler.shape, device=sampler.device)
    sizes = {name: wait().nbytes for name, wait in drawing.fetcher(image).items()}
    sizes["adm"] = 3 * sizes.get("images", 0)  # grey in three channels
    files = folder.files_of_a_chunk * len(folder.missing) + len(folder.copies) + 1
    return (
        missing * sum(sizes[name] for name in folder.copies)
        + folder.products.shown * sizes.get("images", 0)
        + files * _HEADERS
        + len(folder.chunks) * _LINE
        + _MANIFEST
    )


def _size(count: float) -> str:
    for unit in ("bytes", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
