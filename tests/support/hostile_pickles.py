"""Hostile pickles and files of torch.save by hand, see `hostile_files`."""

import io
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dgfast import nets
from tests.support.mutations import members, zipped

_RAW_DIT = {"input_size": 8, "patch_size": 2, "hidden_size": 16, "depth": 1, "num_heads": 2, "num_classes": 3}
ATTACKS: dict[str, Callable[[Path], Path]] = {}


def attack(write: Callable[[Path], Path]) -> Callable[[Path], Path]:
    ATTACKS[write.__name__.removeprefix("_")] = write
    return write


# Pickles --------------------------------------------------------------------------------------------------------------
def _text(content: str | bytes) -> bytes:
    raw = content.encode() if isinstance(content, str) else content
    return b"X" + struct.pack("<I", len(raw)) + raw


def _blob(content: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(content)) + content


def _pkl(folder: Path, program: bytes) -> Path:
    path = folder / "x.pkl"
    path.write_bytes(b"\x80\x04" + program + b".")
    return path


def _pt(folder: Path, program: bytes, storages: dict[str, bytes] | None = None) -> Path:
    content = {"x/data.pkl": b"\x80\x02" + program + b".", "x/byteorder": b"little", "x/version": b"3\n"}
    path = folder / "x.pt"
    path.write_bytes(zipped(members(content | {f"x/data/{key}": raw for key, raw in (storages or {}).items()})))
    return path


_OBJECT = b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n"


@attack
def _nested_tuples(folder: Path) -> Path:
    return _pkl(folder, b")" + b"\x85" * 5_000_000)


@attack
def _empty_sets(folder: Path) -> Path:
    return _pt(folder, b"(" + b"\x8f" * 5_000_000 + b"l")


@attack
def _marks(folder: Path) -> Path:
    return _pt(folder, b"(" * 3_900_000)


@attack
def _memo(folder: Path) -> Path:
    return _pt(folder, b"]" + b"\x94" * 3_900_000)


@attack
def _dicts(folder: Path) -> Path:
    return _pt(folder, b"]q\x00(" + b"}" * 3_900_000 + b"e")


@attack
def _colliding_keys(folder: Path) -> Path:
    """Integers whose hashes are all 0."""
    keys = (i * (2**61 - 1) for i in range(1, 80_000))
    return _pt(folder, b"}(" + b"".join(b"\x8a\x0b" + k.to_bytes(11, "little") + b"N" for k in keys) + b"u")


def _entries(**values: bytes) -> bytes:
    """A dict of programs' values, one after the other."""
    return b"}" + b"".join(_text(name) + value + b"s" for name, value in values.items())


def _listed(program: bytes, count: int) -> bytes:
    return b"](" + program * count + b"e"


@attack
def _one_list_into_many_sets(folder: Path) -> Path:
    items = b"](" + b"".join(_text(str(i)) for i in range(60_000)) + b"e\x85q\x01"
    calls = _listed(b"h\x02h\x01R", 300_000)
    return _pkl(folder, _entries(a=items, b=b"cbuiltins\nset\nq\x02", c=calls))


@attack
def _one_list_into_many_dicts(folder: Path) -> Path:
    items = b"](" + b"".join(_text(str(i)) + b"N\x86" for i in range(60_000)) + b"e\x85q\x01"
    calls = _listed(b"h\x02h\x01R", 100_000)
    return _pt(folder, _entries(a=items, b=b"ccollections\nOrderedDict\nq\x02", c=calls))


def _object(class_name: str, state: bytes) -> bytes:
    """A persistent object of that state, once `_OBJECT` was memoized as 2."""
    return b"h\x02" + _entries(type=_text("class"), class_name=_text(class_name), state=state) + b"\x85R"


@attack
def _one_state_for_many_objects(folder: Path) -> Path:
    state = b"}(" + b"".join(_text(str(i)) + b"N" for i in range(60_000)) + b"uq\x01"
    objects = _listed(_object("A", b"}") + b"h\x01b", 30_000)
    return _pkl(folder, _entries(a=state, b=_OBJECT + b"q\x02", c=objects))


