"""Many seeds, batch by batch: everything arrives once and in order, whatever runs out or goes wrong on the way."""

import threading
import weakref
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dgfast.batches import draw
from dgfast.chunks import Chunks
from dgfast.config import SamplingConfig
from dgfast.errors import StorageError, UserError
from dgfast.networks import Networks
from dgfast.outputs import Drawn, Fetcher
from dgfast.ranges import Ranges
from dgfast.sampler import Sampler

WAIT = 20.0  # seconds after which what should happen at the same time counts as never happening


class Memory:
    """Something that a batch holds while it is sampled."""


class StandIn:
    """A sampler whose images show their seed (0 to 255) and their class, and which fails as it is told.

    Args:
        fits: images that memory holds. fail: what happens above that. classes: as of a conditional net; 0: none.
    """

    device = torch.device("cpu")

    def __init__(self, fits: int = 10**6, fail: Callable[[], Any] = lambda: None, classes: int = 0) -> None:
        self.fits, self.fail, self.classes = fits, fail, classes
        self.batches: list[list[int]] = []
        self.held: list[weakref.ref[Memory]] = []
        self.built: set[int] = set()

    def __call__(self, seeds: Sequence[int], labels: Tensor | None, on_step: Callable[..., None] | None) -> Tensor:
        assert not any(memory() for memory in self.held), "a batch that did not fit is still in memory"
        self.batches.append(list(seeds))
        self.built.add(len(seeds))
        holding = Memory()
        self.held.append(weakref.ref(holding))
        if on_step is not None:
            on_step(len(self.batches), torch.zeros(()), None, None)
        if len(seeds) > self.fits:
            self.fail()
        shown = torch.zeros(len(seeds)) if labels is None else labels.float()
        images = torch.stack([torch.as_tensor(list(seeds)).float(), shown], dim=1)
        return ((images - 128) / 127.5).view(-1, 1, 1, 2)

    def forget(self) -> None:
        self.built.clear()

    def draw_labels(self, seeds: Sequence[int]) -> Tensor | None:
        return torch.tensor([seed % self.classes for seed in seeds]) if self.classes else None


class Sink:
    """What `draw` wrote."""

    def __init__(self) -> None:
        self.seeds: list[int] = []
        self.classes: list[int] = []
        self.sizes: list[int] = []

    def __call__(self, drawn: Drawn) -> None:
        images, seeds, labels = drawn.arrays["images"], list(drawn.chunk.seeds), drawn.labels
        assert images.dtype == np.uint8 and images.shape == (len(seeds), 1, 2, 1)
        assert images[:, 0, 0, 0].tolist() == seeds  # the images are those of these seeds
        assert images[:, 0, 1, 0].tolist() == ([0] * len(seeds) if labels is None else labels.tolist())
        self.seeds += seeds
        self.sizes.append(len(seeds))
        self.classes += [] if labels is None else labels.tolist()


def chunks(seeds: Sequence[int], size: int, labels: Sequence[int] | None = None) -> Chunks:
    return Chunks(Ranges.of(seeds), None if labels is None else Ranges.of(labels), size)


def out_of_device_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def out_of_host_memory() -> None:
    torch.empty(2**60, dtype=torch.uint8)  # what the CPU's allocator says to that is what `draw` must understand


def broken() -> None:
    raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


# Everything, once, in order -------------------------------------------------------------------------------------------
@given(
    seeds=st.lists(st.integers(0, 255), min_size=1, max_size=40),
    size=st.integers(1, 45),
    batch=st.integers(1, 45),
    fits=st.integers(1, 45),
    static=st.booleans(),
    labelled=st.sampled_from(["none", "given", "drawn"]),
)
def test_batches_deliver_every_seed_once_and_in_order(
    seeds: list[int], size: int, batch: int, fits: int, static: bool, labelled: str
) -> None:
    sampler, sink = StandIn(fits, out_of_device_memory, classes=3 if labelled == "drawn" else 0), Sink()
    labels = [(7 * k) % 5 for k in range(len(seeds))] if labelled == "given" else None
    smaller: list[int] = []
    job = chunks(seeds, size, labels)
    draw(sampler, job, batch, sink, static=static, on_smaller_batch=smaller.append)  # type: ignore[arg-type]
    assert sink.seeds == seeds and sink.sizes == [len(chunk.seeds) for chunk in job]  # whatever the batch
    assert sink.classes == {"none": [], "given": labels, "drawn": [seed % 3 for seed in seeds]}[labelled]
    asked = [batch, *smaller]
    assert all(after < before for before, after in pairwise(asked))
    assert len(smaller) == sum(len(made) > fits for made in sampler.batches)  # never without need
    if static:
        assert {len(made) for made in sampler.batches} <= set(asked)


def test_batches_are_full_but_for_the_last() -> None:
    for static, last in ((False, [6, 7]), (True, [6, 7, 7])):
        sampler, sink = StandIn(), Sink()
        draw(sampler, chunks(range(8), 3), 3, sink, static=static)  # type: ignore[arg-type]
        assert sampler.batches == [[0, 1, 2], [3, 4, 5], last]
        assert sink.sizes == [3, 3, 2]
    draw(sampler := StandIn(), chunks(range(4), 3), 3, Sink())  # type: ignore[arg-type]
    assert sampler.batches == [[0, 1, 2], [3]], "filled up although nobody asked for it"


