"""A job from its folder's first manifest to its last file: what is missing is drawn, and whatever stops it says so."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import click
import torch
from click.exceptions import Exit

from dgfast.batches import draw
from dgfast.errors import REFUSED, TIME_LIMIT, UserError
from dgfast.job_folder import JobFolder
from dgfast.one_step import OneStep
from dgfast.ops import Choice, kernels
from dgfast.outputs import Drawn, Fetcher
from dgfast.plan import Step
from dgfast.progress import Progress, say
from dgfast.ranges import Ranges
from dgfast.sampler import Sampler
from dgfast.stopping import code
from dgfast.team import Team

_POLL, _PATIENCE = 0.2, 60.0  # seconds
_RANGES_SHOWN = 6


@dataclass
class Drawing:
    """A job, checked, and what draws it.

    Attributes:
        folder: where to. team: the processes that draw it.
        make: gives the sampler in a runtime, by the runtime's name; runtime: the one to draw in.
        may_fall_back: draw in eager mode where that runtime cannot be had.
        fetcher: see `batches.draw`. kernels: see `ops.kernels`.
        facts: what the manifest tells of this run. began, time_limit: seconds of `time.monotonic`, and from then on.
    """

    folder: JobFolder
    team: Team
    make: Callable[[str], Sampler | OneStep]
    runtime: str
    fetcher: Fetcher
    kernels: Choice
    facts: Mapping[str, Any]
    may_fall_back: bool = False
    time_limit: float | None = None
    began: float = field(default_factory=time.monotonic)

    @property
    def images(self) -> int:
        return len(self.folder.chunks.seeds)


def run(drawing: Drawing, overwrite: bool = False) -> None:
    """Draw what is missing.

    Raises:
        UserError: see `JobFolder.opened` and `Sampler.__call__`; what is safe is said.
        Exit: stopped by the user, the system or the time limit, after a line that says what is safe.
    """
    team, folder = drawing.team, drawing.folder
    if team.rank > 0:
        _follow(drawing)
        return
    with ExitStack() as stack:
        try:
            stack.enter_context(folder.opened(drawing.facts, overwrite))
        except BaseException:
            team.tell("plan", "refused")
            raise
        team.tell("plan", f"draw {folder.missing}")
        with _told_what_is_safe(drawing):
            _lead(drawing)


def _lead(drawing: Drawing) -> None:
    """The part of rank 0, which also closes the folder."""
    folder, missing = drawing.folder, drawing.folder.missing
    to_draw = folder.chunks.images(missing)
    _say_what_is_there(drawing, to_draw)
    if not missing:
        folder.manifest.end(outcome="complete", images=0)
        folder.finish()
        return
    sampler, runtime, compile_seconds = _prepared(drawing)
    began = time.monotonic()
    _draw(drawing, sampler, missing, static=runtime != "eager")
    seconds = time.monotonic() - began
    there = folder.chunks.images(folder.there())
    complete = there == drawing.images
    folder.manifest.end(
        outcome="complete" if complete else "stopped", images=there - (drawing.images - to_draw), seconds=seconds,
        compile_seconds=compile_seconds, runtime=runtime, **_costs(sampler),
    )  # fmt: skip
    if not complete:
        raise _IncompleteError
    folder.finish()
    say("\n".join(f"{folder.path}/{content}" for content in folder.contents()))
    say(
        f"{to_draw} images in {seconds:.1f} s: {to_draw / seconds:.2f} images/s, {cost(sampler)} an image, "
        f"in {folder.path}/"
    )


class _IncompleteError(Exception):
    """Chunks are missing although nothing went wrong in this process."""


def _follow(drawing: Drawing) -> None:
    """The part of the other ranks: draw until nothing is left."""
    team = drawing.team
    word, _, missing = team.told("plan").partition(" ")
    if word == "refused":
        raise Exit(REFUSED)
    try:
        if missing:
            sampler, runtime, _ = _prepared(drawing)
            _draw(drawing, sampler, Ranges.parse(missing), static=runtime != "eager")
    except KeyboardInterrupt as stop:
        raise Exit(code(stop)) from None
    finally:
        team.count("left", 1)


def _prepared(drawing: Drawing) -> tuple[Sampler | OneStep, str, float]:
    """The sampler, ready for the job's batches, the runtime that it runs in, and the seconds that this took."""
    runtime = drawing.runtime
    sampler = drawing.make(runtime)
    if runtime == "eager":
        return sampler, runtime, 0.0
    began = time.monotonic()
    try:
        with kernels(drawing.kernels):
            drawing.team.once_a_node(lambda: sampler.prepare(drawing.folder.chunks.size))
    except UserError as error:
        if not drawing.may_fall_back:
            raise
        if drawing.team.rank == 0:
            say(f"not compiled: {error.message}", error=True)
        return drawing.make("eager"), "eager", 0.0
    seconds = time.monotonic() - began
    if drawing.team.rank == 0:
        say(f"{'compiled' if runtime == 'compiled' else f'{runtime} ready'} in {seconds:.1f} s")
    return sampler, runtime, seconds


