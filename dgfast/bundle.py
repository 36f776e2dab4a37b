"""A bundle: a folder with one safetensors file a network and one `bundle.json` that says what they are.

```json
{"format": 1, "name": "mnist32",
 "nets": {"score": {"kind": "EDMPrecond", "keywords": {...}, "file": "score.safetensors"}, ...},
 "vae": {"source": "vae", "scale": 0.18215}, "sampling": {...}, "guidance": {...},
 "class_names": [...], "provenance": "...", "license": "...", "metrics": {...}}
```

Roles of networks: `score` (the denoiser), `reference` (a worse one, for autoguidance), `classifier` (noise-aware; also
the trunk of the discriminator), `discriminator` (its head), `features` (clean images, for the metrics), `generator`
(latents to images in one forward). `vae`, for a bundle of latents alone, says what decodes them (see `VaeSpec`).
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
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from dgfast import nets
from dgfast.config import GuidanceConfig, SamplingConfig
from dgfast.errors import UserError
from dgfast.latents import SCALE
from dgfast.vp import TIME_SCHEDULES

FORMAT = 1
ROLES = ("score", "reference", "classifier", "discriminator", "features", "generator")
DEFAULT = "mnist32"
_ASSETS = Path(__file__).parent / "assets"


@dataclass(frozen=True)
class NetSpec:
    """One network of a bundle.

    Attributes:
        kind, keywords: arguments of `nets.build`.
        file: safetensors file beside `bundle.json`.
        time_schedule: for noise-aware networks in VP coordinates, the time they read: "linear" or "cosine".
    """

    kind: str
    keywords: dict[str, Any]
    file: str
    time_schedule: str | None = None


@dataclass(frozen=True)
class VaeSpec:
    """What decodes the latents that the score network makes.

    Attributes:
        source: an `AutoencoderKL` as diffusers saves it: a folder, seen from the bundle's or from here, or a hub name.
        scale: latents are divided by it before they are decoded.
    """

    source: str
    scale: float = SCALE

    def __post_init__(self) -> None:
        if not isinstance(self.source, str) or not self.source or not 0 < self.scale < math.inf:
            raise UserError(
                f"vae: source {self.source!r} must be a folder or name, scale {self.scale} a number above 0"
            )


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
        """The network of that role with its weights, in eval mode and frozen.

        Weights become `dtype`; buffers (frequencies, noise tables, filters) stay float32, where they must.

        Raises:
            UserError: no such network, one that can't be built, an unreadable file, missing, superfluous or
                misshapen tensors.
        """
        spec = self.spec(role)
        try:
            net = nets.build(spec.kind, **spec.keywords)
        except ValueError as error:
            raise UserError(f"bundle {self.name}, {role}: {error}") from error
        load_state(net, read_tensors(self.folder / spec.file), self.folder / spec.file)
        net.eval().requires_grad_(False)
        for parameter in net.parameters():
            parameter.data = parameter.data.to(dtype)
        return net.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def fingerprint(self, roles: Collection[str] | None = None) -> str:
        """SHA-256 over the networks of these roles: their kinds, keywords and files; None: all that sampling may use.

        Raises:
            UserError: a file that cannot be read.
        """
        digest = hashlib.sha256()
        for role, spec in sorted(self.nets.items()):
            if role != "features" if roles is None else role in roles:
                digest.update(json.dumps([role, asdict(spec)], sort_keys=True).encode())
                digest.update(_bytes(self.folder / spec.file))
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
        raw = json.loads(path.read_text())
        if raw["format"] != FORMAT:
            raise UserError(f"{path}: format {raw['format']}, this dgfast reads format {FORMAT}")
        specs = {role: _checked(role, NetSpec(**spec), path) for role, spec in raw["nets"].items()}
        bundle_ = Bundle(
            folder=folder,
            name=raw["name"],
            nets=specs,
            sampling=SamplingConfig(**raw.get("sampling", {})),
            guidance=GuidanceConfig(**_from_json(raw.get("guidance", {}))),
            class_names=tuple(raw.get("class_names", ())),
            provenance=raw.get("provenance", ""),
            license=raw.get("license", ""),
            metrics=raw.get("metrics", {}),
            vae=VaeSpec(**raw["vae"]) if "vae" in raw else None,
        )
    except UserError as error:
        raise UserError(error.message if str(path) in error.message else f"{path}: {error.message}") from error
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path} is not a bundle description: {error!r}") from error
    return bundle_


def _checked(role: str, spec: NetSpec, path: Path) -> NetSpec:
    """The spec, if it may stand in the `bundle.json` at `path`."""
    if role not in ROLES:
        raise UserError(f"{path}: unknown role {role!r}; roles: {', '.join(ROLES)}")
    if not isinstance(spec.kind, str) or not isinstance(spec.keywords, dict):
        raise UserError(f"{path}: {role} needs a kind by name and keywords as an object")
    if not isinstance(spec.file, str) or Path(spec.file).name != spec.file:
        raise UserError(f"{path}: {role} names the file {spec.file!r}, which is not beside bundle.json")
    if spec.time_schedule not in (None, *TIME_SCHEDULES):
        raise UserError(f"{path}: {role} has time_schedule {spec.time_schedule!r}; use linear or cosine")
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
    } | ({"vae": asdict(bundle.vae)} if bundle.vae else {})
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


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        UserError: no such file, or not a whole safetensors file.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from error


def load_state(net: nn.Module, tensors: Mapping[str, Tensor], source: object) -> None:
    """Copy `tensors` into `net`, all of them and nothing else.

    Raises:
        UserError: what is missing, superfluous or misshapen in `source`, by name.
    """
    wanted = net.state_dict()
    complaints = [
        *_listed("missing", [name for name in wanted if name not in tensors]),
        *_listed("superfluous", [name for name in tensors if name not in wanted]),
        *_listed(
            "misshapen",
            [
                f"{name} {list(tensors[name].shape)}, not {list(value.shape)}"
                for name, value in wanted.items()
                if name in tensors and tensors[name].shape != value.shape
            ],
        ),
    ]
    if complaints:
        raise UserError(f"{source} does not fit its network: {'; '.join(complaints)}")
    net.load_state_dict(dict(tensors))


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from error


def _listed(what: str, names: list[str], most: int = 5) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return [f"{what} {', '.join(names[:most])}{more}"]


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


def _from_json(guidance: dict[str, Any]) -> dict[str, Any]:
    def numbers(value: Any) -> Any:
        return tuple(map(numbers, value)) if isinstance(value, list) else float(value)

    return {name: numbers(value) if isinstance(value, list) else value for name, value in guidance.items()}
