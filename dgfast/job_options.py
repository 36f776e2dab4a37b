"""The options that decide on a job's functions: its grid and solver, and those of all declared guidances."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import click

from dgfast.config import DISCRETIZATIONS, SCALINGS, SCHEDULES, STATE_DTYPES, VARIANCES
from dgfast.guidance import declaration
from dgfast.guidance.options import PAIR, POINTS
from dgfast.option_types import NUMBER, FloatPair, WeightPoints
from dgfast.options import Command, Group, Option, option, section
from dgfast.solvers import DIFFUSIONS, LAST_STEPS, SOLVERS

_TYPES = {float: NUMBER, int: int, str: str, PAIR: FloatPair(), POINTS: WeightPoints()}
_of_solver = partial(option, group=Group.SOLVER)
_number = partial(_of_solver, type=NUMBER)
_SAMPLED = (
    _of_solver("--steps", "num_steps", type=int, metavar="N", help="Steps: noise levels above 0."),
    _of_solver("--grid", "discretization", type=click.Choice(DISCRETIZATIONS), help="How noise levels are spaced."),
    _of_solver("--schedule", type=click.Choice(SCHEDULES), help="sigma(t), the solver's time."),
    _of_solver("--scaling", type=click.Choice(SCALINGS), help="s(t), the solver's signal scale."),
    _number("--sigma-min", metavar="sigma", help="Smallest noise level above 0; default: the grid's own."),
    _number("--sigma-max", metavar="sigma", help="Largest noise level; default: the grid's own."),
    _number("--rho", metavar="rho", help="Exponent of the edm grid."),
    _number("--alpha", metavar="alpha", help="Heun's second point, as a share of the step."),
    _number("--s-churn", "S_churn", metavar="S_churn", help="Noise added anew over the run."),
    _number("--s-min", "S_min", metavar="S_min", help="Churn above this noise level only."),
    _of_solver("--s-max", "S_max", type=float, metavar="S_max", help="Churn below this noise level only."),
    _number("--s-noise", "S_noise", metavar="S_noise", help="Standard deviation of the added noise."),
    _of_solver("--respacing", help="Timesteps of a discrete-time network to keep: 250, ddim25, 10,10,5."),
    _of_solver("--fixed-variance", type=click.Choice(VARIANCES), help="Of ddpm, where the network learns none."),
    _number("--last-size", metavar="t", help="Size of --last-step in the path's time."),
    _of_solver(
        "--state-dtype", type=click.Choice(STATE_DTYPES), help="Of the solver's state, its noise levels and its noise."
    ),
)
_SHARED = (
    _of_solver("--solver", type=click.Choice(tuple(SOLVERS)), help="What integrates the ODE or SDE."),
    _number("--eta", metavar="eta", help="Noise of the ddim solver, from 0 to 1."),
    _of_solver("--diffusion", type=click.Choice(DIFFUSIONS), help="Noise of the flow-sde solvers along the path."),
    _number("--diffusion-norm", metavar="c", help="Factor in --diffusion."),
    _of_solver(
        "--last-step", type=click.Choice(LAST_STEPS),
        help="Their last step, without noise: of the SDE, of the ODE, to the denoised image, or no such step.",
    ),
    _of_solver(
        "--clip-denoised", type=bool, is_flag=False, flag_value="true",
        help="Keep denoised images in [-1, 1]; or =false.",
    ),
)  # fmt: skip


class GuidedCommand(Command):
    """A command with what decides on a job's functions: the solver and all declared guidances.

    They are looked up when the command runs, so that a guidance declared since its making is among them.

    Args:
        exported: leave out what no exported file can do.
        sampling: offer all of a `SamplingConfig`; without it the solver, and what its functions depend on.
    """

    def __init__(self, *arguments: Any, exported: bool = False, sampling: bool = False, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._exported = exported
        for add in (_SAMPLED if sampling else ()) + _SHARED:
            add(self)

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        own, guiding = super().get_params(ctx), [*_guidance_options(self._exported)]
        twice = {one.name for one in own} & {one.name for one in guiding}
        if twice:
            raise click.UsageError(f"a guidance has the option {min(map(str, twice))}, which this command has itself")
        return [*own, *guiding]


def _guidance_options(exported: bool) -> Iterator[Option]:
    sections: dict[str, str] = {}
    for guidance in declaration.GUIDANCES:
        for one in guidance.options():
            sections.setdefault(one.name, section(guidance))  # some options are of two guidances
    for one in declaration.all_options():
        if one.exported or not exported:
            kind = {"is_flag": True, "default": None} if one.kind is bool else {"type": _TYPES[one.kind]}
            choices = {"type": click.Choice(one.choices)} if one.choices else {"metavar": one.symbol}
            name = f"--{one.name.replace('_', '-')}"
            yield Option([name], group=sections[one.name], help=one.help, **kind | choices)
