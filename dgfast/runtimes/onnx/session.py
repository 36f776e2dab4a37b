"""A function in an ONNX file, such as `export/to_onnx.py` writes, in ONNX Runtime.

Tensors are bound where they lie, on the host or on the GPU: nothing is copied between the two.
"""

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dgfast import bounds
from dgfast.errors import UserError, one_line
from dgfast.extras import onnxruntime_for_gpus, require
from dgfast.graph.agreement import LEAST, PREDICTS_NOISE, least_said, least_sizes, relative_error
from dgfast.runtimes.onnx.cuda import FUSED, CudaOptions, Replay, log, suited
from dgfast.runtimes.onnx.file import data_of, said_of

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
_TORCH = {
    "tensor(float)": torch.float32, "tensor(double)": torch.float64, "tensor(float16)": torch.float16,
    "tensor(int64)": torch.int64, "tensor(int32)": torch.int32, "tensor(uint8)": torch.uint8,
    "tensor(bool)": torch.bool,
}  # fmt: skip
KINDS = {dtype: kind for kind, dtype in _TORCH.items()}
"""ONNX Runtime's names of types."""
_LARGEST = 2**28  # elements of a tensor that a file declares, a batch of images: a file may lie


class OnnxEngine:
    """A function in an ONNX file, opened in ONNX Runtime.

    Attributes:
        inputs, outputs: sizes (a name where they are open) and types of its tensors, by name.
        metadata: what was written into it. device: where its tensors lie.
    """

    def __init__(
        self, path: Path, device: torch.device | str = "cpu", provider: str | None = None, threads: int | None = None,
        cuda: CudaOptions | None = None,
    ) -> None:  # fmt: skip
        """
        Args:
            provider: "cpu", "cuda" or "tensorrt"; None: what suits the device.
            threads: that share each operation; None: PyTorch's number.
            cuda: options of the CUDA provider; None: what suits the file.

        Raises:
            UserError: no such file, not an ONNX file, one that ONNX Runtime refuses, or it has no such provider.
        """
        require("onnxruntime")
        self.path, self.device = path, _numbered(torch.device(device))
        if not path.is_file():
            raise UserError(f"{path}: no such file; export one with python -m dgfast.export.to_onnx")
        self._threads, self._name = threads or torch.get_num_threads(), provider or self.device.type
        self._replay: Replay | None = None
        said = said_of(path)
        if self._name == "cpu" and said.get("for") == FUSED:
            raise UserError(f"{path} is for ONNX Runtime's CUDA provider alone; export another without --for {FUSED}")
        self._cuda = (cuda or suited(said)) if self._name != "cpu" else CudaOptions(graph=False)
        if self._name != "cuda":  # beside another provider nothing is captured
            self._cuda = replace(self._cuda, graph=False)
        self._open()
        if not self.inputs or not self.outputs:
            raise UserError(f"{path} has no input or no output; export it anew")
        if not all(text.replace("\n", "").isprintable() for pair in self.metadata.items() for text in pair):
            raise UserError(f"{path} says of itself what cannot be shown; export it anew")
        for name, (shape, kind) in [*self.inputs.items(), *self.outputs.items()]:
            _check_declared(path, name, shape, kind)

    @property
    def batch(self) -> int | None:
        """The batch size that the file was made for; None where it is open."""
        first = next(iter(self.inputs.values()))[0]
        return first[0] if first and isinstance(first[0], int) else None

    def __call__(self, arguments: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs, in the file's own types, on its device.

        Raises:
            UserError: a missing or superfluous input, one of another shape or batch, or ONNX Runtime fails.
        """
        if arguments.keys() != self.inputs.keys():
            raise UserError(f"{self.path}: its inputs are {', '.join(self.inputs)}, not {', '.join(arguments)}")
        bound: dict[str, Tensor] = {}
        for name, (shape, kind) in self.inputs.items():
            bound[name] = arguments[name].to(self.device, _TORCH[kind]).contiguous()
            self._check(name, bound[name], shape)
        try:
            return self._compute(bound)
        except Exception as error:
            if not self._cuda.graph:
                raise UserError(f"{self.path}: ONNX Runtime failed: {_line(error)}") from error
            self._give_up_graph(error)
            return self(arguments)

    def _open(self) -> None:
        """Make the session, without a CUDA graph where it refuses one."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        # Threads that spin until the next operation save a wake-up each time; those that go on after a call hold the
        # cores that PyTorch's own need between two calls.
        options.add_session_config_entry("session.intra_op.spin_duration_us", "300")
        options.log_severity_level = 4  # its errors are raised too, and one line is enough
        if self._name != "cpu":
            onnxruntime.set_default_logger_severity(4)  # which convolutions write to, not to the session's
        preferred = providers(self._name, self.device, self._cuda)
        try:
            self._session = onnxruntime.InferenceSession(
                str(self.path), options, providers=preferred, enable_fallback=0
            )
            _require_started(preferred[0][0], self._session.get_providers())
            self.inputs, self.outputs = (
                {v.name: (tuple(v.shape), v.type) for v in values}
                for values in (self._session.get_inputs(), self._session.get_outputs())
            )
            self.metadata: dict[str, str] = dict(self._session.get_modelmeta().custom_metadata_map)
        except UserError:
            raise
        except Exception as error:  # onnxruntime's exceptions have no base class of their own
            if not self._cuda.graph:
                raise UserError(_refusal(self.path, error)) from error
            self._give_up_graph(error)

    def _give_up_graph(self, error: Exception) -> None:
        """Open the file anew without a CUDA graph, which saves the time of its launches and changes nothing else."""
        log.warning(f"{self.path}: ONNX Runtime does not capture it in a CUDA graph ({_line(error)})")
        self._cuda, self._replay = replace(self._cuda, graph=False), None
        self._open()

    def _compute(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self._replay is not None:
            return self._replay(inputs)
        batch, results = self._samples(inputs), dict[str, Tensor]()
        for name, (shape, kind) in self.outputs.items():
            sizes = [batch if isinstance(size, str) else size for size in shape]
            results[name] = torch.empty(sizes, dtype=_TORCH[kind], device=self.device)
        if self._cuda.graph:
            self._replay = Replay(self._run, results)
            return self._replay(inputs)
        self._run(inputs, results)
        return results

    def _run(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        if self.device.type == "cuda":
            # ONNX Runtime has a stream of its own, on which binding may copy already, and waits for it when it has run.
            torch.cuda.current_stream(self.device).synchronize()
        binding = self._session.io_binding()
        for name, tensor in inputs.items():
            binding.bind_input(name, *self._place(tensor))
        for name, tensor in outputs.items():
            binding.bind_output(name, *self._place(tensor))
        self._session.run_with_iobinding(binding)

    def self_test(self) -> None:
        """Run the case that is stored in the file.

        Raises:
            UserError: there is none, or an output that differs; the first is named.
        """
        stored, arguments = self.stored_case(), self.stored_inputs()
        results, tolerance = self(arguments), float(stored["tolerance"])
        least = stored["least"] or least_sizes(self.metadata.get(PREDICTS_NOISE) == "true", arguments)
        for name, found in results.items():
            wanted = _stored(stored["outputs"][name], *self.outputs[name], self.batch)
            error = relative_error(found, wanted, least.get(name))
            if not error <= tolerance:
                raise UserError(
                    f"{self.path}: its self-test fails here: output {name} differs by {error:.1e} of its largest value "
                    f"(allowed {tolerance:.0e}); another version of ONNX Runtime, or a damaged file: export it anew"
                )

    def stored_inputs(self) -> dict[str, Tensor]:
        """Inputs of the self-test, by name."""
        texts = self.stored_case()["inputs"]
        return {name: _stored(texts[name], *self.inputs[name], self.batch) for name in self.inputs}

    def stored_case(self) -> dict[str, Any]:
        """The self-test as it was written: tolerance, inputs and outputs of one sample; and what is said as `LEAST`."""
        try:
            stored = bounds.parse_json(self.metadata["self_test"])
            complete = stored["inputs"].keys() == self.inputs.keys() and stored["outputs"].keys() == self.outputs.keys()
            if not complete or not 0 < float(stored["tolerance"]) < 1:
                raise ValueError("it does not fit the file")
            stored["least"] = least_said(bounds.parse_json(self.metadata.get(LEAST, "{}")))
        except (ArithmeticError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{self.path}: no self-test of dgfast in it ({_line(error)}); export it anew") from error
        return stored

    def _samples(self, inputs: Mapping[str, Tensor]) -> int:
        """How many there are in a call of a file that leaves that open; 0 for any other."""
        return next((len(inputs[n]) for n, (shape, _) in self.inputs.items() if shape and isinstance(shape[0], str)), 0)

    def _check(self, name: str, tensor: Tensor, shape: Sequence[int | str]) -> None:
        of_samples = self.metadata.get("what") != "function" and tensor.dim()
        if name == next(iter(self.inputs)) and of_samples and self.batch not in (None, len(tensor)):
            raise UserError(
                f"{self.path} was made for batches of {self.batch}, not {len(tensor)}; "
                f"give --batch {self.batch}, or export with --batch dynamic"
            )
        fits = tensor.dim() == len(shape) and all(
            isinstance(expected, str) or expected == size for expected, size in zip(shape, tensor.shape, strict=True)
        )
        if not fits:
            raise UserError(f"{self.path}: {name} has shape {list(tensor.shape)}, not {list(shape)}")

    def _place(self, tensor: Tensor) -> tuple[Any, ...]:
        kind = np.dtype(str(tensor.dtype).removeprefix("torch.")).type
        return self.device.type, self.device.index or 0, kind, tuple(tensor.shape), tensor.data_ptr()


def stored_tensor(tensor: Tensor, whole: bool = False) -> str:
    """The first sample of a tensor, or all of it, as text for the self-test."""
    kept = tensor if whole else tensor[:1]
    return base64.b64encode(kept.detach().cpu().contiguous().numpy().tobytes()).decode()


def _stored(text: str, shape: Sequence[int | str], kind: str, batch: int | None) -> Tensor:
    """What `stored_tensor` wrote; of one sample, once for every sample of the file's batch."""
    sizes = [1, *(size for size in shape[1:] if isinstance(size, int))]
    whole = [1 if isinstance(size, str) else size for size in shape]
    dtype = np.dtype(str(_TORCH[kind]).removeprefix("torch."))
    try:
        raw = base64.b64decode(text, validate=True)
    except (TypeError, ValueError):
        raw = b""
    if len(raw) == math.prod(whole) * dtype.itemsize:
        return torch.from_numpy(np.frombuffer(raw, dtype).reshape(whole).copy())
    if len(sizes) != len(shape) or len(raw) != math.prod(sizes) * dtype.itemsize:
        raise UserError("the self-test in this file does not fit its shapes; export it anew")
    tensor = torch.from_numpy(np.frombuffer(raw, dtype).reshape(sizes).copy())
    return tensor.expand(batch or 1, *sizes[1:]) if shape[0] != 1 else tensor


def _check_declared(path: Path, name: str, shape: Sequence[int | str | None], kind: str) -> None:
    """
    Raises:
        UserError: a tensor of another type than dgfast exports, without a size, or too large to be one.
    """
    if kind not in _TORCH:
        raise UserError(f"{path}: {name!r:.80} is a {kind}, which no file of dgfast has")
    sizes = [size for size in shape if not isinstance(size, str)]
    if not all(isinstance(size, int) and size > 0 for size in sizes) or math.prod(sizes) > _LARGEST:  # type: ignore[arg-type]
        raise UserError(f"{path}: {name!r:.80} has the shape {list(shape)}, which no file of dgfast has")


def providers(name: str, device: torch.device, cuda: CudaOptions | None = None) -> list[Any]:
    """Those of ONNX Runtime to ask for, by preference, with their options.

    Raises:
        UserError: this ONNX Runtime has no provider of that name.
    """
    import onnxruntime

    provider, present = PROVIDERS.get(name, name), onnxruntime.get_available_providers()
    if provider not in present:
        here = ", ".join(sorted(k for k, v in PROVIDERS.items() if v in present))
        raise UserError(f"this ONNX Runtime has no {name} provider (it has {here}): {onnxruntime_for_gpus()}")
    if name == "cpu":
        return [(provider, {})]
    place = {"device_id": device.index or 0}
    on_cuda = PROVIDERS["cuda"], place | (cuda or CudaOptions()).provider_options()
    return [on_cuda] if name == "cuda" else [(provider, place), on_cuda]  # CUDA takes what TensorRT leaves


def _require_started(wanted: str, started: Sequence[str]) -> None:
    """Raises UserError where ONNX Runtime went on without a provider whose libraries do not load."""
    if wanted not in started:
        raise UserError(
            f"{wanted} of ONNX Runtime did not start, only {', '.join(started)}: its CUDA, cuDNN or TensorRT "
            f"libraries do not load here, or are for another CUDA than this PyTorch's: {onnxruntime_for_gpus()}"
        )


def _numbered(device: torch.device) -> torch.device:
    """Which GPU "cuda" is: ONNX Runtime has no current one."""
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device


def _refusal(path: Path, error: Exception) -> str:
    """What to say of a file that ONNX Runtime does not open."""
    data = data_of(path)
    if "external" not in str(error).lower():
        return f"{path}: ONNX Runtime does not open it ({_line(error)}); export it anew"
    state = "is not the one that was written with it" if data.is_file() else "is missing"
    return f"{path}: its weights are in {data.name} beside it, which {state}; copy both together, or export it anew"


def _line(error: BaseException) -> str:
    return one_line((str(error).strip().splitlines() or [type(error).__name__])[0])
