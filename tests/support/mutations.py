"""Changes to honest files that keep most of their structure, for the fuzzer: what a parser believes is what is changed.

Each function takes a `random.Random` and an honest file, and returns another. Payloads among the changes would leave a
file named `CANARY` behind if anybody ran them.
"""

import json
import pickletools
import random
import struct
import zlib
from functools import cache
from typing import Any

CANARY = "canary"
NUMBERS = (0, 1, -1, 2, 7, 255, 256, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, -(2**63), 10**30)
TEXTS = ("", "a", "\x1b[2J", "a\nb", "..", "/etc/passwd", "\x00", "ä\u202e", "NaN", "a" * 5000, "\ud800", "9" * 5000)


def flipped(rng: random.Random, content: bytes) -> bytes:
    """A few bytes are others, or the end is gone."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        if changed:
            changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed[: rng.randrange(len(changed) + 1)] if rng.random() < 0.2 else changed)


# Pickles --------------------------------------------------------------------------------------------------------------
def _text(content: str) -> bytes:
    raw = content.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def _called(module: str, name: str, *arguments: str) -> bytes:
    return f"c{module}\n{name}\n".encode() + b"(" + b"".join(map(_text, arguments)) + b"tR"


_TOUCH, _PYTHON = f"touch {CANARY}", f"open({CANARY!r}, 'w')"
_INNER = b"\x80\x02" + _called("posix", "system", _TOUCH) + b"."
PAYLOADS = (
    _called("os", "system", _TOUCH), _called("posix", "system", _TOUCH), _called("builtins", "eval", _PYTHON),
    _called("builtins", "exec", _PYTHON), _called("builtins", "open", CANARY, "w"), _called("os", "mkdir", CANARY),
    _called("importlib", "import_module", CANARY), _called("runpy", "run_path", CANARY),
    _called("subprocess", "getoutput", _TOUCH), _called("torch.hub", "load", CANARY), _called("torch", "load", CANARY),
    _called("torch.serialization", "load", CANARY), _called("numpy", "load", CANARY),
    _called("timeit", "timeit", _PYTHON),
    f"(S{_TOUCH!r}\nios\nsystem\n".encode(), b"cos\nsystem\n" + _text(_TOUCH) + b"\x85\x81",
    _text("os") + _text("system") + b"\x93" + _text(_TOUCH) + b"\x85R",
    b"cpickle\nloads\nB" + struct.pack("<I", len(_INNER)) + _INNER + b"\x85R",
    b"ctorch.storage\n_load_from_bytes\nB" + struct.pack("<I", len(_INNER)) + _INNER + b"\x85R",
    b"cargparse\nNamespace\n)\x81}" + _text("__class__") + b"cos\nsystem\nsb",
    b"cbuiltins\ngetattr\ncos\n__dict__\n" + _text("system") + b"\x86R" + _text(_TOUCH) + b"\x85R",
    b"ccollections\nOrderedDict.fromkeys\n" + _text("a") + b"\x85R", b"cfunctools\npartial\ncos\nsystem\n\x85R",
    b"ccopyreg\n_reconstructor\ncos\nsystem\ncbuiltins\nobject\nN\x87R", b"P" + CANARY.encode() + b"\n", b"\x82\x01",
)  # fmt: skip
_PIECES = (
    b"(", b")", b"]", b"}", b"\x8f", b"N", b"\x88", b"t", b"\x85", b"\x86", b"\x87", b"R", b"\x81", b"b", b"s", b"u",
    b"a", b"e", b"\x90", b"\x91", b"\x94", b"Q", b"0", b"1", b"2", b"h\x00", b"h\x05", b"j\x00\x01\x00\x00", b"q\x01",
    b"r\xff\xff\xff\xff", b"\x92", b"\x93", b"G" + bytes(8), b"\x8a\xff" + b"\xff" * 255, b"B\xff\xff\xff\x7f",
    b"\x8e" + struct.pack("<Q", 2**50), b"X\xff\xff\xff\xff", b"\x95" + bytes(8), b"M\xff\xff",
)  # fmt: skip
_GLOBALS = (
    "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor", "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_tensor_v3", "torch FloatStorage", "torch DoubleStorage", "torch.storage UntypedStorage",
    "torch float16", "torch Size", "collections OrderedDict", "collections defaultdict", "builtins set",
    "_codecs encode", "argparse Namespace", "numpy dtype", "numpy.core.multiarray scalar",
    "torch_utils.persistence _reconstruct_persistent_obj", "torch.storage _load_from_bytes",
    "torch.nn.modules.container ModuleDict", "torch._utils _rebuild_sparse_tensor", "posix system",
)  # fmt: skip


def _operations(program: bytes) -> list[tuple[str, bytes]]:
    """Name and bytes of each operation."""
    found = [(opcode.name, position or 0) for opcode, _, position in pickletools.genops(program)]
    ends = [position for _, position in found[1:]] + [len(program)]
    return [(name, program[start:end]) for (name, start), end in zip(found, ends, strict=True)]


def pickle(rng: random.Random, program: bytes) -> bytes:
    """Another program: operations changed, moved, repeated, or joined by a payload."""
    operations = _operations(program)
    for _ in range(rng.choice((1, 1, 2, 3, 6))):
        at = rng.randrange(len(operations))
        name, raw = operations[at]
        match rng.randrange(9):
            case 0:
                del operations[at : at + rng.choice((1, 1, 3, 20))]
            case 1:
                operations.insert(at, ("payload", rng.choice(PAYLOADS)))
            case 2:
                operations.insert(at, ("piece", rng.choice(_PIECES)))
            case 3:
                operations.insert(rng.randrange(len(operations) + 1), operations[at])
            case 4:
                count = rng.choice((2, 30, 1000, 100_000 // max(1, len(raw))))
                operations[at] = name, raw * max(1, count)
            case 5 if name == "GLOBAL":
                operations[at] = name, f"c{rng.choice(_GLOBALS)}\n".replace(" ", "\n").encode()
            case 6 if name.startswith("BININT") or name == "LONG1":
                operations[at] = name, _integer(rng.choice(NUMBERS))
            case 7 if "UNICODE" in name:
                operations[at] = name, _text(rng.choice(TEXTS))
            case _:
                operations[at] = name, flipped(rng, raw)
        if not operations:
            break
    return b"".join(raw for _, raw in operations)


def _integer(number: int) -> bytes:
    raw = number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


# Zip files ------------------------------------------------------------------------------------------------------------
Member = dict[str, Any]


def members(content: dict[str, bytes]) -> list[Member]:
    """What `zipped` writes: members, stored as they are."""
    return [
        {"name": name.encode(), "data": data, "method": 0, "flags": 0, "crc": zlib.crc32(data), "packed": len(data)}
        | {"size": len(data), "local_method": 0, "local_size": len(data), "offset": None, "extra": b""}
        for name, data in content.items()
    ]  # fmt: skip


def zipped(members: list[Member], end: dict[str, int] | None = None, behind: bytes = b"") -> bytes:
    """A zip file; `end` gives its last record other numbers than the right ones."""
    body, directory = bytearray(), bytearray()
    for member in members:
        name, method, flags = member["name"], member["method"], member["flags"]
        crc, packed, size, local_size = (member[n] % 2**32 for n in ("crc", "packed", "size", "local_size"))
        offset = (len(body) if member["offset"] is None else member["offset"]) % 2**32
        local = (20, flags, member["local_method"], 0, 0, crc, local_size, size, len(name), 0)
        body += struct.pack("<4s5H3L2H", b"PK\x03\x04", *local) + name + member["data"]
        central = (20, 20, flags, method, 0, 0, crc, packed, size, len(name), len(member["extra"]), 0, 0, 0, 0, offset)
        directory += struct.pack("<4s6H3L5H2L", b"PK\x01\x02", *central)
        directory += member["name"] + member["extra"]
    numbers = {"here": len(members), "count": len(members), "size": len(directory), "start": len(body)} | (end or {})
    counts, places = (numbers[n] % 2**16 for n in ("here", "count")), (numbers[n] % 2**32 for n in ("size", "start"))
    last = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, *counts, *places, 0)
    return bytes(body + directory) + last + behind


@cache
def _deflated(zeros: int) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(bytes(zeros)) + packer.flush()


def zip_file(rng: random.Random, content: dict[str, bytes]) -> bytes:
    """These members, in a container that lies about some of them."""
    entries, end, behind = members(content), dict[str, int](), b""
    for _ in range(rng.choice((1, 1, 2, 3))):
        member = rng.choice(entries)
        match rng.randrange(12):
            case 0:
                member["data"] = flipped(rng, member["data"])
            case 1:
                deflated = _deflated(rng.choice((100, 10**8)))
                member |= {"data": deflated, "method": 8, "local_method": rng.choice((0, 8)), "packed": len(deflated)}
            case 2 | 3:
                field = rng.choice(("packed", "size", "local_size", "crc", "offset", "method", "local_method", "flags"))
                small = field in ("method", "local_method", "flags")
                member[field] = rng.choice((1, 8, 9, 12, 99)) if small else rng.choice(NUMBERS)
            case 4:
                member["packed"] = member["size"] = rng.choice(NUMBERS)
            case 5:
                entries.insert(rng.randrange(len(entries) + 1), dict(rng.choice(entries)))
            case 6:
                member["name"] = rng.choice((rng.choice(entries)["name"], b"", b"../x", b"x/data.pkl", b"\xff" * 9))
            case 7:
                entries.remove(member)
                entries = entries or members(content)
            case 8:
                end[rng.choice(("here", "count", "size", "start"))] = rng.choice(NUMBERS)
            case 9:
                behind = bytes(rng.choice((1, 22, 5000)))
            case 10:
                wide = struct.pack("<2H3Q", 1, 24, *(rng.choice(NUMBERS) % 2**64 for _ in range(3)))
                member |= {"extra": wide, "packed": 0xFFFFFFFF, "size": 0xFFFFFFFF}
            case _:
                entries = (entries * rng.choice((2, 50)))[:1000]
    return zipped(entries, end, behind)


# JSON and safetensors -------------------------------------------------------------------------------------------------
def _values(rng: random.Random) -> Any:
    nested: Any = {}
    for _ in range(rng.choice((3, 30, 3000))):
        nested = rng.choice(([nested], {"a": nested}))
    numbers = (1e308, -0.0, 0.5, float("nan"), float("inf"), 10**7, 10**9, 10**400, 10 ** rng.randrange(20))
    return rng.choice((None, True, [], {}, nested, [1] * 3000, rng.choice(NUMBERS), rng.choice(TEXTS), *numbers))


def json_value(rng: random.Random, value: Any) -> Any:
    """The value, one place in it changed."""
    path: list[tuple[Any, Any]] = []
    inner = value
    while isinstance(inner, dict | list) and inner and (not path or rng.random() < 0.8):
        key = rng.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
        path.append((inner, key))
        inner = inner[key]
    if not path:
        return _values(rng)
    holder, key = path[-1]
    match rng.randrange(6):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[rng.choice((*TEXTS, "keywords", "kind", "file", "__metadata__"))] = inner
        case 2 if isinstance(inner, int | float):
            holder[key] = rng.choice((-inner, inner * 1000, inner + 1, float(inner), str(inner), [inner]))
        case _:
            holder[key] = _values(rng)
    return value


def json_text(rng: random.Random, value: Any) -> bytes:
    """Text of the value with some changes, not all of which are JSON."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        value = json_value(rng, value)
    try:
        text = json.dumps(value)
    except RecursionError:
        text = "[" * 100_000
    if rng.random() < 0.1:
        text = text.replace("{", '{"name": 1, ', rng.choice((1, 5)))
    return text.encode() if rng.random() < 0.9 else flipped(rng, text.encode())


def safetensors(rng: random.Random, content: bytes) -> bytes:
    """Another header, or another length of it, before the same or other bytes."""
    (length,) = struct.unpack("<Q", content[:8])
    header, data = content[8 : 8 + length], content[8 + length :]
    match rng.randrange(8):
        case 0:
            return flipped(rng, content)
        case 1:
            return struct.pack("<Q", rng.choice(NUMBERS) % 2**64) + header + data
        case 2:
            data = data[: rng.randrange(len(data))] if rng.random() < 0.5 else data + bytes(rng.choice((1, 4096)))
        case _:
            header = json_text(rng, json.loads(header))
    return struct.pack("<Q", len(header)) + header + data