def test_batches_pass_every_step_on() -> None:
    seen: list[Any] = []
    draw(StandIn(), chunks(range(5), 2), 2, Sink(), on_step=lambda step, *_: seen.append(step))  # type: ignore[arg-type]
    assert seen == [1, 2, 3]


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("labels", [None, [2, 0, 3, 1, 0]], ids=["drawn", "given"])
def test_batches_of_a_real_sampler_are_its_images(
    tiny_net: Callable[..., Any], labels: list[int] | None, static: bool
) -> None:
    sampler, seeds = Sampler(Networks(tiny_net(label_dim=4)), SamplingConfig(num_steps=3)), [9, 4, 4, 0, 77]
    written: list[Drawn] = []
    draw(sampler, chunks(seeds, 2, labels), 2, written.append, static=static)
    images, drawn = sampler(seeds, labels), sampler.draw_labels(seeds)
    assert drawn is not None
    assert [seed for part in written for seed in part.chunk.seeds] == seeds
    pixels = np.concatenate([part.arrays["images"] for part in written]).astype(float)
    exact = (images * 127.5 + 128).clip(0, 255).permute(0, 2, 3, 1).double().numpy()
    assert np.abs(pixels + 0.5 - exact).max() < 0.51  # uint8 cuts off
    classes = np.concatenate([part.labels for part in written if part.labels is not None])
    assert classes.tolist() == (drawn.tolist() if labels is None else labels)


# Out of memory --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("fail", [out_of_device_memory, out_of_host_memory])
@pytest.mark.parametrize("static", [False, True])
def test_batches_out_of_memory_are_halved_and_nothing_is_lost(fail: Callable[[], None], static: bool) -> None:
    sampler, sink, smaller = StandIn(3, fail), Sink(), list[int]()
    draw(sampler, chunks(range(10), 8), 8, sink, static=static, on_smaller_batch=smaller.append)  # type: ignore[arg-type]
    assert smaller == [4, 2]
    assert sampler.built == {2}, "what was built for batches that do not fit is still there"
    assert sink.seeds == list(range(10)) and sink.sizes == [8, 2]  # files do not depend on what fits


def test_batches_out_of_memory_later_on_keep_what_was_made() -> None:
    sampler, sink, smaller = StandIn(), Sink(), list[int]()

    def on_step(step: Any, *_: Any) -> None:
        sampler.fits = 4 if step < 3 else 2  # memory shrinks from the third batch on
        sampler.fail = out_of_device_memory

    job = chunks(range(12), 4)
    draw(sampler, job, 4, sink, on_step=on_step, on_smaller_batch=smaller.append)  # type: ignore[arg-type]
    assert smaller == [2] and [len(made) for made in sampler.batches] == [4, 4, 4, 2, 2]
    assert sink.seeds == list(range(12)) and sink.sizes == [4, 4, 4]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_batches_out_of_memory_become_as_large_as_can_be(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """Half of five is three; and what PyTorch holds on a GPU of the larger batch's sizes is given back."""
    emptied: list[int] = []
    sampler, smaller = StandIn(2, out_of_device_memory), list[int]()
    sampler.device = torch.device(device)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(len(sampler.batches[-1])))
    draw(sampler, chunks(range(5), 5), 5, Sink(), on_smaller_batch=smaller.append)  # type: ignore[arg-type]
    assert smaller == [3, 2] and emptied == ([5, 3] if device == "cuda" else [])


@pytest.mark.parametrize("fail", [out_of_device_memory, out_of_host_memory])
def test_batches_of_one_image_that_do_not_fit_raise(fail: Callable[[], None]) -> None:
    sampler = StandIn(0, fail)
    with pytest.raises(UserError, match="out of memory: not even one image fits"):
        draw(sampler, chunks(range(4), 4), 4, Sink())  # type: ignore[arg-type]
    assert [len(made) for made in sampler.batches] == [4, 2, 1]


def test_batches_that_fail_for_another_reason_raise_at_once_and_keep_what_was_made() -> None:
    sampler, sink = StandIn(), Sink()

    def on_step(step: Any, *_: Any) -> None:
        if step == 3:
            sampler.fits, sampler.fail = 0, broken

    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        draw(sampler, chunks(range(10), 2), 2, sink, on_step=on_step)  # type: ignore[arg-type]
    assert len(sampler.batches) == 3 and sink.seeds == [0, 1, 2, 3]


def test_batches_of_bad_labels_are_refused(tiny_net: Callable[..., Any]) -> None:
    sampler = Sampler(Networks(tiny_net(label_dim=4)), SamplingConfig(num_steps=2))
    with pytest.raises(UserError, match="label 4 is out of range"):
        draw(sampler, chunks([1, 2], 2, [0, 4]), 2, Sink())


