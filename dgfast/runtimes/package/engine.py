"""A function in a package, such as `python -m dgfast.export.to_package` writes."""

import io
from collections.abc import Mapping
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from dgfast import bounds
from dgfast.devices import DTYPES, precision
from dgfast.errors import UserError, one_line
from dgfast.graph.agreement import LEAST, PREDICTS_NOISE, least_said, least_sizes, relative_error
from dgfast.runtimes.package.file import Package, add, read

INPUTS, OUTPUTS, TOLERANCE = "inputs", "outputs", "tolerance"
"""Keys of what a package says of itself: names in order, as JSON; and the most that a self-test may be off."""
_SELF_TEST = "self_test.npz"


class PackageEngine:
    """{name: tensor} -> {name: tensor}, as `runtimes.onnx.session.OnnxEngine` is.

    Attributes:
        inputs: sizes and types of its tensors, by name. outputs: names. metadata: what the file says of itself.
        batch: images a call, None for a function of no images. device: where its tensors lie.
    """

    def __init__(self, path: Path, device: torch.device | str = "cpu") -> None:
        """
        Raises:
            UserError: no such file, a damaged one, or one that was made for another PyTorch, processor or GPU.
        """
        self.path, self.device = path, torch.device(device)
        self._package = Package(path, self.device)
        self.metadata, forms = self._package.metadata, self._package.forms
        try:
            names, self.outputs = (bounds.parse_json(self.metadata[key]) for key in (INPUTS, OUTPUTS))
            self.inputs = {name: (form.shape, form.dtype) for name, form in zip(names, forms, strict=True)}
            of_samples = self.metadata.get("what") != "function"
            self.batch = forms[0].shape[0] if of_samples else None
            self._least = least_said(bounds.parse_json(self.metadata.get(LEAST, "{}")))
            self._tolerance, dtype = float(self.metadata[TOLERANCE]), self.metadata["dtype"]
            self._precision = dtype if dtype in DTYPES else "float32"  # a function's may be float64, which never rounds
            if not 0 < self._tolerance < 1 or not self.outputs:
                raise ValueError("no outputs, or a tolerance that allows anything")
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise UserError(f"{path} does not say what its arguments are; make it anew") from error

    def __call__(self, arguments: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs, in the file's own types, on its device.

        Raises:
            UserError: a missing or superfluous input, one of another shape or batch.
        """
        if arguments.keys() != self.inputs.keys():
            raise UserError(f"{self.path}: its inputs are {', '.join(self.inputs)}, not {', '.join(arguments)}")
        for name, (shape, _) in self.inputs.items():
            size = tuple(arguments[name].shape)
            if size[1:] == shape[1:] and size[:1] != shape[:1] == (self.batch,):
                raise UserError(
                    f"{self.path} was made for batches of {self.batch}, not {size[0]}; give --batch {self.batch}, or "
                    f"make one with --batch {size[0]}"
                )
            if size != shape:
                raise UserError(f"{self.path}: {name} has shape {list(size)}, not {list(shape)}")
        with precision(self._precision):  # libraries that its code calls round as torch's flags say at that moment
            results = self._package(*(arguments[name] for name in self.inputs))
        if len(results) != len(self.outputs):
            raise UserError(f"{self.path} returns {len(results)} tensors, and names {len(self.outputs)}; make it anew")
        return dict(zip(self.outputs, results, strict=True))

    def self_test(self) -> None:
        """Run the case that is stored in the file.

        Raises:
            UserError: there is none, or an output that differs; the first is named.
        """
        try:
            with np.load(io.BytesIO(read(self.path, _SELF_TEST)), allow_pickle=False) as stored:
                arrays = {name: torch.from_numpy(stored[name]) for name in stored.files}
            inputs = {name: arrays[f"{INPUTS}/{name}"] for name in self.inputs}
            expected = {name: arrays[f"{OUTPUTS}/{name}"] for name in self.outputs}
        except (KeyError, TypeError, ValueError, EOFError, BadZipFile) as error:
            raise UserError(f"{self.path}: its self-test cannot be read ({one_line(error)}); make it anew") from error
        least = self._least or least_sizes(self.metadata.get(PREDICTS_NOISE) == "true", inputs)
        for name, result in self(inputs).items():
            off = relative_error(result, expected[name], least.get(name))
            if not off <= self._tolerance:
                raise UserError(
                    f"{self.path}: its self-test fails here: output {name} differs by {off:.1e} of its largest value "
                    f"(allowed {self._tolerance:.0e}); make it anew on this machine"
                )


def add_self_test(path: Path, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
    """Put a case into the file that it must reproduce wherever it is opened."""
    named = {f"{INPUTS}/{name}": x for name, x in inputs.items()} | {f"{OUTPUTS}/{n}": x for n, x in outputs.items()}
    content = io.BytesIO()
    np.savez(content, allow_pickle=False, **{name: x.cpu().numpy() for name, x in named.items()})
    add(path, {_SELF_TEST: content.getvalue()})
