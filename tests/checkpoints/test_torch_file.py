"""The reader of torch.save's files: what torch.load gives on honest ones, one line on all others."""

import argparse
import pathlib
import struct
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dgfast.checkpoints import torch_file
from dgfast.checkpoints.torch_file import Opaque
from dgfast.errors import UserError
from tests.support.mutations import members, zipped

BOTH = pytest.mark.parametrize("as_zip", [True, False], ids=["zip", "legacy"])
OLD = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool complex64 complex128"
NEW = "uint16 uint32 uint64 float8_e4m3fn float8_e5m2"  # which the older format cannot hold


def saved(path: Path, content: Any, as_zip: bool = True, **options: Any) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=as_zip, **options)
    return path


def refused(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        torch_file.read(path)
    assert caught.value.message.isprintable() and path.name in caught.value.message
    return caught.value.message


def same(found: Any, wanted: Any) -> bool:
    """Whether these are the same bits in the same layout."""
    layout = [(t.dtype, t.shape, t.stride(), t.storage_offset()) for t in (found, wanted)]
    raw = [t.detach().contiguous().flatten().view(torch.uint8) for t in (found, wanted)]
    return type(found) is Tensor and layout[0] == layout[1] and torch.equal(*raw)


# Honest files ---------------------------------------------------------------------------------------------------------
@BOTH
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_tensors_are_those_of_torch_load(tmp_path: Path, as_zip: bool, protocol: int) -> None:
    base = torch.arange(60.0).view(3, 4, 5)
    content = {name: (torch.rand(3, 4) * 50).to(getattr(torch, name)) for name in (OLD + " " + NEW * as_zip).split()}
    content |= {"whole": base, "rows": base[1:], "turned": base.permute(2, 0, 1), "every_other": base[:, ::2]}
    content |= {"empty": torch.zeros(0), "no_rows": torch.zeros(3, 0, 2), "scalar": torch.tensor(5.0)}
    content |= {"parameter": nn.Parameter(base[0].clone().bfloat16())}
    path = saved(tmp_path / "x.pt", content, as_zip, pickle_protocol=protocol)
    found, wanted = torch_file.read(path), torch.load(path, weights_only=False)
    assert isinstance(found, dict) and list(found) == list(wanted)
    assert all(same(found[name], tensor) for name, tensor in wanted.items())
    views = [found[name].untyped_storage().data_ptr() for name in ("whole", "rows", "turned", "every_other")]
    assert len(set(views)) == 1, "they shared their storage when they were saved"


@BOTH
@pytest.mark.parametrize("protocol", [2, 5])
def test_plain_values_come_back(tmp_path: Path, as_zip: bool, protocol: int) -> None:
    content = {
        "ordered": OrderedDict(a=1, b=2.5), "default": defaultdict(list, {3: [1]}), "set": {1, "a"}, "frozen": {2},
        "tuple": (1, 2, (3,)), "bytes": b"abc\xff", "big": 2**70, "negative": -5, "long": -(2**40), "none": None,
        "yes": True, "text": "ä\ud800𝄞", "size": torch.Size([1, 2]), "list": [], 7: 1.5, None: 0,
    }  # fmt: skip
    path = saved(tmp_path / "x.pt", content | {"frozen": frozenset({2})}, as_zip, pickle_protocol=protocol)
    found = torch_file.read(path)
    assert found == content
    assert isinstance(found, dict) and {type(value) for value in found.values()} <= {
        dict, set, tuple, bytes, int, type(None), bool, str, list, float,
    }  # fmt: skip


@BOTH
def test_training_checkpoints_are_read_with_what_is_unknown_left_opaque(tmp_path: Path, as_zip: bool) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.zeros(1, 3, 5, 5)).sum().backward()
    optimizer.step()
    arguments = argparse.Namespace(lr=1e-4, device=torch.device("cpu"), results=pathlib.Path("x"), net=net)
    content = {"model": net.state_dict(), "opt": optimizer.state_dict(), "args": arguments, "type": torch.float16}
    content |= {"whole": net, "sparse": torch.eye(3).to_sparse(), "expanded": torch.zeros(1).expand(10**9)}
    content |= {"conjugated": torch.zeros(2, dtype=torch.complex64).conj(), "by": {(1, 2): 3}, "by2": {(1, 2)}}
    found: Any = torch_file.read(saved(tmp_path / "x.pt", content, as_zip))
    assert all(same(found["model"][name], tensor) for name, tensor in net.state_dict().items())
    for index, state in optimizer.state_dict()["state"].items():
        assert all(same(found["opt"]["state"][index][name], tensor) for name, tensor in state.items())
    assert found["opt"]["param_groups"][0]["betas"] == (0.9, 0.999)
    names = {"args": "argparse.Namespace", "type": "torch.float16", "whole": "torch.nn.modules.container.Sequential"}
    names |= {"sparse": "torch._utils._rebuild_sparse_tensor"}
    assert all(isinstance(found[name], Opaque) and found[name].name == known for name, known in names.items())
    assert all(isinstance(found[name], Opaque) for name in ("expanded", "conjugated"))
    assert list(found["by"].values()) == [3] and len(found["by2"]) == 1