@attack
def _one_dict_of_names_in_many_modules(folder: Path) -> Path:
    names = b"}(" + b"".join(_text(str(i)) + b"N" for i in range(60_000)) + b"uq\x01"
    shared = _object("A", _entries(_parameters=b"h\x01"))
    children = b"}(" + b"".join(_text(f"m{i}") + shared for i in range(30_000)) + b"u"
    raw = _object("SongUNet", _entries(_modules=children))
    net = _object("EDMPrecond", _entries(_init_kwargs=b"}", _modules=_entries(model=raw)))
    return _pkl(folder, _entries(a=names, b=_OBJECT + b"q\x02", ema=net))


@attack
def _one_storage_many_times(folder: Path) -> Path:
    buffer = io.BytesIO()
    torch.save(torch.zeros(10**6)._typed_storage(), buffer, _use_new_zipfile_serialization=False)
    load = b"ctorch.storage\n_load_from_bytes\nq\x00" + _blob(buffer.getvalue()) + b"\x85q\x01"
    return _pkl(folder, load + b"](" + b"h\x00h\x01R" * 50_000 + b"e")


@attack
def _comparison_of_doubled_tuples(folder: Path) -> Path:
    """Tuples of the one before, twice: 2^60 leaves in 60 steps, compared with another such in a storage's keys."""
    tower = b")" + b"q\x00h\x00\x86" * 60
    identity = b"(" + _text("storage") + b"ctorch\nFloatStorage\n" + tower + _text("cpu") + b"K\x00NtQ"
    programs = [b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19", b"M\xe9\x03", b"}" + _text("little_endian") + b"\x88s", identity]
    content = b"".join(b"\x80\x02" + program + b"." for program in (*programs, b"](" + tower + b"e")) + bytes(8)
    return _pkl(folder, b"ctorch.storage\n_load_from_bytes\n" + _blob(content) + b"\x85R")


@attack
def _key_of_doubled_tuples(folder: Path) -> Path:
    return _pt(folder, b"}" + b")" + b"q\x00h\x00\x86" * 60 + b"Ns")


@attack
def _deep_modules(folder: Path) -> Path:
    before, after = _object("SongUNet", _entries(_modules=b"}" + _text("a") + b"|s")).split(b"|")
    raw = before * 20_000 + _object("SongUNet", b"}") + after * 20_000
    net = _object("EDMPrecond", _entries(_init_kwargs=b"}", _modules=_entries(model=raw)))
    return _pkl(folder, _entries(b=_OBJECT + b"q\x02", ema=net))


@attack
def _long_names_of_many_tensors(folder: Path) -> Path:
    """Modules within modules, and in the last of them many tensors, each with all of their names in its own."""
    storage = io.BytesIO()
    torch.save(torch.zeros(1)._typed_storage(), storage, _use_new_zipfile_serialization=False)
    load = b"ctorch.storage\n_load_from_bytes\n" + _blob(storage.getvalue()) + b"\x85R"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + load + b"K\x00))\x89NtRq\x03"
    tensors = b"}(" + b"".join(_text(str(i)) + b"h\x03" for i in range(200_000)) + b"u"
    before, after = _object("A", _entries(_modules=b"}" + _text("a" * 80) + b"|s")).split(b"|")
    raw = before * 300 + _object("SongUNet", _entries(_parameters=tensors)) + after * 300
    net = _object("EDMPrecond", _entries(_init_kwargs=b"}", _modules=_entries(model=raw)))
    return _pkl(folder, _entries(a=tensor, b=_OBJECT + b"q\x02", ema=net))


@attack
def _wide_letters(folder: Path) -> Path:
    """One letter beyond the others makes each of them take four bytes."""
    return _pt(folder, b"](" + _text("a" * 16_000_000 + "\U0001f600") * 6 + b"e")


@attack
def _names_that_cannot_be_shown(folder: Path) -> Path:
    return _pt(folder, _text("\x1b" * 70) + b"q\x00" + b"](" + b"h\x00h\x00\x93" * 1_200_000 + b"e")


@attack
def _many_tensors(folder: Path) -> Path:
    storage = b"(" + _text("storage") + b"ctorch\nFloatStorage\n" + _text("0") + _text("cpu") + b"K\x01tQ"
    arguments = b"(" + storage + b"K\x00))\x89Ntq\x01"
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\nq\x00"
    return _pt(folder, arguments + rebuild + b"](" + b"h\x00h\x01R" * 900_000 + b"e", {"0": bytes(4)})


