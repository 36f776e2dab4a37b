"""What a command line of `export/` asks for: a function of a bundle, under the guidances that it names."""

import json
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch

from dgfast import __version__
from dgfast import bundle as bundles
from dgfast.bundle import Bundle
from dgfast.config import GuidanceConfig, SamplingConfig
from dgfast.devices import DTYPES, precision
from dgfast.errors import UserError
from dgfast.export.joint_graph import generator, joint
from dgfast.export.onnx_file import OPSET, export
from dgfast.export.subject import Joint, Subject
from dgfast.graph.agreement import PREDICTS_NOISE
from dgfast.guidance.declaration import overridden
from dgfast.manifest import recorded
from dgfast.networks import load
from dgfast.runtimes.onnx.cuda import FUSED

_SAMPLING = (
    "solver",
    "eta",
    "clip_denoised",
    "diffusion",
    "diffusion_norm",
    "last_step",
)  # what an exported function depends on beside guidance


@dataclass(frozen=True)
class Request:
    """A function of a bundle; see `to_onnx.py` for `what`, None is what the bundle's solver calls."""

    bundle: Bundle
    what: str | None
    sampling: SamplingConfig
    guidance: GuidanceConfig

    def subject(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Subject:
        """The function in eager PyTorch, with weights of that type.

        Raises:
            UserError: the bundle lacks one of its networks, or there is no such function under these settings.
        """
        if self.what == "generator":
            net: Any = self.bundle.load("generator", device, dtype)
            return generator(net)
        return joint(load(self.bundle, device, dtype, self.guidance), self.sampling, self.guidance, self.what)

    def describe(self, subject: Subject) -> dict[str, str]:
        """What a file says of itself, each value as text; numbers and lists as JSON."""
        about = {
            "dgfast": __version__,
            "commit": _commit(),
            "bundle": self.bundle.name,
            "weights_sha256": self.bundle.fingerprint(),
            "what": subject.what,
            "class_names": json.dumps(self.bundle.class_names),
        }
        if not isinstance(subject, Joint):
            return about
        return about | {
            "sigmas": json.dumps(subject.sigmas),
            "weights": json.dumps(subject.weights),
            "sampling": json.dumps(asdict(self.sampling)),
            "guidance": json.dumps(recorded(self.guidance)),
            PREDICTS_NOISE: json.dumps(subject.predicts_noise),
        }

    def write(self, out: Path, *, batch: int | None, dtype: str = "float32", opset: int = OPSET, target: str) -> Path:
        """The function as a proved ONNX file in that folder; says on standard output what is in it and how right it is.

        Args:
            batch: None leaves it open. dtype: "float32" or "fp16". target: "onnxruntime", "onnxruntime-cuda" or
                "tensorrt", which decides how normalisations are written.

        Raises:
            ParityError, UserError: see `onnx_file.export`.
        """
        subject, size = self.subject(), "dynamic" if batch is None else f"b{batch}"
        kind = f"{dtype}-cuda" if target == FUSED else dtype
        path = out / f"{self.bundle.name}-{subject.what}-{size}-{kind}.onnx"
        report = export(
            subject, path, batch=batch, dtype=dtype, opset=opset, target=target,
            metadata=self.describe(subject), say=click.echo,
        )  # fmt: skip
        click.echo(report.table(), nl=False)
        return path

    def package(self, out: Path, *, batch: int, dtype: str, device: torch.device) -> Path:
        """The function as a proved package in that folder; says on standard output how right it is.

        Raises:
            ParityError, UserError: see `package_file.export`.
        """
        from dgfast.export import package_file

        subject, reference = self.subject(device, DTYPES[dtype]), self.subject()
        path = out / f"{self.bundle.name}-{subject.what}-b{batch}-{dtype}-{device.type}.pt2"
        with precision(dtype):  # torch's own default would round convolutions on CUDA by more than what is allowed
            report = package_file.export(
                subject, reference, path, batch=batch, dtype=dtype, device=device, metadata=self.describe(subject)
            )
        click.echo(report.table(), nl=False)
        return path


def read(bundle: str, options: Mapping[str, Any]) -> Request:
    """
    Args:
        options: of a `GuidedCommand`, by name.

    Raises:
        UserError: no such bundle, or options that the function has no use for.
    """
    opened, set_options = bundles.read(bundle), named(options)
    what = set_options.pop("what", None)
    if what == "generator" and set_options:
        raise UserError(
            f"a generator has no solver and no guidance: leave out {spelled(set_options)}, or --what generator"
        )
    sampling = replace(opened.sampling, **{name: set_options.pop(name) for name in _SAMPLING if name in set_options})
    return Request(opened, what, sampling, _possible(opened, overridden(opened.guidance, set_options)))


def named(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those that were given and decide on the function."""
    known = ("what", *_SAMPLING, *asdict(GuidanceConfig()))
    return {name: options[name] for name in known if options.get(name) is not None}


def spelled(given: Mapping[str, Any]) -> str:
    """Options as they stand on the command line."""
    return ", ".join(f"--{name.replace('_', '-')}" for name in given)


def make_folder(out: Path) -> None:
    """
    Raises:
        UserError: it is not there and can't be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}; give another folder") from error


def _possible(bundle: Bundle, guidance: GuidanceConfig) -> GuidanceConfig:
    """The guidance that the bundle has networks for; says what is left out."""
    if "discriminator" in bundle.nets or not (guidance.dg_weight or guidance.dg_weight_2nd):
        return guidance
    click.echo(f"bundle {bundle.name} has no discriminator network: exporting without discriminator guidance", err=True)
    return overridden(guidance, {"dg_weight": 0.0, "dg_weight_2nd": 0.0})


def _commit() -> str:
    """The commit of the checkout that dgfast runs from, or "unknown"."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
