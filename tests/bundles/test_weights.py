"""Weights and the networks that they fit: what a file or its keywords claim is judged before memory is taken."""

import json
import struct
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dgfast import bounds, nets, weights
from dgfast.errors import UserError

TINY: dict[str, Any] = {
    "img_resolution": 8, "img_channels": 1, "label_dim": 0, "model_type": "SongUNet",
    "model_channels": 8, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": [8],
}  # fmt: skip


def written(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file, as if by hand: `header` as JSON, or the text itself."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(shape: list[Any], begin: Any = 0, end: Any = 16, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_whole_file_is_read(tmp_path: Path) -> None:
    path = written(
        tmp_path / "x.safetensors", {"__metadata__": {"a": "b"}, "w": entry([2, 2])}, struct.pack("<4f", *range(4))
    )
    assert torch.equal(weights.read_tensors(path)["w"], torch.arange(4.0).view(2, 2))


@pytest.mark.parametrize(
    ("header", "complaint"),
    [
        pytest.param({"pos_embed": entry([1, 16777216, 0], 0, 0)}, "no network has a tensor without elements", id="0"),
        pytest.param({"w": entry([-2, -2])}, "without elements", id="negative"),
        pytest.param({"w": entry([2**40])}, "has not so many bytes", id="huge"),
        pytest.param({"w": entry([2**62, 2**62])}, "has not so many bytes", id="overflow"),
        pytest.param({"w": entry([4], 16, 32)}, "has not so many bytes", id="behind_the_end"),
        pytest.param({"w": entry([4], 16, 0)}, "has not so many bytes", id="backwards"),
        pytest.param({"w": entry([1] * 9)}, "no tensor that networks have", id="axes"),
        pytest.param({"w": entry([4.0])}, "no tensor that networks have", id="float"),
        pytest.param({"w": entry([True, 4])}, "no tensor that networks have", id="bool"),
        pytest.param({"w": entry([4], dtype="C64")}, "no tensor that networks have", id="complex"),
        pytest.param({"w": entry([4], dtype=["F32"])}, "not a readable safetensors file", id="dtype_list"),
        pytest.param({"w\x1b[2J": entry([4])}, "no tensor that networks have", id="control"),
        pytest.param({"w" * 301: entry([4])}, "no tensor that networks have", id="long_name"),
        pytest.param({"w": None}, "not a readable safetensors file", id="null"),
        pytest.param([], "not a readable safetensors file", id="list"),
        pytest.param(b"[" * 10_000, "nested too deeply", id="nested"),
        pytest.param(b'{"w": 1, "w": 2}', "a name stands twice", id="twice"),
        pytest.param(b'{"w": NaN}', "no number of JSON", id="nan"),
        pytest.param({"w": entry([2]), "v": entry([4])}, "not a readable safetensors file", id="overlap"),
    ],
)
def test_headers_that_lie_are_refused(tmp_path: Path, header: Any, complaint: str) -> None:
    path = written(tmp_path / "x.safetensors", header, bytes(16))
    with pytest.raises(UserError, match=complaint) as caught:
        weights.read_tensors(path)
    assert caught.value.message.isprintable()


@pytest.mark.parametrize("length", [2**63, 2**40, 9 * 2**20])
def test_headers_of_a_lying_length_are_not_read(tmp_path: Path, length: int) -> None:
    path = written(tmp_path / "x.safetensors", b" " * 9 * 2**20 * (length < 2**30), length=length)
    with pytest.raises(UserError, match=r"cut short|more than 8,388,608 bytes"):
        weights.read_tensors(path)


@contextmanager
def little_memory() -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        pytest.param({"model_channels": 10**7}, "100,000 is the most", id="width"),
        pytest.param({"model_channels": 10**5}, "misshapen", id="too_wide_for_the_weights"),
        pytest.param({"num_blocks": 10**5}, "far more tensors than its weights", id="depth"),
        pytest.param({"model_channels": "a" * 100, "channel_mult_emb": 10**5}, "make no EDMPrecond", id="text_times"),
        pytest.param({"channel_mult": [1] * 10**6}, "a short list", id="list"),
        pytest.param({"channel_mult": [[1]]}, "a short list", id="nested"),
        pytest.param({"img_resolution": 10**5}, "4,096 is the most", id="resolution"),
        pytest.param({"embedding_type": "a" * 10**6}, "100 is the most", id="word"),
        pytest.param({"model_channels": 10**400}, "100,000 is the most", id="long_number"),
        pytest.param({"num_blocks": 2}, "missing model.enc.8x8_block1", id="missing"),
        pytest.param({"colour\x1b": 1}, "make no EDMPrecond", id="unknown"),
    ],
)
def test_keywords_of_another_network_take_no_memory(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], complaint: str
) -> None:
    monkeypatch.setattr(bounds, "MISSING_TENSORS", 300)  # what counts memory is slow
    tensors = nets.build("EDMPrecond", **TINY).state_dict()
    with little_memory(), pytest.raises(UserError, match=complaint) as caught:
        weights.build("EDMPrecond", TINY | changes, tensors, "x.safetensors")
    assert caught.value.message.isprintable() and "x.safetensors" in caught.value.message


@pytest.mark.parametrize(
    "kind, keywords",
    [("iDDPMPrecond", {"M": 10**5}), ("DDPMPrecond", {"model_type": "DiT", "steps": 10**5})],
    ids=["iddpm", "ddpm"],
)
def test_noise_levels_are_bounded(kind: str, keywords: dict[str, Any]) -> None:
    base = {name: TINY[name] for name in ("img_resolution", "img_channels", "label_dim")}
    more = TINY if kind == "iDDPMPrecond" else base | {"hidden_size": 8, "num_heads": 2, "depth": 1}
    with pytest.raises(UserError, match=r"10,000|100000 steps"):
        weights.build(kind, more | keywords, {}, "x.safetensors")


@pytest.mark.parametrize("kind", ["EDMPrecond", "VPPrecond", "VEPrecond", "iDDPMPrecond"])
def test_networks_are_built_as_by_hand(kind: str) -> None:
    torch.manual_seed(3)
    net = nets.build(kind, **TINY)
    built = weights.build(kind, TINY, net.state_dict(), "x")
    assert all(torch.equal(built.state_dict()[name], tensor) for name, tensor in net.state_dict().items())
    assert (built.sigma_min, built.sigma_max) == (net.sigma_min, net.sigma_max)


def test_tensors_that_are_one_and_the_same_are_refused() -> None:
    """A file of a megabyte could name one storage ten thousand times, and each parameter would be a copy of it."""
    honest = nets.build("EDMPrecond", **TINY).state_dict()
    base = torch.zeros(max(tensor.numel() for tensor in honest.values()))
    views: dict[str, Tensor] = {name: base[: tensor.numel()].view(tensor.shape) for name, tensor in honest.items()}
    with pytest.raises(UserError, match="views of the same few bytes"):
        weights.build("EDMPrecond", TINY, views, "x.pt")
