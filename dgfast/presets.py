"""EDM2's published files and presets, by its own names (arXiv 2312.02696, table 4; 2406.02507, table 1).

A preset is a file, or two of which the one guides the other, and the weight of that guidance, as in NVlabs/edm2.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dgfast.errors import UserError

CHANNELS = {"xxs": 64, "xs": 128, "s": 192, "m": 256, "l": 320, "xl": 384, "xxl": 448}
"""Channels at the highest resolution of each published size."""
_SHAPES = {"img512": (64, 4), "img64": (64, 3)}  # resolution and channels: of latents, of pixels
_CLASSES = 1000
_NAME = re.compile(r"edm2-(img512|img64)-(xxs|xs|s|m|l|xl|xxl)(-uncond)?(?:-(\d+)-(\d+\.\d+))?(?![\w-])")
SAMPLING: dict[str, Any] = {"num_steps": 32, "state_dtype": "float32"}
"""How EDM2 samples, in the words of `SamplingConfig`; the rest is as in EDM."""


@dataclass(frozen=True)
class File:
    """A published network: EDM2's names say data, size, thousands of images seen, and the average's relative std."""

    data: str
    size: str
    kimg: str
    std: str
    unconditional: bool = False

    @property
    def name(self) -> str:
        return f"edm2-{self.data}-{self.size}{'-uncond' * self.unconditional}-{self.kimg}-{self.std}.pkl"

    def contradiction(self, kind: str, keywords: Mapping[str, Any]) -> str:
        """What such a network has otherwise than the name says; "" if it may be that file's."""
        resolution, channels = _SHAPES[self.data]
        says = {
            "img_resolution": resolution,
            "img_channels": channels,
            "model_channels": CHANNELS[self.size],
            "label_dim": 0 if self.unconditional else _CLASSES,
        }
        if kind != "EDM2Precond":
            return f"the kind {kind}, not EDM2Precond"
        has = {"model_channels": CHANNELS["s"], **keywords}
        return ", ".join(f"{name} {has[name]}, not {value}" for name, value in says.items() if has[name] != value)


def named(text: str) -> File | None:
    """The published file whose name the text begins with, as far as it says; None if it is no such name."""
    found = _NAME.match(text)
    return found and File(found[1], found[2], found[4] or "", found[5] or "", bool(found[3]))


@dataclass(frozen=True)
class Preset:
    """
    Attributes:
        net: what draws. reference: what guides it, if anything does. weight: of that guidance, 1 for none.
    """

    net: File
    reference: File | None = None
    weight: float = 1.0

    @property
    def files(self) -> dict[str, File]:
        """By roles in a bundle."""
        return {"score": self.net} | ({"reference": self.reference} if self.reference else {})


_KIMG = {
    "img512": {"xs": 2147483, "s": 2147483, "m": 2147483, "l": 1879048, "xl": 1342177, "xxl": 939524},
    "img64": {"s": 1073741, "m": 2147483, "l": 1073741, "xl": 671088},
}
# Standard deviations by size, in the order of _KIMG.
_PLAIN = {
    ("img512", "fid"): ".135 .130 .100 .085 .085 .070",
    ("img512", "dino"): ".200 .190 .155 .155 .155 .150",
    ("img64", "fid"): ".075 .060 .040 .040",
}
# Standard deviation and weight: guided by the unconditional network of size xs of the same standard deviation.
_GUIDED = {
    "fid": ".045 1.4, .025 1.4, .030 1.2, .015 1.2, .020 1.2, .015 1.2",
    "dino": ".150 1.7, .085 1.9, .015 2.0, .035 1.7, .030 1.7, .015 1.7",
}
# Standard deviation; size, thousands of images and standard deviation of what guides; weight.
_AUTOGUIDED = {
    ("img512-s", "fid"): ".070 xs 134217 .125 2.10",
    ("img512-s", "dino"): ".120 xs 134217 .165 2.45",
    ("img512-xxl", "fid"): ".075 m 268435 .155 2.05",
    ("img512-xxl", "dino"): ".130 m 268435 .205 2.30",
    ("img512-s-uncond", "fid"): ".070 xs 134217 .110 2.85",
    ("img512-s-uncond", "dino"): ".090 xs 134217 .125 2.90",
    ("img64-s", "fid"): ".045 xs 134217 .110 1.70",
    ("img64-s", "dino"): ".105 xs 134217 .175 2.20",
}


def _file(data: str, size: str, std: str, kimg: int | None = None, unconditional: bool = False) -> File:
    count = _KIMG[data][size] if kimg is None else kimg
    return File(data, size, f"{count:07d}", f"0{std}", unconditional)


def _presets() -> Iterator[tuple[str, Preset]]:
    for (data, metric), stds in _PLAIN.items():
        for size, std in zip(_KIMG[data], stds.split(), strict=True):
            yield f"edm2-{data}-{size}-{metric}", Preset(_file(data, size, std))
    for metric, pairs in _GUIDED.items():
        for size, pair in zip(_KIMG["img512"], pairs.split(", "), strict=True):
            std, weight = pair.split()
            reference = _file("img512", "xs", std, unconditional=True)
            yield f"edm2-img512-{size}-guid-{metric}", Preset(_file("img512", size, std), reference, float(weight))
    for (network, metric), numbers in _AUTOGUIDED.items():
        data, size, *more = network.split("-")
        std, worse, kimg, worse_std, weight = numbers.split()
        net = _file(data, size, std, unconditional=bool(more))
        reference = _file(data, worse, worse_std, int(kimg), bool(more))
        yield f"edm2-{network}-autog-{metric}", Preset(net, reference, float(weight))


PRESETS = dict(_presets())


def preset(name: str) -> Preset:
    """
    Raises:
        UserError: no preset of that name.
    """
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r:.80}; presets: {', '.join(PRESETS)}")
    return PRESETS[name]


def require_fit(name: str, nets: Mapping[str, tuple[str, Mapping[str, Any]]], bundle: str) -> None:
    """
    Args:
        nets: kind and keywords of the bundle's networks by role.

    Raises:
        UserError: the bundle lacks a network of the preset, or has one of another size.
    """
    files = preset(name).files
    for role, file in files.items():
        if role in nets and (wrong := file.contradiction(*nets[role])):
            raise UserError(
                f"preset {name} is of {file.name}, but the {role} network of bundle {bundle} has {wrong}; "
                "use another --preset"
            )
    lacking = [role for role in files if role not in nets]
    if lacking:
        commands = "; ".join(f"dgfast convert {files[role].name} --role {role} --out {bundle}" for role in lacking)
        raise UserError(
            f"preset {name} needs {' and '.join(f'{file.name} as {role}' for role, file in files.items())}; "
            f"bundle {bundle} has no {' and no '.join(lacking)}: {commands}"
        )


def other_files(name: str, provenance: str) -> Iterator[str]:
    """A note for each network that a bundle with this provenance has of another published file than the preset's.

    The same network averaged over another part of its training fits, but draws other images than the preset is for.
    """
    for part in provenance.split("; "):
        role, _, origin = part.partition(": converted from ")
        file, wanted = named(origin), preset(name).files.get(role)
        if file and wanted and file.std and file != wanted:
            yield f"preset {name} is meant for {wanted.name} as {role}, this bundle has {file.name}"
