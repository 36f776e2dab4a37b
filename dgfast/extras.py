"""Packages that dgfast does without until somebody asks for them, and how to install each."""

from importlib.util import find_spec

from dgfast.errors import UserError

EXTRAS = {
    "diffusers": "latent",
    "matplotlib": "bench",
    "mlxtend": "train",
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "onnxscript": "bench",
    "prdc": "evaluate",
    "torchmetrics": "evaluate",
    "triton": "triton",
}
"""Package to the extra that installs it."""

_BESIDES = {"onnxruntime": " (on a GPU: onnxruntime-gpu instead)", "triton": " (Linux)"}


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
