"""What is exported: a function of a job, with guidance weights as inputs, and what a file of it is tried with.

Each is one pure function of named tensors, gradient and window included, so that one file serves every noise level and
every weight. Lowering its gradient to inference operations is `dgfast.graph` and `dgfast.runtimes.onnx.operations`.
"""

import torch

from dgfast import pure_function
from dgfast.config import GuidanceConfig, SamplingConfig
from dgfast.denoiser import EDMPrecond, Preconditioner
from dgfast.export.subject import GeneratorSubject, Joint
from dgfast.job import Job
from dgfast.networks import Networks


def joint(networks: Networks, sampling: SamplingConfig, guidance: GuidanceConfig, what: str | None = None) -> Joint:
    """The function `what` under the guidances whose weights are on, see `Job.exported`.

    Raises:
        UserError: a missing network, or a plan whose steps are not all alike.
    """
    made = Job(networks, sampling, guidance)
    function, net, path = made.exported(what), networks.denoiser, made.path
    return Joint(
        function.name, function, function.inputs, function.outputs, dict(function.weights),
        (*(step.sigma for step in made.steps), 0.0), made.shape, made.classes,
        isinstance(net, Preconditioner) and not isinstance(net, EDMPrecond), path, made.conditions,
        {name: image.float() for name, image in function.images.items()},
    )  # fmt: skip


def generator(net: pure_function.GeneratorNet) -> GeneratorSubject:
    """The one-step generator, (latents, class_labels) -> images."""
    function = pure_function.generator(net)
    function = function if net.label_dim else function.without_labels()
    latents, labels = torch.zeros(1, net.latent_dim), torch.zeros(1, net.label_dim)
    image = function(*(latents, labels)[: len(function.inputs)])[0].shape[1:]
    return GeneratorSubject(function, function.inputs, net.latent_dim, net.label_dim, tuple(image))
