"""Packages that dgfast does without until somebody asks for them, and how to install each."""

from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec

from dgfast.errors import UserError

EXTRAS = {
    "diffusers": "latent",
    "matplotlib": "report",
    "mlxtend": "train",
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "onnxscript": "bench",
    "prdc": "evaluate",
    "torchmetrics": "evaluate",
    "triton": "triton",
}
"""Package to the extra that installs it."""

_BESIDES = {"onnxruntime": " (on a GPU: 'dgfast[onnx-gpu]' instead)", "triton": " (Linux)"}
_ONNX_RUNTIMES = "onnxruntime", "onnxruntime-gpu"


def require(*packages: str) -> None:
    """Make sure that these packages are there, before work begins that needs them.

    Raises:
        UserError: one is not installed; names the extra that installs it.
    """
    for package in packages:
        if find_spec(package) is None:
            raise UserError(f"{package} is not installed: {how_to_install(package)}")


def how_to_install(package: str) -> str:
    """The command that installs one of `EXTRAS`."""
    return f"pip install 'dgfast[{EXTRAS[package]}]'{_BESIDES.get(package, '')}"


def onnxruntime_for_gpus() -> str:
    """How to come by an ONNX Runtime that knows GPUs, where the one here does not."""
    installed = [package for package in _ONNX_RUNTIMES if _is_installed(package)]
    both = "onnxruntime and onnxruntime-gpu share a folder and break each other: " if len(installed) > 1 else ""
    first = f"pip uninstall {' '.join(installed)}, then " if "onnxruntime" in installed else ""
    return f"{both}{first}pip install 'dgfast[onnx-gpu]', or use --device cpu"


def _is_installed(package: str) -> bool:
    try:
        distribution(package)
    except PackageNotFoundError:
        return False
    return True
