"""A bundle: a folder with one safetensors file a network and one `bundle.json` that says what they are.

```json
{"format": 1, "name": "mnist32",
 "nets": {"score": {"kind": "EDMPrecond", "keywords": {...}, "file": "score.safetensors"}, ...},
 "vae": {"source": "vae", "scale": 0.18215}, "sampling": {...}, "guidance": {...},
 "class_names": [...], "provenance": "...", "license": "...", "metrics": {...}}
```

Roles of networks: `score` (the denoiser), `reference` (a worse one, for autoguidance), `classifier` (noise-aware; also
the trunk of the discriminator), `discriminator` (its head, or by itself if it reads images), `features` (clean images,
for the metrics), `generator` (latents to images in one forward). `vae`, for a bundle of latents alone, says what
decodes them (see `VaeSpec`).
`sampling` and `guidance` are the defaults of `python -m dgfast.sample` with this bundle.
"""

import hashlib
import json
import math
import os
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from dgfast import bounds, weights
from dgfast.checkpoints import one_line
from dgfast.config import GuidanceConfig, SamplingConfig
from dgfast.denoiser import PRECONDITIONERS
from dgfast.errors import UserError
from dgfast.guidance.declaration import all_options
from dgfast.latents import VaeSpec as VaeSpec
from dgfast.vp import TIME_SCHEDULES
from dgfast.weights import load_state as load_state
from dgfast.weights import read_tensors as read_tensors

FORMAT = 1
ROLES = ("score", "reference", "classifier", "discriminator", "features", "generator")
_ENCODERS = ("EncoderUNetModel", "create_classifier")
_KINDS = {
    "score": tuple(PRECONDITIONERS), "reference": tuple(PRECONDITIONERS), "generator": ("Generator",),
    "features": ("FeatureNet",), "discriminator": _ENCODERS, "classifier": (*_ENCODERS, "FeatureNet"),
}  # fmt: skip
DEFAULT = "mnist32"
_ASSETS = Path(__file__).parent / "assets"
_PIECE = 2**20  # bytes of a file that are hashed at once


@dataclass(frozen=True)
class NetSpec:
    """One network of a bundle.

    Attributes:
        kind, keywords: arguments of `nets.build`.
        file: safetensors file beside `bundle.json`.
        time_schedule: for noise-aware networks in VP coordinates, the time they read: "linear" or "cosine". None: that
            of the bundle's score network if it is of discrete time, else the one of ADM's networks of the same size.
    """

    kind: str
    keywords: dict[str, Any]
    file: str
    time_schedule: str | None = None


