"""Sampling from pretrained diffusion models under guidance, fast, and proved equal to the reference."""

from importlib import import_module
from pathlib import Path
from time import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dgfast.config import GuidanceConfig, SamplingConfig
    from dgfast.devices import precision
    from dgfast.errors import UserError
    from dgfast.export.functions import export_onnx, export_package, export_tensorrt
    from dgfast.functions.compiled import compile
    from dgfast.networks import Networks, load
    from dgfast.one_step import OneStep
    from dgfast.outputs import to_uint8
    from dgfast.sampler import Sampler

__version__ = "0.1.0"

IMPORTED_AT = time()
"""Before the first module of dgfast was read: a source that is newer is not what runs here."""

__all__ = [
    "GuidanceConfig",
    "Networks",
    "OneStep",
    "Sampler",
    "SamplingConfig",
    "UserError",
    "compile",
    "export_onnx",
    "export_package",
    "export_tensorrt",
    "load",
    "precision",
    "to_uint8",
]

_HOMES = {
    "GuidanceConfig": "config",
    "Networks": "networks",
    "OneStep": "one_step",
    "Sampler": "sampler",
    "SamplingConfig": "config",
    "UserError": "errors",
    "compile": "functions.compiled",
    "export_onnx": "export.functions",
    "export_package": "export.functions",
    "export_tensorrt": "export.functions",
    "load": "networks",
    "precision": "devices",
    "to_uint8": "outputs",
}


if any(Path(__file__).with_name(link).is_file() for link in ("export", "kernels")):
    raise ImportError(
        "this copy of dgfast was made without symbolic links: dgfast/export and dgfast/kernels are text files. "
        "In a clone, `git config core.symlinks true` and then `git checkout dgfast/export dgfast/kernels` mend that "
        "(on Windows in developer mode); or install a wheel",
        name=__name__,  # so that `python -m` prints the line alone
    )


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def __getattr__(name: str) -> Any:  # torch takes seconds to import, and `--help` does not need it
    if name not in _HOMES:
        raise AttributeError(f"module 'dgfast' has no attribute {name!r}")
    return getattr(import_module(f"dgfast.{_HOMES[name]}"), name)
