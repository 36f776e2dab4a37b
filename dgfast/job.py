"""A sampling job: its plan, and the pure functions that it calls.

Whoever executes, exports or measures a function asks for it here, or in `pure_function` for a one-step
generator's. No function is put together anywhere else.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from dgfast.conditions import conditioned, declared, require_same
from dgfast.config import GuidanceConfig, SamplingConfig
from dgfast.denoiser import FlowPrecond
from dgfast.devices import device_of
from dgfast.errors import UserError
from dgfast.flow import FlowCoordinates, Path, flow_coordinates
from dgfast.graph import Function
from dgfast.guidance import (
    DiscriminatorGuidance,
    Guidance,
    gradient_keeping_denoiser,
    guided_denoiser,
    guided_posterior,
    guided_velocity,
)
from dgfast.guidance.memory import MEMORY, remembering
from dgfast.guidance.weights import images, weights, with_weights
from dgfast.networks import Networks, ScoreNet, image_shape
from dgfast.noise_levels import Coordinates, coordinates, sigma_bounds
from dgfast.plan import all_guidances, boosted, class_count, flow_plan, noise_grid, plan, require_exportable
from dgfast.pure_function import PureFunction
from dgfast.solvers import LAST, SOLVERS, Call, FlowSolver, Solver

_INPUTS = {
    "denoiser": ("x", "sigma", "class_labels"),
    "posterior": ("x", "sigma", "class_labels", "log_least", "log_most"),
    "velocity": ("x", "sigma", "class_labels"),
}
_OUTPUTS = {
    "denoiser": ("denoised", "log_ratio"),
    "posterior": ("denoised", "shift", "variance", "log_ratio"),
    "velocity": ("velocity", "log_ratio"),
}


GuidanceLike = GuidanceConfig | Sequence[Guidance | GuidanceConfig]
"""What a job takes for its guidance."""


class Job:
    """What is to be drawn: networks, noise levels and solver, guidance.

    Attributes:
        sampling: as asked for, with the number of noise levels that the grid has.
        guidance: its configuration. own: guidances besides.
        steps: the plan. solver, coordinates: what steps, and where.
        classes: number of classes among which a label chooses, 0 for none. shape: of one image, [C, H, W].
        conditions: extra inputs of the denoiser, by name: one sample's shape.
    """

    def __init__(
        self,
        networks: Networks,
        sampling: SamplingConfig = SamplingConfig(),  # noqa: B008 - frozen
        guidance: GuidanceLike = GuidanceConfig(),  # noqa: B008 - frozen
        device: torch.device | None = None,
    ) -> None:
        """
        Args:
            guidance: a configuration; or a list of guidances of your own, which may hold a configuration too.
            device: of the denoiser's weights; None: look at them.

        Raises:
            UserError: a guidance whose network is missing, or a grid that does not exist.
        """
        net = networks.denoiser
        self._device = device or device_of(net)
        self.guidance, self.own = _split(guidance)
        self.networks, self.classes = networks, class_count(networks, self.guidance)
        self.shape, self.conditions = image_shape(net), declared(net)
        require_same(self.conditions, [networks.reference])
        self.coordinates: Coordinates
        self.solver: Solver
        kind, guided = SOLVERS[sampling.solver], (self.guidance, self.own)
        if issubclass(kind, FlowSolver):
            if not isinstance(net, FlowPrecond):
                raise UserError(f"{kind.name} is for networks of flow matching such as SiT; use heun for this one")
            self.coordinates, self.sampling = flow_coordinates(net.path), sampling
            self.solver = flow = kind(sampling, self.coordinates)
            self.steps = flow_plan(
                networks, sampling, *guided, flow.times(net.prediction), self.coordinates, self._device
            )
        else:
            low, high = sigma_bounds(sampling, net.sigma_min, net.sigma_max)
            grid = noise_grid(networks, sampling, low, high).to(self._device)
            self.sampling = replace(sampling, num_steps=len(grid))
            self.coordinates = coordinates(sampling, low, high)
            self.solver = kind(self.sampling, self.coordinates)
            self.steps = plan(networks, self.sampling, *guided, grid, self.coordinates)

    @property
    def path(self) -> Path | None:
        """The path along which its solver steps; None: it steps in sigma."""
        return self.coordinates.path if isinstance(self.coordinates, FlowCoordinates) else None

    def called(self, guidances: Sequence[Guidance], keep_gradient: bool = False) -> PureFunction:
        """The function that the solver calls under these guidances: the guided denoiser, or posterior.

        Args:
            keep_gradient: return the discriminator's gradient too, where it is among them.
        """
        guidances, name = tuple(guidances), self.solver.function
        discriminator = next((g for g in guidances if isinstance(g, DiscriminatorGuidance)), None)
        if not keep_gradient or discriminator is None:
            return self.guided(name, guidances)
        others = [g for g in guidances if g is not discriminator]
        clip = self.sampling.clip_denoised
        make = partial(gradient_keeping_denoiser, discriminator=discriminator, clip=clip)
        return self._made(name, make, others, ("gradient",), guidances)

    def guided(self, name: str, guidances: Sequence[Guidance]) -> PureFunction:
        """The "denoiser", the "posterior" or the "velocity" under these guidances."""
        make: Callable[..., Function]
        if name == "velocity":
            assert isinstance(self.networks.denoiser, FlowPrecond), "only a solver along a path asks for it"
            make = guided_velocity
        else:
            make = guided_posterior if name == "posterior" else guided_denoiser
            make = partial(make, clip=self.sampling.clip_denoised)
        return self._made(name, make, guidances, (), tuple(guidances))

    def _made(
        self, name: str, make: Callable[..., Function], of: Sequence[Guidance], more: tuple[str, ...],
        guidances: tuple[Guidance, ...],
    ) -> PureFunction:  # fmt: skip
        """What `make` gives of some of the guidances, with these outputs more; with a memory, where one remembers."""
        inputs, outputs = (*_INPUTS[name], *self.conditions), (*_OUTPUTS[name], *more)
        of_guidances = partial(_with_conditions, make, self.networks.denoiser, tuple(self.conditions))
        if not any(guidance.remembers for guidance in of):
            return PureFunction(name, of_guidances(of), inputs, outputs, guidances)
        function = remembering(of_guidances, of)
        return PureFunction(name, function, (*inputs, MEMORY[0]), (*outputs, MEMORY[1]), guidances)

    def exported(self, name: str | None = None) -> PureFunction:
        """A function under all guidances of the job at once, whose weights and images are inputs: for the whole plan.

        Args:
            name: "denoiser", "posterior", "velocity" or "step"; None: what the solver calls.

        Raises:
            UserError: a step, and a plan whose steps are not all alike; a velocity, and a solver that calls none.
        """
        name = name or self.solver.function
        if (name == "velocity") != (self.solver.function == "velocity") and name != "step":
            raise UserError(f"--what {name}: {self.solver.name} calls a {self.solver.function}; export that, or a step")
        levels = [*(step.sigma for step in self.steps), 0.0]
        first, second = all_guidances(
            self.networks, self.guidance, self.own, levels, self._device, self.solver.function
        )
        first = boosted(first) if self.guidance.boosting else first
        require_exportable(first, name, self.solver.points)
        if name == "step":
            function = self._step(first, second)
        else:  # the two differ by weights alone
            function = self._with_weights(name, max(first, second, key=len))
        return function if self.classes else function.without_labels()

    def _with_weights(self, name: str, guidances: Sequence[Guidance]) -> PureFunction:
        own, pictures, state = weights(guidances), images(guidances), (*_INPUTS[name], *self.conditions)

        def function(*arguments: Tensor) -> tuple[Tensor, ...]:
            values = dict(zip((*own, *pictures), arguments[len(state) :], strict=True))
            return self.guided(name, with_weights(guidances, values))(*arguments[: len(state)])

        inputs = (*state, *own, *pictures)
        return PureFunction(name, function, inputs, _OUTPUTS[name], tuple(guidances), own, pictures)

    def _step(self, first: Sequence[Guidance], second: Sequence[Guidance]) -> PureFunction:
        """(x, sigma, sigma_next, class_labels, what the solver needs more, conditions, weights) -> x_next."""
        self._require_plain_steps()
        solver, two_points = self.solver, self.solver.points == 2
        own = weights(first) | (weights(second, second=True) if two_points else {})
        pictures = images(first) | (images(second) if two_points else {})
        names = ("x", "sigma", "sigma_next", "class_labels", *solver.inputs, *self.conditions, *own, *pictures)
        remembers = LAST[0] in solver.inputs

        def function(*arguments: Tensor) -> tuple[Tensor, ...]:
            named = dict(zip(names, arguments, strict=True))
            levels = (named[name].view(-1, 1, 1, 1) for name in ("sigma", "sigma_next"))
            t, t_next = (self.coordinates.sigma_inv(level) for level in levels)
            more = {name: named[name] for name in solver.inputs}
            if remembers:
                more[LAST[1]] = more[LAST[1]].view(-1, 1, 1, 1)

            def call(guidances: Sequence[Guidance]) -> Call:
                guided = self.guided(solver.function, guidances)
                conditions, sigma = [named[name] for name in self.conditions], self.coordinates.sigma
                return lambda x, t, *more: guided(x, sigma(t).flatten(), named["class_labels"], *more, *conditions)

            correct = call(with_weights(second, named, second=True)) if two_points else None
            predict = call(with_weights(first, named))
            x_next, denoised, _ = solver.any_step(named["x"], t, t_next, predict, correct, more)
            return (x_next, denoised) if remembers else (x_next,)

        outputs = ("x_next", "denoised") if remembers else ("x_next",)  # denoised is the next step's LAST
        return PureFunction("step", function, names, outputs, (*first, *second), own, pictures)

    def _require_plain_steps(self) -> None:
        if self.sampling.schedule != "linear" or self.sampling.scaling != "none":
            raise UserError("--what step knows the linear schedule without scaling; export --what denoiser instead")
        if self.guidance.boosting:
            raise UserError("boosting goes from step to step: leave it off, or export --what denoiser")
        if self.guidance.dg_every > 1:
            raise UserError("--what step computes every gradient: leave dg_every at 1, or export --what denoiser")


def _with_conditions(
    make: Callable[..., Function], net: ScoreNet, names: tuple[str, ...], guidances: Sequence[Guidance]
) -> Function:
    """`make(net, guidances)`, with the conditions of these names as further arguments in the end."""
    return partial(conditioned, make, net, tuple(guidances), names) if names else make(net, guidances)


def _split(guidance: GuidanceLike) -> tuple[GuidanceConfig, tuple[Guidance, ...]]:
    """The configuration and the other guidances.

    Raises:
        UserError: something that is neither, or two configurations.
    """
    parts = [guidance] if isinstance(guidance, GuidanceConfig) else [*guidance]
    configs = [one for one in parts if isinstance(one, GuidanceConfig)]
    own = [one for one in parts if isinstance(one, Guidance)]
    strange = next((one for one in parts if not isinstance(one, GuidanceConfig | Guidance)), None)
    if strange is not None:
        made = (
            f"the class {strange.__name__}: make one of it"
            if isinstance(strange, type)
            else f"a {type(strange).__name__}"
        )
        raise UserError(f"guidance holds {made}; give a GuidanceConfig, or a list of guidances")
    if len(configs) > 1:
        raise UserError(f"guidance holds {len(configs)} GuidanceConfigs; put their options into one")
    return configs[0] if configs else GuidanceConfig(), tuple(own)