@dataclass(frozen=True)
class Bundle:
    """What `bundle.json` in `folder` says."""

    folder: Path
    name: str
    nets: dict[str, NetSpec]
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    class_names: tuple[str, ...] = ()
    provenance: str = ""
    license: str = ""
    metrics: dict[str, Any] = field(default_factory=dict)
    vae: VaeSpec | None = None

    def spec(self, role: str) -> NetSpec:
        """The network of that role.

        Raises:
            UserError: the bundle has none.
        """
        if role not in self.nets:
            raise UserError(f"bundle {self.name} has no {role} network; it has {', '.join(self.nets) or 'none'}")
        return self.nets[role]

    def load(self, role: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
        """The network of that role with its weights, as `weights.placed` makes it ready for sampling.

        Raises:
            UserError: no such network, one that can't be built, an unreadable file, missing, superfluous or
                misshapen tensors.
        """
        spec = self.spec(role)
        path = self.folder / spec.file
        net = weights.build(spec.kind, spec.keywords, weights.read_tensors(path), path)
        return weights.placed(net, device, dtype)

    def fingerprint(self, roles: Collection[str] | None = None) -> str:
        """SHA-256 over the networks of these roles: their kinds, keywords and files; None: all that sampling may use.

        Raises:
            UserError: a file that cannot be read.
        """
        digest = hashlib.sha256()
        for role, spec in sorted(self.nets.items()):
            if role != "features" if roles is None else role in roles:
                digest.update(json.dumps([role, asdict(spec)], sort_keys=True).encode())
                with bounds.open_file(self.folder / spec.file) as stream:
                    while piece := stream.read(_PIECE):
                        digest.update(piece)
        return digest.hexdigest()


def read(bundle: str | Path) -> Bundle:
    """The bundle in that folder, or the one of that name that comes with dgfast (`mnist32`).

    Raises:
        UserError: unknown bundle, or a `bundle.json` that does not say what a bundle needs.
    """
    folder = Path(bundle)
    if not folder.is_dir() and (_ASSETS / str(bundle)).is_dir():
        folder = _ASSETS / str(bundle)
    path = folder / "bundle.json"
    if not path.is_file():
        shipped = ", ".join(sorted(p.name for p in _ASSETS.iterdir() if p.is_dir()))
        raise UserError(f"unknown bundle {str(bundle)!r}: no {path}; bundles that come with dgfast: {shipped}")
    try:
        raw = bounds.read_json(path)
        if raw["format"] != FORMAT:
            raise UserError(f"{path}: format {raw['format']!r:.80}, this dgfast reads format {FORMAT}")
        return Bundle(
            folder=folder,
            name=_text(raw["name"], "name"),
            nets={role: _checked(role, NetSpec(**spec), path) for role, spec in raw["nets"].items()},
            sampling=SamplingConfig(**raw.get("sampling", {})),
            guidance=_guidance(raw.get("guidance", {})),
            class_names=tuple(_text(name, "class name") for name in raw.get("class_names", ())),
            provenance=_text(raw.get("provenance", ""), "provenance", lines=True),
            license=_text(raw.get("license", ""), "license", lines=True),
            metrics=dict(raw.get("metrics", {})),
            vae=VaeSpec(**raw["vae"]) if "vae" in raw else None,
        )
    except UserError as error:
        told = error.message if str(path) in error.message else f"{path}: {one_line(error.message)}"
        raise UserError(told) from error
    except (ArithmeticError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path} is not a bundle description: {error!r:.300}") from error


def read_or_new(folder: Path) -> Bundle:
    """The bundle in that folder, or one without networks that is named after it.

    Raises:
        UserError: as `read`.
    """
    return read(folder) if (folder / "bundle.json").exists() else Bundle(folder, folder.resolve().name, {})


def _text(value: Any, what: str, lines: bool = False) -> str:
    """The text, if it may be shown in a terminal as it is; `lines`: if its lines may.

    Raises:
        ValueError: something else, or text with control characters.
    """
    if not isinstance(value, str) or not (value.replace("\n", "") if lines else value).isprintable():
        raise ValueError(f"{what} {value!r:.80} is not a text that can be shown")
    return value


def _checked(role: str, spec: NetSpec, path: Path) -> NetSpec:
    """The spec, if it may stand in the `bundle.json` at `path`."""
    if role not in ROLES:
        raise UserError(f"{path}: unknown role {role!r:.80}; roles: {', '.join(ROLES)}")
    if not isinstance(spec.kind, str) or not isinstance(spec.keywords, dict):
        raise UserError(f"{path}: {role} needs a kind by name and keywords as an object")
    if spec.kind not in _KINDS[role]:
        raise UserError(f"{path}: {role} cannot be of the kind {spec.kind!r:.80}; use {', '.join(_KINDS[role])}")
    if not isinstance(spec.file, str) or Path(spec.file).name != spec.file or not spec.file.isprintable():
        raise UserError(f"{path}: {role} names the file {spec.file!r:.80}, which is not beside bundle.json")
    if spec.time_schedule not in (None, *TIME_SCHEDULES):
        raise UserError(f"{path}: {role} has time_schedule {spec.time_schedule!r:.80}; use linear or cosine")
    try:
        bounds.check_keywords(spec.keywords)
    except ValueError as error:
        raise UserError(f"{path}: {role}: {error}") from error
    return spec


def write(bundle: Bundle) -> None:
    """Write `bundle.json` into the bundle's folder, in one move. Defaults are left out."""
    raw: dict[str, Any] = {
        "format": FORMAT,
        "name": bundle.name,
        "nets": {role: _without_defaults(spec) for role, spec in bundle.nets.items()},
        "sampling": _without_defaults(bundle.sampling),
        "guidance": _to_json(_without_defaults(bundle.guidance)),
        "class_names": list(bundle.class_names),
        "provenance": bundle.provenance,
        "license": bundle.license,
        "metrics": bundle.metrics,
    } | ({"vae": bundle.vae.described()} if bundle.vae else {})
    bundle.folder.mkdir(parents=True, exist_ok=True)
    partial = bundle.folder / "bundle.json.partial"
    partial.write_text(json.dumps(raw, indent=1, allow_nan=False) + "\n")
    os.replace(partial, bundle.folder / "bundle.json")


def with_net(
    bundle: Bundle, role: str, net: nn.Module, kind: str, keywords: dict[str, Any], time_schedule: str | None = None
) -> Bundle:
    """Save the weights of `net` in the bundle's folder and return the bundle that names it."""
    return with_tensors(bundle, role, net.state_dict(), kind, keywords, time_schedule)


def with_tensors(
    bundle: Bundle,
    role: str,
    tensors: Mapping[str, Tensor],
    kind: str,
    keywords: dict[str, Any],
    time_schedule: str | None = None,
) -> Bundle:
    """As `with_net`, from a state dict. `bundle.json` itself is written by `write`."""
    spec = NetSpec(kind, keywords, f"{role}.safetensors", time_schedule)
    bundle.folder.mkdir(parents=True, exist_ok=True)
    partial = bundle.folder / f"{spec.file}.partial"
    # `save_file` would leave the file readable by its owner alone.
    partial.write_bytes(save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}))
    os.replace(partial, bundle.folder / spec.file)
    return replace(bundle, nets={**bundle.nets, role: spec})


def _without_defaults(record: Any) -> dict[str, Any]:
    values = asdict(record)
    return {f.name: values[f.name] for f in fields(record) if values[f.name] != f.default}


def _to_json(value: Any) -> Any:
    """Intervals may end at infinity, for which JSON has no number."""
    if isinstance(value, dict):
        return {name: _to_json(entry) for name, entry in value.items()}
    if isinstance(value, tuple):
        return [end if isinstance(end, tuple) or math.isfinite(end) else str(end) for end in value]
    return value


def _guidance(raw: dict[str, Any]) -> GuidanceConfig:
    """The configuration that these values of JSON are.

    Raises:
        UserError: values that it may not have. ValueError: one that names a file, which no stranger may choose.
    """
    named = [one.name for one in all_options() if one.file and one.name in raw]
    if named:
        raise ValueError(f"{', '.join(named)} names a file of its own: give it on the command line")
    return GuidanceConfig(**_from_json(raw))


def _from_json(guidance: dict[str, Any]) -> dict[str, Any]:
    def numbers(value: Any) -> Any:
        return tuple(map(numbers, value)) if isinstance(value, list) else float(value)

    return {name: numbers(value) if isinstance(value, list) else value for name, value in guidance.items()}
