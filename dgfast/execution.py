"""What executes a job, as a command line asks for it: a runtime, ONNX Runtime's provider, an engine file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from dgfast.errors import UserError
from dgfast.runtimes import RUNTIMES, Runtime

if TYPE_CHECKING:
    import torch

    from dgfast.bundle import Bundle
    from dgfast.settings import Settings

PROVIDERS = ("cpu", "cuda", "tensorrt")


@dataclass(frozen=True)
class Execution:
    """What executes a job's functions.

    Attributes:
        name: of the runtime. provider: ONNX Runtime's; None: the device's.
        engine: the file that stands in for the functions, if there is one; see `engines.Engine`.
    """

    name: str
    provider: str | None = None
    engine: Any = None

    @classmethod
    def asked(cls, options: Mapping[str, Any], device: torch.device) -> Execution:
        """What the options ask for; a file is opened and tested.

        Raises:
            UserError: options that contradict one another, or a file that can't be had.
        """
        short = "compiled" if options["compiled"] else None
        name, provider = options["runtime"] or short or "eager", options["provider"]
        if short not in (None, name):
            raise UserError(f"--compile and --runtime {name} contradict each other; give one of them")
        for option, runtimes in (("engine", [r.name for r in RUNTIMES.values() if r.open]), ("provider", ["onnx"])):
            if options[option] and name not in runtimes:
                raise UserError(f"--{option} goes with --runtime {' or '.join(runtimes)}, not with {name}")
        if name == "tensorrt" and not options["engine"]:
            raise UserError("--runtime tensorrt needs --engine FILE: build one with python -m dgfast.export.to_trt")
        if not options["engine"]:
            return cls(name, provider)
        opened = RUNTIMES[name].open
        assert opened is not None, "the options were checked"
        engine = opened(options["engine"], device, *([provider] if provider else []))
        engine.self_test()
        return cls(name, provider, engine)

    def runtime(self, name: str) -> Runtime:
        """The runtime of that name; with an engine file, but for eager mode, what executes that file."""
        if self.engine is not None and name != "eager":
            from dgfast.engines import runtime_of

            return runtime_of(self.engine)
        if self.provider is None:
            return RUNTIMES[name]
        from dgfast.runtimes.onnx.build import build

        return replace(RUNTIMES[name], build=partial(build, provider=self.provider))

    def require_fit(self, bundle: Bundle, settings: Settings | None) -> None:
        """Raises UserError if the file does not fit the job; without settings, that is a one-step generator's."""
        from dgfast.engines import require_fit, require_generator

        if settings is None:
            require_generator(self.engine, bundle)
        else:
            require_fit(self.engine, bundle, *settings)

    def dtype(self, asked: str) -> str:
        """The type that the file computes in, which decides on the images whatever --dtype is by default.

        Raises:
            UserError: another was asked for.
        """
        said = str(self.engine.metadata.get("dtype", asked))
        source = click.get_current_context().get_parameter_source("dtype")
        if said != asked and source is not click.core.ParameterSource.DEFAULT:
            raise UserError(
                f"--dtype {asked}: {self.engine.path} computes in {said}; leave --dtype out, or export another file"
            )
        return said