def test_checksums_may_be_left_out_but_not_wrong(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        path = saved(tmp_path / "x.pt", {"a": torch.ones(50)})
    finally:
        torch.serialization.set_crc32_options(True)
    assert same(torch_file.read(path)["a"], torch.ones(50))  # type: ignore[index]
    raw = saved(tmp_path / "y.pt", {"a": torch.ones(50)}).read_bytes()
    path.write_bytes(raw.replace(struct.pack("<4f", 1, 1, 1, 1), struct.pack("<4f", 1, 1, 0, 1), 1))
    assert "damaged" in refused(path)


def test_names_of_archive_and_storages_may_be_any(tmp_path: Path) -> None:
    path = saved(tmp_path / "模型 äö.pt", {"a": torch.ones(5)})
    assert same(torch_file.read(path)["a"], torch.ones(5))  # type: ignore[index]


# Other files ----------------------------------------------------------------------------------------------------------
@pytest.fixture
def content(tmp_path: Path) -> dict[str, bytes]:
    """The members of an honest file."""
    with zipfile.ZipFile(saved(tmp_path / "honest.pt", {"a": torch.ones(4)})) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        pytest.param({"method": 8, "local_method": 8}, "is compressed or encrypted", id="compressed"),
        pytest.param({"local_method": 8}, "another than its zip directory says", id="compressed_in_secret"),
        pytest.param({"flags": 1}, "is compressed or encrypted", id="encrypted"),
        pytest.param({"data": bytes(17), "size": 17, "packed": 17, "crc": 0}, "17 bytes where 16", id="long"),
        pytest.param({"size": 15, "packed": 15, "crc": 0}, "15 bytes where 16 are announced", id="short"),
        pytest.param({"size": 2**20, "packed": 2**20}, "overlap, or reach beyond", id="beyond"),
        pytest.param({"offset": 0}, "another than its zip directory says", id="other_place"),
        pytest.param({"name": b"honest/data.pkl"}, "two members", id="twice"),
        pytest.param({"name": b"honest/data/9"}, "KeyError", id="other_name"),
        pytest.param({"crc": 5}, "damaged", id="checksum"),
        pytest.param({"extra": struct.pack("<2H3Q", 1, 24, *[2**40] * 3), "size": 2**32 - 1, "packed": 2**32 - 1},
                     "overlap, or reach beyond", id="zip64"),
    ],
)  # fmt: skip
def test_members_that_lie_are_refused(
    tmp_path: Path, content: dict[str, bytes], changes: dict[str, Any], complaint: str
) -> None:
    entries = members(content)
    next(entry for entry in entries if entry["name"] == b"honest/data/0").update(changes)
    (tmp_path / "x.pt").write_bytes(zipped(entries))
    assert complaint in refused(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        pytest.param({"honest/constants.pkl": b""}, "a program (TorchScript)", id="torchscript"),
        pytest.param({"honest/byteorder": b"big"}, "little-endian", id="byteorder"),
        pytest.param({"other/data.pkl": b"N."}, "not one data.pkl", id="two_programs"),
        pytest.param({"honest/data.pkl": b"\x80\x02cos\nsystem\n."}, "global 'os.system', which runs", id="hostile"),
        pytest.param({"honest/data.pkl": b"\x80\x02c__builtin__\neval\n."}, "'__builtin__.eval', which", id="eval"),
        pytest.param({"honest/data.pkl": b"\x80\x02" + b"c" + b"a" * 300 + b"\n\n."}, "proper name", id="name"),
        pytest.param({"honest/data.pkl": b"\x80\x02}" + b"X\x11\x27\0\0" + b"a" * 10_001 + b"Ns."}, "name", id="key"),
        pytest.param({"honest/data.pkl": b"\x80\x02}"}, "cut short", id="torn"),
        pytest.param({"honest/data.pkl": b"\x80\x020."}, "opcode POP", id="opcode"),
    ],
)
def test_archives_of_something_else_are_named(
    tmp_path: Path, content: dict[str, bytes], changes: dict[str, bytes], complaint: str
) -> None:
    (tmp_path / "x.pt").write_bytes(zipped(members(content | changes)))
    assert complaint in refused(tmp_path / "x.pt")


@BOTH
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9, 0.999])
def test_torn_files_are_refused(tmp_path: Path, as_zip: bool, share: float) -> None:
    path = saved(tmp_path / "x.pt", {"a": torch.ones(1000)}, as_zip)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert "is not a file of tensors" in refused(path)


@BOTH
def test_appended_bytes_are_refused(tmp_path: Path, as_zip: bool) -> None:
    path = saved(tmp_path / "x.pt", {"a": torch.ones(1000)}, as_zip)
    path.write_bytes(path.read_bytes() + b"a")
    assert "is not a file of tensors" in refused(path)
