"""From an ONNX file to an engine, by the interface that TensorRT and TensorRT for RTX share.

Networks are strongly typed: each tensor keeps the type that the ONNX file gives it, and the builder may lower none.
Newer versions of both libraries know nothing else. So what has to stay float32 is said in the file: `half_products`.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgfast.errors import UserError
from dgfast.runtimes.tensorrt.library import FLAVORS, Layer, deserialize, layers, listener, obstacles

HARDWARE = {"none": "NONE", "ampere+": "AMPERE_PLUS", "same-capability": "SAME_COMPUTE_CAPABILITY"}


@dataclass(frozen=True)
class Options:
    """How to build.

    Attributes:
        batch: fewest images, the number to tune for, and most.
        tf32: let float32 matrix products round their inputs to 10 bits.
        refit: keep the weights exchangeable.
        version_compatible: let later versions of the library load it.
        hardware_compatible: a key of `HARDWARE`: on which other GPUs it may run.
        capabilities: compute capabilities to build for, such as "8.9"; empty: the library's choice.
        timing_cache: file with what earlier builds measured; read if it is there, written afterwards.
    """

    batch: tuple[int, int, int]
    tf32: bool = False
    refit: bool = False
    version_compatible: bool = False
    hardware_compatible: str = "none"
    capabilities: tuple[str, ...] = ()
    timing_cache: Path | None = None

    def check(self, flavor: str) -> None:
        """
        Raises:
            UserError: the batch is in no order, or the flavor does not know one of the options.
        """
        least, best, most = self.batch
        if not 1 <= least <= best <= most:
            raise UserError(f"--batch {least},{best},{most}: expected 1 <= least <= best <= most")
        title, by_capability = FLAVORS[flavor].title, FLAVORS[flavor].capabilities
        refused = {
            "--capability": bool(self.capabilities) and not by_capability,
            "--hardware-compatible": self.hardware_compatible != "none" and by_capability,
            "--version-compatible": self.version_compatible and by_capability,
            "--timing-cache": self.timing_cache is not None and by_capability,
        }
        for option, given in refused.items():
            if given:
                raise UserError(f"{option}: {title} has no such thing; {_INSTEAD[option]}")


_INSTEAD = {
    "--capability": "build on the GPU that it is for, or use --hardware-compatible",
    "--hardware-compatible": "its engines run on every GPU that it supports; --capability narrows that",
    "--version-compatible": "build an engine for every version",
    "--timing-cache": "it measures on the GPU, when the engine runs",
}


@dataclass(frozen=True)
class Built:
    """An engine and what its builder says of it.

    Attributes:
        plan: the engine. obstacles: why it can't run on this machine; empty if it can.
        parsed_layers: of the network before the builder fused them. layers: of the engine.
        batch: the sizes that it takes; all equal where the ONNX file has a fixed one.
    """

    plan: bytes
    obstacles: list[str]
    parsed_layers: int
    layers: list[Layer]
    batch: tuple[int, int, int]
    seconds: float


def parse(trt: Any, onnx: Path) -> int:
    """Read an ONNX file as the library does, and build nothing; the number of the network's layers.

    Raises:
        UserError: it refuses the file; a line for each reason.
    """
    heard = listener(trt)
    with _network(trt, onnx, heard) as (_, network):
        return int(network.num_layers)


def build(trt: Any, flavor: str, onnx: Path, options: Options) -> Built:
    """
    Raises:
        UserError: the library refuses the file or an option; says why.
    """
    options.check(flavor)
    heard = listener(trt)
    began = time.perf_counter()
    with _network(trt, onnx, heard) as (builder, network):
        config = _config(trt, builder, options)
        batch = _add_profile(builder, network, config, options.batch)
        parsed = int(network.num_layers)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise UserError(_build_failed(onnx, heard, options))
        if options.timing_cache is not None:
            options.timing_cache.write_bytes(bytes(config.get_timing_cache().serialize()))
    plan, seconds = bytes(plan), time.perf_counter() - began
    why = _obstacles(trt, plan, heard)
    text = heard.layers if why else _inspect(trt, plan, heard)
    return Built(plan, why, parsed, layers(text), batch, seconds)


@contextmanager
def _network(trt: Any, onnx: Path, heard: Any) -> Iterator[tuple[Any, Any]]:
    """Builder and parsed network, which live as long as the parser does."""
    if not onnx.is_file():
        raise UserError(f"{onnx}: no such file")
    try:
        builder = trt.Builder(heard)
    except (RuntimeError, TypeError) as error:  # TensorRT itself builds only beside a GPU
        reason = next(iter(heard.errors()), str(error).splitlines()[0])
        raise UserError(f"{trt.__name__} can't build here: {reason}; build on a machine with a GPU") from error
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, heard)
    if not parser.parse_from_file(str(onnx)):
        raise UserError("\n".join([f"{onnx}: {trt.__name__} {trt.__version__} can't read this:", *_complaints(parser)]))
    yield builder, network


def _complaints(parser: Any) -> list[str]:
    """The parser's errors, each in a line, with the node that they are about."""
    lines = []
    for error in map(parser.get_error, range(parser.num_errors)):
        node = f"{error.node_operator()} node {error.node_name() or error.node()}: " if error.node_operator() else ""
        lines.append(f"  {node}{error.code().name}: {' '.join(error.desc().split())}")
    return lines


