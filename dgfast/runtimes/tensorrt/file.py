"""A built engine on disk: `model.engine`, and beside it `engine.json`, which says what it is and where it may run.

An engine is code for one GPU as its library's builder wrote it, and nothing in it can be checked once it is loaded. So
all that can be judged before is judged before, from `engine.json`. Neither file is proof against somebody who means
harm: load engines only from where you would take a program.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dgfast import bounds
from dgfast.errors import UserError
from dgfast.runtimes.tensorrt.library import FLAVORS

FORMAT = 1
NEVER_EXECUTED = "built, never executed"
EXECUTED = "executed, agrees with the reference"


@dataclass(frozen=True)
class EngineFile:
    """What `engine.json` says.

    Attributes:
        sha256: of the engine beside it.
        flavor, version: the library that built it, which is the only one that loads it unless `version_compatible`.
        dtype: float32, tf32, fp16 or bf16, for its convolutions and matrix products.
        batch: fewest images, the number it is tuned for, and most.
        gpu, capability: name and compute capability of the GPU that it was built on; None: built without one.
        capabilities: compute capabilities that it was built for, such as "8.9"; empty: those its library chose.
        hardware_compatible: "none", "ampere+" or "same-capability".
        parity: `NEVER_EXECUTED` or `EXECUTED`; never_because: what stood in the way.
        tolerance: most that an output may be off, see `agreement`; errors: what it was off by, by output.
        source: sha256 and metadata of the ONNX file that it was made from: bundle, hash of the weights, and so on.
    """

    folder: Path
    sha256: str
    flavor: str
    version: str
    dtype: str
    batch: tuple[int, int, int]
    tolerance: float
    gpu: str | None = None
    capability: str | None = None
    capabilities: tuple[str, ...] = ()
    hardware_compatible: str = "none"
    version_compatible: bool = False
    refit: bool = False
    parity: str = NEVER_EXECUTED
    never_because: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    source: dict[str, str] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        return self.folder / "model.engine"

    @property
    def self_test(self) -> Path:
        """Arrays `input/NAME` and `output/NAME`: what the reference made of some inputs; need not be there."""
        return self.folder / "self_test.npz"

    def write(self) -> None:
        """Write `engine.json`, in one move."""
        raw = {"format": FORMAT} | {name: value for name, value in asdict(self).items() if name != "folder"}
        partial = self.folder / "engine.json.partial"
        partial.write_text(json.dumps(raw, indent=1) + "\n")
        os.replace(partial, self.folder / "engine.json")

    def plan(self) -> bytes:
        """The engine itself.

        Raises:
            UserError: it can't be read, or is not the one that `engine.json` describes.
        """
        with bounds.open_file(self.path) as stream:
            plan = stream.read()
        if hashlib.sha256(plan).hexdigest() != self.sha256:
            raise UserError(f"{self.path}: corrupt, or not the engine that engine.json describes; build it again")
        return plan

    def check_library(self, flavor: str, version: str) -> None:
        """
        Raises:
            UserError: another library than this built it, or another version.
        """
        if flavor != self.flavor:
            raise UserError(f"{self.path}: built by {self.flavor}, which {flavor} can't load")
        if version != self.version and not self.version_compatible:
            raise UserError(
                f"{self.path}: built by {self.flavor} {self.version}, here is {version}, and an engine is for one "
                f"version; install that version, or build it again"
            )

    def check_gpu(self, name: str, capability: str) -> None:
        """
        Raises:
            UserError: it was built for another kind of GPU.
        """
        if self.hardware_compatible == "ampere+" and _number(capability) >= 8.0:
            return
        built_for = self.capabilities or ((self.capability,) if self.flavor == "tensorrt" and self.capability else ())
        if built_for and capability not in built_for:
            on = f" ({self.gpu})" if self.gpu else ""
            raise UserError(
                f"{self.path}: built for compute capability {', '.join(built_for)}{on}, this GPU is a {name} with "
                f"{capability}; build it again here"
            )

    def check_batch(self, batch: int) -> None:
        """
        Raises:
            UserError: the engine does not take batches of that size.
        """
        least, _, most = self.batch
        if not least <= batch <= most:
            raise UserError(
                f"{self.path}: takes batches of {least} to {most} images, not {batch}; use --batch {most} or less, or "
                f"build it again with --batch {least},{batch},{max(most, batch)}"
            )


def read(path: str | Path) -> EngineFile:
    """What stands beside the engine at `path`, which may be the engine, its `engine.json` or their folder.

    Raises:
        UserError: there is none, or it does not say what it must.
    """
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    described = folder / "engine.json"
    try:
        raw: dict[str, Any] = bounds.read_json(described)
        if raw.pop("format") != FORMAT:
            raise UserError(f"{described}: another format than this dgfast reads ({FORMAT}); build the engine again")
        file = EngineFile(folder, **raw | {name: tuple(raw[name]) for name in ("batch", "capabilities")})
        _check(file)
        return file
    except UserError as error:
        hint = "" if described.is_file() else "; python -m dgfast.export.to_trt makes engines"
        raise UserError(f"{error.message}{hint}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{described} is not the description of an engine: {error!r:.300}") from error


def _check(file: EngineFile) -> None:
    """
    Raises:
        ValueError: a value of another type than it must have; names it.
    """
    texts = {name: getattr(file, name) for name in ("sha256", "flavor", "version", "dtype", "hardware_compatible")}
    texts |= {"parity": file.parity, "never_because": file.never_because.replace("\n", "")}
    texts |= {"gpu": file.gpu or "", "capability": file.capability or ""}
    texts |= {f"capabilities {i}": capability for i, capability in enumerate(file.capabilities)}
    for name, text in texts.items():
        if not isinstance(text, str) or not text.isprintable():
            raise ValueError(f"{name} {text!r:.80}")
    if len(file.batch) != 3 or not all(isinstance(size, int) for size in file.batch):
        raise ValueError("batch")
    if not isinstance(file.tolerance, float) or not isinstance(file.source, dict) or not isinstance(file.errors, dict):
        raise ValueError("tolerance, source, errors")
    if file.flavor not in FLAVORS:
        raise ValueError(f"flavor {file.flavor}")


def _number(capability: str) -> float:
    return float(capability)
