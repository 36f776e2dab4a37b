"""Solvers of the probability-flow ODE and its stochastic relatives, one a file, in one table."""

from dgfast.solvers.churn import churn
from dgfast.solvers.ddim import DDIM, ddim_step
from dgfast.solvers.ddpm import DDPM, ancestral_step
from dgfast.solvers.dpmpp_2m import DPMpp2M, dpmpp_2m_step
from dgfast.solvers.euler import Euler, euler_step
from dgfast.solvers.flow import FlowSolver
from dgfast.solvers.flow_euler import FlowEuler
from dgfast.solvers.flow_heun import FlowHeun
from dgfast.solvers.flow_sde import DIFFUSIONS, LAST_STEPS, FlowSDE, FlowSDEHeun
from dgfast.solvers.heun import Heun, heun_step
from dgfast.solvers.solver import LAST, Call, Solver

SOLVERS: dict[str, type[Solver]] = {
    solver.name: solver for solver in (Heun, Euler, DPMpp2M, DDPM, DDIM, FlowEuler, FlowHeun, FlowSDE, FlowSDEHeun)
}

__all__ = [
    "DIFFUSIONS",
    "LAST",
    "LAST_STEPS",
    "SOLVERS",
    "Call",
    "FlowSolver",
    "Solver",
    "ancestral_step",
    "churn",
    "ddim_step",
    "dpmpp_2m_step",
    "euler_step",
    "heun_step",
]
