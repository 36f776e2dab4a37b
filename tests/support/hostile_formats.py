"""The formats that dgfast reads from strangers: an honest file of each, others made of it, and who reads them."""

import argparse
import io
import json
import pickle
import pickletools
import random
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from dgfast import Sampler, nets, networks
from dgfast import bundle as bundles
from dgfast.checkpoints import network, torch_file
from dgfast.checkpoints.torch_file import Opaque
from dgfast.evaluation import reference
from dgfast.evaluation.features import Extractor
from dgfast.runtimes.onnx.session import OnnxEngine, stored_tensor
from dgfast.runtimes.tensorrt import file as engine_file
from tests.support import mutations, mutations_onnx
from tests.support.paths import ROOT

TINY: dict[str, Any] = {
    "img_resolution": 8, "img_channels": 1, "label_dim": 3, "model_type": "SongUNet", "model_channels": 8,
    "channel_mult": [1], "num_blocks": 1, "attn_resolutions": [8], "resample_filter": [1, 3, 3, 1],
    "sigma_min": 0, "sigma_max": 80.0, "sigma_data": 0.5, "dropout": 0.1, "label_dropout": 0.0,
}  # fmt: skip
DIT: dict[str, Any] = {
    "model_type": "DiT", "img_resolution": 8, "img_channels": 4, "label_dim": 3, "patch_size": 2, "hidden_size": 16,
    "depth": 2, "num_heads": 2,
}  # fmt: skip
TRUNK: dict[str, Any] = {
    "image_size": 8, "in_channels": 1, "model_channels": 32, "out_channels": 3, "num_res_blocks": 1,
    "attention_resolutions": [], "channel_mult": [1], "num_head_channels": 32,
}  # fmt: skip
HEAD = TRUNK | {"in_channels": 32, "out_channels": 1}
_PLAIN = (dict, list, tuple, set, str, bytes, int, float, bool, type(None), Tensor)


@dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        write_honest: write an honest file into a folder. write: write a hostile one. Both return what `read` gets.
    """

    name: str
    write_honest: Callable[[Path], Path]
    write: Callable[[random.Random, Path], Path]
    read: Callable[[Path], object]


def _of_bytes(
    name: str,
    file: str,
    honest: Callable[[], bytes],
    change: Callable[[random.Random], bytes],
    read: Callable[[Path], object],
) -> Format:
    def write(folder: Path, content: bytes) -> Path:
        path = folder / file
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        return path

    return Format(name, lambda folder: write(folder, honest()), lambda rng, folder: write(folder, change(rng)), read)


@cache
def _tensors() -> dict[str, Tensor]:
    """A DiT's, which `convert` knows by their shapes."""
    torch.manual_seed(0)
    return nets.build("DDPMPrecond", **DIT).state_dict()


def _convert(path: Path) -> None:
    network.read(path, "score", None, {} if path.suffix == ".pkl" else {"num_heads": 2}, None)


# Snapshots and torch.save's files -------------------------------------------------------------------------------------
@cache
def _snapshot() -> bytes:
    return (ROOT / "tests/golden/edm_tiny.pkl").read_bytes()


@cache
def _saved(zipped: bool) -> tuple[bytes, ...]:
    """A state dict and a training checkpoint."""
    net = nets.build("DDPMPrecond", **DIT)
    optimizer = torch.optim.AdamW(net.parameters())
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    arguments = argparse.Namespace(lr=1e-4, device=torch.device("cpu"), results=Path("x"))
    wrapped = {"model": net.state_dict(), "ema": _tensors(), "opt": optimizer.state_dict(), "args": arguments}
    files = []
    for content in (
        _tensors(),
        wrapped | {"half": [torch.zeros(3).half(), torch.zeros(2, dtype=torch.uint16)] * zipped},
    ):
        buffer = io.BytesIO()
        torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
        files.append(buffer.getvalue())
    return tuple(files)


def _content(rng: random.Random) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(rng.choice(_saved(True)))) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _other_program(rng: random.Random) -> bytes:
    content = _content(rng)
    program = next(name for name in content if name.endswith("data.pkl"))
    content[program] = mutations.pickle(rng, content[program])
    return mutations.zipped(mutations.members(content))


def _other_zip(rng: random.Random) -> bytes:
    return mutations.zip_file(rng, _content(rng))