# Writing --------------------------------------------------------------------------------------------------------------
def test_batches_are_written_while_the_next_one_is_sampled() -> None:
    sampling_second, second_may_end = threading.Event(), threading.Event()
    order: list[str] = []

    def on_step(step: Any, *_: Any) -> None:
        order.append(f"sample {step}")
        if step == 2:
            sampling_second.set()
            assert second_may_end.wait(WAIT), "the first batch was not written while the second was sampled"

    def write(drawn: Drawn) -> None:
        if drawn.chunk.index == 0:
            assert sampling_second.wait(WAIT), "the second batch was not sampled while the first was written"
            order.append("write 1")
            second_may_end.set()

    draw(StandIn(), chunks(range(4), 2), 2, write, on_step=on_step)  # type: ignore[arg-type]
    assert order == ["sample 1", "sample 2", "write 1"]


def test_batches_wait_for_a_slow_writer() -> None:
    """No more than one batch waits to be written, and the last one is on the disk when `draw` returns."""
    writing, finished, begun = threading.Lock(), [], []

    def write(drawn: Drawn) -> None:
        assert writing.acquire(blocking=False), "two batches are written at once"
        threading.Event().wait(0.02)
        finished.append(drawn.chunk.seeds[0])
        writing.release()

    def on_step(step: int, *_: Any) -> None:
        begun.append(step)
        assert len(finished) >= step - 2  # batch k + 2 is sampled once batch k is written

    draw(StandIn(), chunks(range(6), 1), 1, write, on_step=on_step)  # type: ignore[arg-type]
    assert finished == list(range(6)) and len(begun) == 6


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_batches_that_cannot_be_written_raise(bad: int) -> None:
    sampler, written = StandIn(), []

    def write(drawn: Drawn) -> None:
        if drawn.chunk.index == bad:
            raise OSError("No space left on device")
        written.append(drawn.chunk.index)

    with pytest.raises(OSError, match="No space left"):
        draw(sampler, chunks(range(6), 2), 2, write)  # type: ignore[arg-type]
    assert written == list(range(bad))
    assert len(sampler.batches) <= bad + 2  # and sampling stops


def test_batches_tell_users_once_what_could_not_be_written() -> None:
    def write(drawn: Drawn) -> None:
        raise StorageError("out/: No space left on device")

    for count in (2, 4):  # noticed at the end, and while there is more to sample
        with pytest.raises(StorageError, match=r"^out/: No space left on device$") as error:
            draw(StandIn(), chunks(range(count), 2), 2, write)  # type: ignore[arg-type]
        assert error.value.__cause__ is None


def test_batches_say_what_could_not_be_written_even_if_the_next_one_fails() -> None:
    sampler, sampling_second = StandIn(), threading.Event()

    def on_step(step: Any, *_: Any) -> None:
        if step == 2:
            sampler.fits, sampler.fail = 0, broken
            sampling_second.set()

    def write(drawn: Drawn) -> None:
        assert sampling_second.wait(WAIT)
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left") as error:
        draw(sampler, chunks(range(6), 2), 2, write, on_step=on_step)  # type: ignore[arg-type]
    assert "mat1 and mat2" in str(error.value.__cause__)


def test_batches_tell_users_both_what_could_not_be_written_and_why_the_next_one_failed() -> None:
    """In one line, which is all that the command line shows; its exit code is that of the folder."""
    sampling_second = threading.Event()

    def on_step(step: Any, *_: Any) -> None:
        if step == 2:
            sampling_second.set()
            raise UserError("the images became NaN")

    def write(drawn: Drawn) -> None:
        assert sampling_second.wait(WAIT)
        raise StorageError("out/: No space left on device")

    with pytest.raises(StorageError) as error:
        draw(StandIn(), chunks(range(6), 2), 2, write, on_step=on_step)  # type: ignore[arg-type]
    wanted = "out/: No space left on device; and then the next batch failed: the images became NaN"
    assert error.value.message == wanted


def test_batches_stopped_by_the_user_say_what_could_not_be_written_alone() -> None:
    sampling_second = threading.Event()

    def on_step(step: Any, *_: Any) -> None:
        if step == 2:
            sampling_second.set()
            raise KeyboardInterrupt

    def write(drawn: Drawn) -> None:
        assert sampling_second.wait(WAIT)
        raise StorageError("out/: No space left on device")

    with pytest.raises(StorageError, match=r"^out/: No space left on device$"):
        draw(StandIn(), chunks(range(6), 2), 2, write, on_step=on_step)  # type: ignore[arg-type]


def test_batches_of_latents_are_decoded_on_their_way() -> None:
    written: list[Drawn] = []
    fetcher = Fetcher(lambda z: torch.zeros(len(z), 3, 4, 4), latents=True)
    draw(StandIn(fits=2, fail=out_of_device_memory), chunks(range(3), 3), 3, written.append, fetcher=fetcher)  # type: ignore[arg-type]
    (drawn,) = written
    assert drawn.arrays["images"].shape == (3, 4, 4, 3) and drawn.arrays["latents"].shape == (3, 1, 1, 2)