def _draw(drawing: Drawing, sampler: Sampler | OneStep, missing: Ranges, static: bool) -> None:
    """Draw this process's share; rank 0 also waits for that of the others."""
    team, folder = drawing.team, drawing.folder
    progress = Progress(folder.chunks.images(missing), len(sampler.steps)) if team.rank == 0 else None

    def add(drawn: Drawn) -> None:
        folder.add(drawn)
        total = team.count("images", len(drawn.chunk.seeds))
        if progress is not None:
            progress.drawn(total)

    def on_step(step: Step, x: torch.Tensor, denoised: torch.Tensor, log_ratio: torch.Tensor) -> None:
        if progress is not None:
            progress.step(len(x))

    def on_smaller_batch(batch: int) -> None:
        text = f"out of memory: going on with batches of {batch} images"
        say(text, error=True) if progress is None else progress.note(text)

    pace = _Pace(drawing)
    try:
        with kernels(drawing.kernels):
            draw(
                sampler, (folder.chunks[index] for index in pace.until_time_is_up(team.shares(missing))),
                folder.chunks.size, add, fetcher=drawing.fetcher, static=static,
                on_step=on_step, on_smaller_batch=on_smaller_batch,
            )  # fmt: skip
        if progress is not None:
            _await_others(team, pace, progress)
    finally:
        if progress is not None:
            progress.close()


class _Pace:
    """How long a chunk takes, and whether there is time for one more."""

    def __init__(self, drawing: Drawing) -> None:
        self._drawing, self.slowest = drawing, 0.0

    def until_time_is_up(self, indices: Iterator[int]) -> Iterator[int]:
        """As many of the indices as the time limit allows, as the slowest chunk so far has it."""
        limit = self._drawing.time_limit
        while limit is None or time.monotonic() - self._drawing.began + self.slowest <= limit:
            began = time.monotonic()
            index = next(indices, None)
            if index is None:
                return
            yield index
            self.slowest = max(self.slowest, time.monotonic() - began)


def _await_others(team: Team, pace: _Pace, progress: Progress) -> None:
    """Wait while the other processes finish their last chunks; not for ever for one that says nothing any more."""
    total, since = team.count("images"), time.monotonic()
    while team.count("left") < team.size - 1 and time.monotonic() - since < _PATIENCE + 10 * pace.slowest:
        time.sleep(_POLL)
        if team.count("images") > total:
            total, since = team.count("images"), time.monotonic()
            progress.drawn(total)


# What is said ---------------------------------------------------------------------------------------------------------
@contextmanager
def _told_what_is_safe(drawing: Drawing) -> Iterator[None]:
    """Whatever ends the job before its time, the user learns what is safe, and how to go on."""
    manifest = drawing.folder.manifest
    try:
        yield
    except KeyboardInterrupt as stop:
        manifest.end(outcome="interrupted")
        say(f"stopped: {_safe(drawing)}", error=True)
        raise Exit(code(stop)) from None
    except _IncompleteError:
        if drawing.time_limit is None:
            raise click.ClickException(f"a process of this job did not deliver: {_safe(drawing)}") from None
        say(f"--time-limit: {_safe(drawing)}")
        raise Exit(TIME_LIMIT) from None
    except UserError as error:
        manifest.end(outcome=error.message)
        raise type(error)(f"{error.message}; {_safe(drawing)}") from error
    except BaseException as error:
        manifest.end(outcome=repr(error))
        say(_safe(drawing), error=True)
        raise


def _safe(drawing: Drawing) -> str:
    """Which images are there, and how to draw the rest."""
    folder = drawing.folder
    if not folder.path.is_dir():
        return f"what was drawn went with {folder.path}/"
    there = folder.there()
    if not there:
        return f"nothing was drawn into {folder.path}/"
    seeds = str(Ranges.joined(folder.chunks[index].seeds for index in there)).split(",")
    more = f" and {len(seeds) - _RANGES_SHOWN} ranges more" if len(seeds) > _RANGES_SHOWN else ""
    return (
        f"{folder.chunks.images(there):,} of {drawing.images:,} images are safe in {folder.path}/ "
        f"(seeds {','.join(seeds[:_RANGES_SHOWN])}{more}); the same command goes on"
    )


def _say_what_is_there(drawing: Drawing, to_draw: int) -> None:
    folder, there = drawing.folder, drawing.images - to_draw
    damaged = f"; {folder.damaged} chunks are damaged and drawn anew" if folder.damaged else ""
    if not to_draw:
        say(f"{folder.path}/ has all {drawing.images:,} images already; --overwrite draws them anew")
    elif there or damaged:
        say(f"{folder.path}/ has {there:,} of {drawing.images:,} images already{damaged}; drawing {to_draw:,}")


def cost(sampler: Sampler | OneStep) -> str:
    """What an image costs, in network calls."""
    if isinstance(sampler, OneStep):
        return "one generator forward"
    backwards = f", {sampler.score_backwards} backward passes through the score net" if sampler.score_backwards else ""
    calls = f"{sampler.score_evaluations} score evaluations{backwards}"
    return f"{calls} and {sampler.guidance_gradients} guidance gradients"


def _costs(sampler: Sampler | OneStep) -> dict[str, int]:
    return {
        "score_evaluations": sampler.score_evaluations,
        "score_backwards": sampler.score_backwards,
        "guidance_gradients": sampler.guidance_gradients,
        "guided_calls": sum(bool(step.predictor) + bool(step.corrector) for step in sampler.steps),
    }