def _other_legacy(rng: random.Random) -> bytes:
    stream = io.BytesIO(rng.choice(_saved(False)))
    programs = []
    for _ in range(5):
        start = stream.tell()
        for _ in pickletools.genops(stream):
            pass
        programs.append(stream.getvalue()[start : stream.tell()])
    storages = stream.read()
    if rng.random() < 0.2:
        storages = mutations.flipped(rng, storages)
    else:
        number = rng.choice((3, 3, 3, 0, 1, 2, 4))
        programs[number] = mutations.pickle(rng, programs[number])
    return b"".join(programs) + storages


def _read_torch_file(path: Path) -> None:
    _assert_plain(torch_file.read(path))
    _convert(path)


def _assert_plain(content: object) -> None:
    """The content is of plain types alone, and its tensors are dense."""
    seen, waiting = set(), [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Opaque):
            assert isinstance(value.name, str) and value.name.isprintable(), value
            continue
        assert type(value) in _PLAIN, type(value)
        if isinstance(value, Tensor):
            assert value.device.type == "cpu" and value.nbytes <= value.untyped_storage().nbytes()
        elif isinstance(value, dict | list | tuple | set) and id(value) not in seen:
            seen.add(id(value))
            waiting += value
            waiting += value.values() if isinstance(value, dict) else ()


# Bundles --------------------------------------------------------------------------------------------------------------
def _honest_safetensors() -> bytes:
    return safetensors.torch.save(_tensors())


@cache
def _bundle_json() -> str:
    raw: dict[str, Any] = {
        "format": 1, "name": "small",
        "nets": {
            "score": {"kind": "EDMPrecond", "keywords": TINY, "file": "score.safetensors"},
            "classifier": {"kind": "EncoderUNetModel", "keywords": TRUNK, "file": "classifier.safetensors"},
            "discriminator": {"kind": "EncoderUNetModel", "keywords": HEAD, "file": "discriminator.safetensors"},
        },
        "sampling": {"num_steps": 9, "solver": "euler", "sigma_max": 60.0, "discretization": "iddpm", "M": 1000},
        "guidance": {"dg_window": [0.02, 0.9], "guidance_interval": [0.3, "inf"], "dg_schedule": [[0.1, 1], [0.5, 2]]}
        | {"dg_weight": 1.0, "dg_every": 2, "classifier_scale": 0.5},
        "class_names": ["a", "b", "c"], "provenance": "x", "license": "MIT", "metrics": {"fid": 1.5, "by": [1, 2]},
        "vae": {"source": "vae", "scale": 0.2},
    }  # fmt: skip
    return json.dumps(raw)


@cache
def _weights() -> dict[str, bytes]:
    torch.manual_seed(0)
    specs = json.loads(_bundle_json())["nets"]
    built = {spec["file"]: nets.build(spec["kind"], **spec["keywords"]) for spec in specs.values()}
    return {file: safetensors.torch.save(net.state_dict()) for file, net in built.items()}


def _write_bundle(folder: Path, content: bytes) -> Path:
    small = folder / "small"
    small.mkdir(exist_ok=True)
    for file, weights in _weights().items():
        (small / file).write_bytes(weights)
    (small / "bundle.json").write_bytes(content)
    return small / "bundle.json"


def _read_bundle(path: Path) -> None:
    bundle = bundles.read(path.parent)
    bundle.fingerprint()
    Sampler(networks.load(bundle), bundle.sampling, bundle.guidance)


# Engines --------------------------------------------------------------------------------------------------------------
@cache
def _engine_json() -> str:
    return json.dumps(
        {
            "format": 1, "sha256": "a" * 64, "flavor": "tensorrt", "version": "10.9", "dtype": "fp16",
            "batch": [1, 4, 8], "tolerance": 0.01, "gpu": "H100", "capability": "9.0", "capabilities": ["9.0"],
            "errors": {"denoised": 0.001}, "source": {"bundle": "x"},
        }
    )  # fmt: skip


def _read_engine_json(path: Path) -> None:
    file = engine_file.read(path)
    file.check_library("tensorrt", "10.9")
    file.check_gpu("H100", "9.0")
    file.check_batch(4)


