"""Preconditioning: a raw network F becomes the denoiser D(x; sigma) (EDM, arXiv 2206.00364, section 5)."""

from collections.abc import Callable

from dgfast.denoiser.ddpm import DDPMPrecond
from dgfast.denoiser.diffusers import DiffusersPrecond
from dgfast.denoiser.edm import EDMPrecond, VEPrecond, VPPrecond, iDDPMPrecond
from dgfast.denoiser.flow import FlowPrecond, Velocity
from dgfast.denoiser.preconditioner import Preconditioner

__all__ = [
    "PRECONDITIONERS",
    "DDPMPrecond",
    "DiffusersPrecond",
    "EDMPrecond",
    "FlowPrecond",
    "Preconditioner",
    "VEPrecond",
    "VPPrecond",
    "Velocity",
    "iDDPMPrecond",
]

PRECONDITIONERS: dict[str, Callable[..., Preconditioner]] = {
    "EDMPrecond": EDMPrecond,
    "VPPrecond": VPPrecond,
    "VEPrecond": VEPrecond,
    "iDDPMPrecond": iDDPMPrecond,
    "DDPMPrecond": DDPMPrecond,
    "DiffusersPrecond": DiffusersPrecond,
    "FlowPrecond": FlowPrecond,
}
