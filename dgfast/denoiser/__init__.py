"""Preconditioning: a raw network F becomes the denoiser D(x; sigma) (EDM, arXiv 2206.00364, section 5)."""

from dgfast.denoiser.ddpm import DDPMPrecond
from dgfast.denoiser.diffusers import DiffusersPrecond
from dgfast.denoiser.edm import EDMPrecond, VEPrecond, VPPrecond, iDDPMPrecond
from dgfast.denoiser.edm2 import EDM2Precond
from dgfast.denoiser.flow import FlowPrecond, Velocity
from dgfast.denoiser.preconditioner import Preconditioner

__all__ = [
    "PRECONDITIONERS",
    "DDPMPrecond",
    "DiffusersPrecond",
    "EDM2Precond",
    "EDMPrecond",
    "FlowPrecond",
    "Preconditioner",
    "VEPrecond",
    "VPPrecond",
    "Velocity",
    "iDDPMPrecond",
]

PRECONDITIONERS: dict[str, type[Preconditioner]] = {
    "EDMPrecond": EDMPrecond,
    "VPPrecond": VPPrecond,
    "VEPrecond": VEPrecond,
    "iDDPMPrecond": iDDPMPrecond,
    "DDPMPrecond": DDPMPrecond,
    "EDM2Precond": EDM2Precond,
    "DiffusersPrecond": DiffusersPrecond,
    "FlowPrecond": FlowPrecond,
}
