"""Errors against eager float32 by noise level, a part of benchmarks/gpu.py: of a guided call, and of a run's state."""

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.measure import PRECISIONS, precision, relative_error
from benchmarks.part import Rows, Setting
from benchmarks.runtimes import RUNTIMES
from benchmarks.subjects import guided_function, guided_levels, noise_at
from benchmarks.workloads import WORKLOADS, Workload
from dgfast import Networks, Sampler
from dgfast.ops import kernels
from dgfast.runtimes import Runtime

Results = dict[float, list[Tensor]]
"""By noise level."""


def parity(at: Setting) -> Rows:
    """Every number format, eager and compiled, on the shipped bundle."""
    workload, seeds = WORKLOADS["tiny" if at.small else "mnist32"](), range(at.batch(8))
    with precision("float32"), kernels("reference"):
        exact = workload.load(at.device, torch.float32)
        calls = _calls(workload, exact, RUNTIMES["eager"], seeds, at.device)
        states = _states(workload, exact, RUNTIMES["eager"], seeds, at.device)
    errors: dict[str, tuple[list[float], list[float]]] = {}
    for name in ("float32", "tf32", "bf16"):
        with precision(name):
            networks = workload.load(at.device, PRECISIONS[name])
            for way in dict.fromkeys(("eager", at.runtime)):
                errors[f"{way} {name}"] = (
                    _errors(_calls(workload, networks, RUNTIMES[way], seeds, at.device), calls),
                    _errors(_states(workload, networks, RUNTIMES[way], seeds, at.device), states),
                )
    for i, (what, truth) in enumerate((("call", calls), ("state", states))):
        for k, sigma in enumerate(truth):
            yield {f"sigma, error of the {what}": sigma, **{name: pair[i][k] for name, pair in errors.items()}}


def _calls(
    workload: Workload, networks: Networks, runtime: Runtime, seeds: Sequence[int], device: torch.device
) -> Results:
    """Results of one guided call."""
    levels = guided_levels(workload, networks, device)
    arguments = [noise_at([level] * len(seeds), networks, seeds, device) for level in levels]
    call = runtime.whole(guided_function(workload, networks, True, device), arguments[0])
    with torch.no_grad():
        return {
            level: [result.clone() for result in call(*given)] for level, given in zip(levels, arguments, strict=True)
        }


def _states(
    workload: Workload, networks: Networks, runtime: Runtime, seeds: Sequence[int], device: torch.device
) -> Results:
    """The solver's state when it arrives there, 0 for the images."""
    sampler = Sampler(networks, workload.sampling, workload.guidance, device, runtime)
    levels = [*(step.sigma for step in sampler.steps[1:]), 0.0]
    states: Results = {}
    sampler(seeds, on_step=lambda step, x, *_: states.update({levels[step.index]: [x.clone()]}))
    return states


def _errors(tried: Results, truth: Results) -> list[float]:
    return [relative_error(tried[sigma], truth[sigma]) for sigma in truth]