def _config(trt: Any, builder: Any, options: Options) -> Any:
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # or layers would be without their types
    config.clear_flag(trt.BuilderFlag.TF32)
    flags = {
        trt.BuilderFlag.TF32: options.tf32, trt.BuilderFlag.REFIT: options.refit,
        trt.BuilderFlag.VERSION_COMPATIBLE: options.version_compatible,
    }  # fmt: skip
    for flag in (flag for flag, wanted in flags.items() if wanted):
        config.set_flag(flag)
    if options.hardware_compatible != "none":
        level = HARDWARE[options.hardware_compatible]
        config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, level)
    if options.capabilities:
        _set_capabilities(trt, config, options.capabilities)
    if options.timing_cache is not None:
        known = options.timing_cache.read_bytes() if options.timing_cache.is_file() else b""
        if not config.set_timing_cache(config.create_timing_cache(known), ignore_mismatch=False):
            raise UserError(f"{options.timing_cache}: not a timing cache of this GPU and version; delete it")
    return config


def _set_capabilities(trt: Any, config: Any, capabilities: tuple[str, ...]) -> None:
    by_capability = {
        f"{name[2:-1]}.{name[-1]}": value
        for name, value in trt.ComputeCapability.__members__.items()
        if name.startswith("SM")
    }
    unknown = [capability for capability in capabilities if capability not in by_capability]
    if unknown:
        raise UserError(
            f"--capability {', '.join(unknown)}: {trt.__name__} {trt.__version__} builds for {', '.join(by_capability)}"
        )
    config.num_compute_capabilities = len(capabilities)
    for index, capability in enumerate(capabilities):
        config.set_compute_capability(by_capability[capability], index)


def _add_profile(builder: Any, network: Any, config: Any, batch: tuple[int, int, int]) -> tuple[int, int, int]:
    """Say between which batch sizes the engine must work; what it really takes."""
    shapes = {tensor.name: tuple(tensor.shape) for tensor in map(network.get_input, range(network.num_inputs))}
    open_inputs = {name: shape for name, shape in shapes.items() if -1 in shape}
    for name, shape in open_inputs.items():
        if -1 in shape[1:]:
            raise UserError(f"input {name} has the shape {shape}: only its first axis, the batch, may be open")
    if not open_inputs:
        fixed = next(shape[0] for shape in shapes.values() if shape)
        return fixed, fixed, fixed
    profile = builder.create_optimization_profile()
    for name, shape in open_inputs.items():
        profile.set_shape(name, *((size, *shape[1:]) for size in batch))
    config.add_optimization_profile(profile)
    return batch


def _build_failed(onnx: Path, heard: Any, options: Options) -> str:
    reason = next(iter(heard.errors()), "no reason given")
    needs_gpu = "; with --refit this library may need a GPU to build" if options.refit and not _has_gpu() else ""
    return f"{onnx}: the builder failed: {reason}{needs_gpu}"


def _obstacles(trt: Any, plan: bytes, heard: Any) -> list[str]:
    return obstacles(trt, plan, heard) if _has_gpu() else ["no CUDA GPU on this machine"]


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _inspect(trt: Any, plan: bytes, heard: Any) -> str:
    """The engine's layers, by the library's inspector, which needs a GPU; the builder's log has the same text."""
    inspector = deserialize(trt, plan, heard, "the new engine").create_engine_inspector()
    return str(inspector.get_engine_information(trt.LayerInformationFormat.ONELINE))