@cache
def _onnx() -> bytes:
    """y = relu(conv(x) * sigma), with its own test in it."""
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    arrays = {"kernel": rng.standard_normal((2, 1, 3, 3)).astype(np.float32), "shape": np.array([-1, 2, 16])}
    nodes = [
        helper.make_node("Conv", ["x", "kernel"], ["h"], pads=[1, 1, 1, 1]),
        helper.make_node("Mul", ["h", "sigma"], ["scaled"]),
        helper.make_node("Relu", ["scaled"], ["positive"]),
        helper.make_node("Reshape", ["positive", "shape"], ["y"]),
    ]
    ends: dict[str, list[str | int | None]] = {
        "x": ["batch", 1, 4, 4],
        "sigma": ["batch", 1, 1, 1],
        "y": ["batch", 2, 16],
    }
    x, sigma, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n, shape in ends.items())
    graph = helper.make_graph(nodes, "g", [x, sigma], [y], [numpy_helper.from_array(a, n) for n, a in arrays.items()])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    inputs = {"x": torch.rand(1, 1, 4, 4), "sigma": torch.ones(1, 1, 1, 1)}
    result = torch.nn.functional.conv2d(inputs["x"], torch.from_numpy(arrays["kernel"]), padding=1).relu()
    case = {side: {name: stored_tensor(t) for name, t in tensors.items()}
            for side, tensors in (("inputs", inputs), ("outputs", {"y": result.reshape(1, 2, 16)}))}  # fmt: skip
    said = {"self_test": json.dumps(case | {"tolerance": 1e-3}), "guidance": json.dumps({"dg_weight": 1})}
    for key, value in said.items():
        model.metadata_props.add(key=key, value=value)
    return model.SerializeToString()


def _read_onnx(path: Path) -> None:
    OnnxEngine(path, threads=1).self_test()


def _other_bundle(rng: random.Random, folder: Path) -> Path:
    return _write_bundle(folder, mutations.json_text(rng, json.loads(_bundle_json())))


def _other_safetensors(rng: random.Random) -> bytes:
    return mutations.safetensors(rng, _honest_safetensors())


def _other_engine_json(rng: random.Random) -> bytes:
    return mutations.json_text(rng, json.loads(_engine_json()))


# Moments of features ------------------------------------------------------------------------------------------------
@cache
def _moments() -> dict[str, bytes]:
    """EDM2's pickle, under "", and the arrays of EDM's npz."""
    arrays = {"mu": np.arange(3.0), "sigma": np.eye(3)}
    npz = io.BytesIO()
    np.savez(npz, **arrays)  # type: ignore[arg-type]
    with zipfile.ZipFile(npz) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    return {"": pickle.dumps({"num_images": 9, "fid": arrays}, protocol=4), **members}


def _other_moments(rng: random.Random) -> bytes:
    members = {name: content for name, content in _moments().items() if name}
    if rng.random() < 0.5:
        return mutations.zip_file(rng, members)
    name = rng.choice([*members])
    return mutations.zipped(mutations.members(members | {name: mutations.flipped(rng, members[name])}))


def _honest_moments() -> bytes:
    return mutations.zipped(mutations.members({name: content for name, content in _moments().items() if name}))


def _read_moments(path: Path) -> None:
    extractor = Extractor("three numbers", None, torch.device("cpu"), lambda pixels: pixels.flatten(1)[:, :3])
    reference.of_moments(path, extractor, 3)


FORMATS = (
    _of_bytes("snapshot", "x.pkl", _snapshot, lambda rng: mutations.pickle(rng, _snapshot()), _convert),
    _of_bytes("pickle in .pt", "x.pt", lambda: _saved(True)[1], _other_program, _read_torch_file),
    _of_bytes("older .pt", "y.pt", lambda: _saved(False)[1], _other_legacy, _read_torch_file),
    _of_bytes("zip", "z.pt", lambda: _saved(True)[0], _other_zip, _read_torch_file),
    _of_bytes("safetensors", "x.safetensors", _honest_safetensors, _other_safetensors, _convert),
    Format("bundle.json", lambda folder: _write_bundle(folder, _bundle_json().encode()), _other_bundle, _read_bundle),
    _of_bytes(
        "moments", "m.pkl", lambda: _moments()[""], lambda rng: mutations.pickle(rng, _moments()[""]), _read_moments
    ),
    _of_bytes("moments in .npz", "m.npz", _honest_moments, _other_moments, _read_moments),
    _of_bytes("engine.json", "engine.json", lambda: _engine_json().encode(), _other_engine_json, _read_engine_json),
    _of_bytes("onnx", "x.onnx", _onnx, lambda rng: mutations_onnx.model(rng, _onnx()), _read_onnx),
)
