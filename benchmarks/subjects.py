"""The two things whose speed matters: one call of the guided denoiser, and a whole sampling run."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.lab import Subject
from benchmarks.measure import Call
from benchmarks.workloads import Workload, flops
from dgfast import GuidanceConfig, Networks, Sampler
from dgfast.graph import Function
from dgfast.job import Job
from dgfast.networks import image_shape
from dgfast.plan import Step
from dgfast.randomness import SeedStreams
from dgfast.runtimes import RUNTIMES, Runtime

Arguments = tuple[Tensor, Tensor, Tensor | None]


def guided_function(workload: Workload, networks: Networks, guided: bool, device: torch.device) -> Function:
    """The function that a sampler calls in its guided steps, or the same without guidance."""
    job = Job(networks, workload.sampling, workload.guidance, device)
    return job.guided("denoiser", _guided_steps(job)[0].predictor if guided else ())


def guided_levels(workload: Workload, networks: Networks, device: torch.device) -> list[float]:
    """The noise levels at which a sampler calls it."""
    return [step.sigma for step in _guided_steps(Job(networks, workload.sampling, workload.guidance, device))]


def noise_at(levels: Sequence[float], networks: Networks, seeds: Sequence[int], device: torch.device) -> Arguments:
    """Noise and, for a conditional network, a class of every seed, at one level a seed."""
    net, streams = networks.denoiser, SeedStreams(seeds)
    sigma = torch.tensor(levels, dtype=torch.float64, device=device)
    noise = streams.normal(image_shape(net), sigma.dtype, device)
    labels = streams.labels(net.label_dim).to(device) if net.label_dim else None
    one_hot = None if labels is None else F.one_hot(labels, net.label_dim).float()
    return sigma.view(-1, 1, 1, 1) * noise, sigma, one_hot


def _guided_steps(job: Job) -> list[Step]:
    """Steps of the plan whose first call is guided."""
    return [step for step in job.steps if step.predictor]


def _guided_call(
    workload: Workload, networks: Networks, guided: bool, seeds: Sequence[int], device: torch.device
) -> tuple[Function, Arguments]:
    """The function and noise for it, each seed at a level of its own."""
    levels = guided_levels(workload, networks, device)
    order = torch.randperm(len(levels), generator=torch.Generator().manual_seed(0)).tolist()
    chosen = [levels[order[seed % len(levels)]] for seed in seeds]
    return guided_function(workload, networks, guided, device), noise_at(chosen, networks, seeds, device)


def _prepare_step(
    workload: Workload, networks: Networks, runtime: Runtime, guided: bool, seeds: Sequence[int], device: torch.device
) -> Call:
    function, arguments = _guided_call(workload, networks, guided, seeds, device)
    built = runtime.whole(function, arguments)

    def call() -> Sequence[Tensor]:
        with torch.no_grad():
            return built(*arguments)

    return call


def _step_flops(workload: Workload, networks: Networks, guided: bool, device: torch.device) -> int:
    function, arguments = _guided_call(workload, networks, guided, [0], device)
    return flops(function, *arguments)


def _sampler(workload: Workload, networks: Networks, runtime: Runtime, guided: bool, device: torch.device) -> Sampler:
    guidance = workload.guidance if guided else GuidanceConfig()
    return Sampler(networks, workload.sampling, guidance, device, runtime)


def _prepare_sampler(
    workload: Workload, networks: Networks, runtime: Runtime, guided: bool, seeds: Sequence[int], device: torch.device
) -> Call:
    sampler = _sampler(workload, networks, runtime, guided, device)
    sampler.prepare(len(seeds))
    return lambda: [sampler(seeds)]


def _sampler_flops(workload: Workload, networks: Networks, guided: bool, device: torch.device) -> int:
    sampler = _sampler(workload, networks, RUNTIMES["eager"], guided, device)
    unguided, whole = (_step_flops(workload, networks, g, device) for g in (False, True))
    return sampler.score_evaluations * unguided + sampler.guidance_gradients * (whole - unguided)


GUIDED_STEP = Subject("guided-step", _prepare_step, _step_flops, amplification=1)
SAMPLER = Subject("sampler", _prepare_sampler, _sampler_flops, amplification=100)