@attack
def _one_tensor_under_many_names(folder: Path) -> Path:
    tensors: dict[str, Any] = dict(nets.build("DiT", **_RAW_DIT | {"depth": 200}).state_dict())
    base = torch.zeros(max(tensor.numel() for tensor in tensors.values()))
    views = {name: base[: tensor.numel()].view(tensor.shape) for name, tensor in tensors.items()}
    torch.save(views | {f"pos_embed.{i}": base for i in range(20_000)}, folder / "x.pt")
    return folder / "x.pt"


@attack
def _shapes_of_a_huge_dit(folder: Path) -> Path:
    """Each tensor is small, and the network of such shapes is not."""
    tensors = dict(nets.build("DiT", **_RAW_DIT).state_dict())
    tensors["x_embedder.proj.weight"] = torch.zeros(100_000, 1, 1, 1)
    tensors["pos_embed"] = torch.zeros(1, 1_000_000, 1)
    tensors["blocks.0.mlp.fc1.weight"] = torch.zeros(400_000, 1)
    torch.save(tensors, folder / "x.pt")
    return folder / "x.pt"


@attack
def _shapes_of_no_dit(folder: Path) -> Path:
    tensors = dict(nets.build("DiT", **_RAW_DIT).state_dict())
    torch.save({name: tensor[:0] for name, tensor in tensors.items()}, folder / "x.pt")
    return folder / "x.pt"


@attack
def _promised_storages(folder: Path) -> Path:
    """The older format says how large its storages are long before they come."""
    tensors = b"".join(
        b"(" + _text("storage") + b"ctorch\nFloatStorage\n" + _text(str(i)) + _text("cpu") + b"J\xff\xff\xff\x7fNtQ"
        for i in range(10_000)
    )
    programs = [b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19", b"M\xe9\x03", b"}" + _text("little_endian") + b"\x88s"]
    programs.append(b"](" + tensors + b"e")
    (folder / "x.pt").write_bytes(b"".join(b"\x80\x02" + program + b"." for program in programs) + bytes(100))
    return folder / "x.pt"


# Zip files ------------------------------------------------------------------------------------------------------------
def _saved(folder: Path) -> dict[str, bytes]:
    """The members of an honest file with one storage."""
    torch.save({"a": torch.zeros(4)}, folder / "honest.pt")
    with zipfile.ZipFile(folder / "honest.pt") as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _zeros(megabytes: int) -> bytes:
    """A deflated stream of so many zeros: one block, again and again."""
    packer = zlib.compressobj(9, wbits=-15)
    packer.compress(bytes(2**20)) + packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(bytes(2**20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return block * megabytes + b"\x03\x00"


@attack
def _bomb_of_8_megabytes(folder: Path) -> Path:
    """A storage of 8 GB of zeros, deflated."""
    content = _saved(folder)
    count = b"\x8a\x05" + (2**31).to_bytes(5, "little")
    content["honest/data.pkl"] = content["honest/data.pkl"].replace(b"K\x04tq", count + b"tq")
    entries = members(content)
    bomb = next(entry for entry in entries if entry["name"] == b"honest/data/0")
    deflated = _zeros(2**13)
    bomb |= {"data": deflated, "method": 8, "local_method": 8, "packed": len(deflated), "size": 2**32 - 1}
    bomb |= {"extra": struct.pack("<2HQ", 1, 8, 2**33)}
    (folder / "x.pt").write_bytes(zipped(entries))
    return folder / "x.pt"


@attack
def _long_byteorder(folder: Path) -> Path:
    content = _saved(folder)
    content["honest/byteorder"] = bytes(10**7)
    (folder / "x.pt").write_bytes(zipped(members(content)))
    return folder / "x.pt"


@attack
def _directory_of_many_members(folder: Path) -> Path:
    entries = members({f"{i:06}": b"" for i in range(350_000)} | {"x/data.pkl": b"N."})
    (folder / "x.pt").write_bytes(zipped(entries, {"here": 0xFFFF, "count": 0xFFFF}))
    return folder / "x.pt"


@attack
def _storage_beyond_the_file(folder: Path) -> Path:
    content = _saved(folder)
    entries = members(content)
    for entry in entries:
        if entry["name"] == b"honest/data/0":
            entry |= {"packed": 2**32 - 2, "size": 2**32 - 2}
    (folder / "x.pt").write_bytes(zipped(entries))
    return folder / "x.pt"
