"""What is exported: the guided denoiser or posterior, or a whole step, with guidance weights as inputs.

Each is one pure function of named tensors, gradient and window included, so that one file serves every noise level and
every weight. Lowering its gradient to inference operations is `dgfast.graph` and `dgfast.runtimes.onnx.operations`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dgfast.config import GuidanceConfig, SamplingConfig
from dgfast.denoiser import EDMPrecond, Preconditioner
from dgfast.engines import DENOISER, POSTERIOR
from dgfast.errors import UserError
from dgfast.export.subject import Function, GeneratorSubject, Joint
from dgfast.guidance import Guidance, guided_denoiser, guided_posterior
from dgfast.guidance.weights import weights, with_weights
from dgfast.networks import Networks
from dgfast.noise_levels import coordinates, sigma_bounds
from dgfast.one_step import GeneratorNet
from dgfast.plan import all_guidances, boosted, class_count
from dgfast.sampler import Sampler
from dgfast.solvers import LAST, SOLVERS, Call, Solver

_OUTPUTS: dict[str, tuple[str, ...]] = {
    "denoiser": ("denoised", "log_ratio"),
    "posterior": ("denoised", "shift", "variance", "log_ratio"),
}


def joint(networks: Networks, sampling: SamplingConfig, guidance: GuidanceConfig, what: str | None = None) -> Joint:
    """The function `what` under the guidances whose weights are on.

    Args:
        what: "denoiser", "posterior" or "step"; None: what the solver calls.

    Raises:
        UserError: a missing network, or a plan whose steps are not all alike.
    """
    solver = SOLVERS[sampling.solver]
    what = what or solver.function
    plan = Sampler(networks, sampling, guidance).steps
    first, second = all_guidances(networks, guidance)
    predictor = boosted(first) if guidance.boosting else first
    classes, side = class_count(networks, guidance), networks.denoiser.img_resolution
    labels = ("class_labels",) if classes else ()
    outputs: tuple[str, ...]
    if what == "step":
        _require_plain_steps(sampling, guidance)
        made = solver(sampling, coordinates(sampling, *sigma_bounds(sampling, *_known(networks))))
        used = weights(predictor) | (weights(second, second=True) if solver.points == 2 else {})
        inputs: tuple[str, ...] = ("x", "sigma", "sigma_next", *labels, *made.inputs, *used)
        function = _step(networks, made, predictor, second, inputs)
        outputs = ("x_next", "denoised") if LAST[0] in made.inputs else ("x_next",)  # it is the next step's LAST
    else:
        chosen = max(predictor, second, key=len)  # they differ by the discriminator alone, whose weight is an input
        used = weights(chosen)
        state = POSTERIOR if what == "posterior" else DENOISER
        inputs = (*(name for name in state if name != "class_labels" or labels), *used)
        function, outputs = _guided(networks, sampling.clip_denoised, chosen, state, inputs), _OUTPUTS[what]
    return Joint(
        what, function, inputs, outputs, used, (*(step.sigma for step in plan), 0.0),
        (networks.denoiser.img_channels, side, side), classes,
        isinstance(networks.denoiser, Preconditioner) and not isinstance(networks.denoiser, EDMPrecond),
    )  # fmt: skip


def generator(net: GeneratorNet) -> GeneratorSubject:
    """The one-step generator, (latents, class_labels) -> images."""
    labels = ("class_labels",) if net.label_dim else ()

    def generate(*arguments: Tensor) -> tuple[Tensor]:
        return (net(arguments[0], arguments[1] if labels else None),)

    with torch.no_grad():
        image = generate(torch.zeros(1, net.latent_dim), torch.zeros(1, net.label_dim))[0].shape[1:]
    return GeneratorSubject(generate, ("latents", *labels), net.latent_dim, net.label_dim, tuple(image))


def _guided(
    networks: Networks, clip: bool, guidances: Sequence[Guidance], state: Sequence[str], names: Sequence[str]
) -> Function:
    make: Callable[..., Any] = guided_posterior if "log_least" in state else guided_denoiser

    def guided(*arguments: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(names, arguments, strict=True))
        function = make(networks.denoiser, with_weights(guidances, given), clip)
        results: tuple[Tensor, ...] = function(*(given.get(name) for name in state))
        return results

    return guided


def _require_plain_steps(sampling: SamplingConfig, guidance: GuidanceConfig) -> None:
    if sampling.schedule != "linear" or sampling.scaling != "none":
        raise UserError("--what step knows the linear schedule without scaling; export --what denoiser instead")
    if guidance.boosting:
        raise UserError("boosting goes from step to step: leave it off, or export --what denoiser")
    if guidance.dg_every > 1:
        raise UserError("--what step computes every gradient: leave dg_every at 1, or export --what denoiser")


def _known(networks: Networks) -> tuple[float, float]:
    return networks.denoiser.sigma_min, networks.denoiser.sigma_max


def _step(
    networks: Networks, solver: Solver, predictor: Sequence[Guidance], corrector: Sequence[Guidance],
    names: Sequence[str],
) -> Function:  # fmt: skip
    make: Callable[..., Any] = guided_posterior if solver.function == "posterior" else guided_denoiser

    def step(*arguments: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(names, arguments, strict=True))
        t, t_next = (given[name].view(-1, 1, 1, 1) for name in ("sigma", "sigma_next"))
        more = {name: given[name].view(-1, 1, 1, 1) if name in LAST[1:] else given[name] for name in solver.inputs}

        def call(guidances: Sequence[Guidance]) -> Call:
            function = make(networks.denoiser, guidances, solver.config.clip_denoised)
            return lambda x, t, *bounds: function(x, t.flatten(), given.get("class_labels"), *bounds)

        predict, correct = call(with_weights(predictor, given)), None
        if solver.points == 2:
            correct = call(with_weights(corrector, given, second=True))
        x_next, denoised, _ = solver.any_step(given["x"], t, t_next, predict, correct, more)
        return (x_next, denoised) if LAST[0] in solver.inputs else (x_next,)

    return step
