"""What is exported: the guided denoiser, or a whole step of the solver, with guidance weights as inputs.

Each is one pure function of named tensors, gradient and window included, so that one file serves every noise level and
every weight. Lowering its gradient to inference operations is `dgfast.runtimes.graph` and `dgfast.runtimes.onnx_ops`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dgfast.config import GuidanceConfig, SamplingConfig
from dgfast.errors import UserError
from dgfast.export.parity import Case, Tensors
from dgfast.guidance import Guidance, guided_denoiser
from dgfast.guidance.weights import OFF, weights, with_weights
from dgfast.networks import Networks
from dgfast.noise_levels import coordinates, sigma_bounds
from dgfast.plan import all_guidances
from dgfast.sampler import Sampler
from dgfast.solvers import euler_step, heun_step


@dataclass(frozen=True)
class Joint:
    """One function to export.

    Attributes:
        what: "denoiser" or "step"; function: of the tensors `inputs` names, in that order.
        outputs: names of its results.
        weights: the guidance weights that it takes and the values that the export was asked for.
        sigmas: the plan's noise levels, 0 last.
    """

    what: str
    function: Callable[..., tuple[Tensor, ...]]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: dict[str, float]
    sigmas: tuple[float, ...]
    image: tuple[int, int, int]
    label_dim: int

    def __call__(self, inputs: Tensors) -> dict[str, Tensor]:
        """The eager reference: state and noise levels in double precision, as a sampler has them."""
        state = ("x", "sigma", "sigma_next")
        arguments = [inputs[n].double() if n in state else inputs[n] for n in self.inputs]
        with torch.no_grad():
            results = self.function(*arguments)
        return {name: value.float() for name, value in zip(self.outputs, results, strict=True)}

    def case(self, name: str, levels: list[float], seed: int, weights: Mapping[str, float] | None = None) -> Case:
        """Noise of those levels, one a sample, with classes, under the export's own weights or others."""
        generator = torch.Generator().manual_seed(seed)
        count, sigma = len(levels), torch.tensor(levels)
        clean = 0.5 * torch.randn(count, *self.image, generator=generator)
        x = clean + sigma.view(-1, 1, 1, 1) * torch.randn(clean.shape, generator=generator)
        classes = torch.randint(max(self.label_dim, 1), (count,), generator=generator)
        values: dict[str, Tensor] = {"x": x, "sigma": sigma, "sigma_next": 0.8 * sigma}
        values["class_labels"] = F.one_hot(classes, max(self.label_dim, 1)).float()
        values |= {key: torch.tensor([value]) for key, value in (self.weights | dict(weights or {})).items()}
        return Case(name, {key: values[key] for key in self.inputs})

    def last(self, case: Case) -> Case:
        """The same case as the last step, which goes to sigma 0."""
        return Case(f"{case.name}, last step", {**case.inputs, "sigma_next": torch.zeros_like(case.inputs["sigma"])})

    def amplified(self, name: str, levels: list[float], seed: int) -> Case:
        """A case whose weights make the guidance as large as the image, so that an error in it cannot hide."""
        usual = self.case(name, levels, seed)
        off = self.case(name, levels, seed, {key: OFF[key] for key in self.weights})
        plain, guided = (self(case.inputs)[self.outputs[0]] for case in (off, usual))
        share = float((guided - plain).abs().max() / plain.abs().max())
        factor = min(1 / share, 1e6) if share else 1.0
        return self.case(name, levels, seed, {k: OFF[k] + factor * (w - OFF[k]) for k, w in self.weights.items()})


def joint(networks: Networks, sampling: SamplingConfig, guidance: GuidanceConfig, what: str) -> Joint:
    """The function `what`, "denoiser" or "step", under the guidances whose weights are on.

    Raises:
        UserError: a missing network, or a plan whose steps are not all alike.
    """
    if guidance.boosting:
        raise UserError("boosting changes from step to step, which no exported file can; leave it off")
    plan = Sampler(networks, sampling, guidance).steps
    predictor, _, corrector = all_guidances(networks, guidance)
    labels = ("class_labels",) if networks.denoiser.label_dim else ()
    at_predictor, at_corrector = weights(predictor), _renamed(weights(corrector))
    side = networks.denoiser.img_resolution
    shared = {
        "sigmas": (*(step.sigma for step in plan), 0.0),
        "image": (networks.denoiser.img_channels, side, side),
        "label_dim": networks.denoiser.label_dim,
    }
    if what == "denoiser":
        at_predictor = at_predictor or {k.removesuffix("_2nd"): v for k, v in at_corrector.items()}
        guidances = predictor if predictor else corrector
        inputs = ("x", "sigma", *labels, *at_predictor)
        function = _denoiser(networks, guidances, inputs)
        return Joint(what, function, inputs, ("denoised", "log_ratio"), at_predictor, **shared)  # type: ignore[arg-type]
    _require_plain_steps(sampling, guidance)
    used = at_predictor | (at_corrector if sampling.solver == "heun" else {})
    inputs = ("x", "sigma", "sigma_next", *labels, *used)
    function = _step(networks, sampling, predictor, corrector, inputs)
    return Joint(what, function, inputs, ("x_next",), used, **shared)  # type: ignore[arg-type]


def _renamed(at_corrector: dict[str, float]) -> dict[str, float]:
    """The discriminator's weight at the second point has its own name; the others are shared."""
    return {("dg_weight_2nd" if name == "dg_weight" else name): weight for name, weight in at_corrector.items()}


def _require_plain_steps(sampling: SamplingConfig, guidance: GuidanceConfig) -> None:
    if sampling.solver not in ("heun", "euler") or sampling.schedule != "linear" or sampling.scaling != "none":
        raise UserError("--what step knows heun and euler with the linear schedule; export --what denoiser instead")
    if guidance.dg_every > 1:
        raise UserError("--what step computes every gradient: leave dg_every at 1, or export --what denoiser")


def _denoiser(
    networks: Networks, guidances: list[Guidance], names: tuple[str, ...]
) -> Callable[..., tuple[Tensor, ...]]:
    def denoise(*arguments: Tensor) -> tuple[Tensor, Tensor]:
        given = dict(zip(names, arguments, strict=True))
        guided = guided_denoiser(networks.denoiser, with_weights(guidances, given))
        return guided(given["x"], given["sigma"], given.get("class_labels"))

    return denoise


def _step(
    networks: Networks, sampling: SamplingConfig, predictor: list[Guidance], corrector: list[Guidance],
    names: tuple[str, ...],
) -> Callable[..., tuple[Tensor, ...]]:  # fmt: skip
    net = networks.denoiser
    coords = coordinates(sampling, *sigma_bounds(sampling, net.sigma_min, net.sigma_max))

    def step(*arguments: Tensor) -> tuple[Tensor]:
        given = dict(zip(names, arguments, strict=True))
        x, labels = given["x"], given.get("class_labels")
        t, t_next = (given[name].view(-1, 1, 1, 1) for name in ("sigma", "sigma_next"))
        second = given | ({"dg_weight": given["dg_weight_2nd"]} if "dg_weight_2nd" in given else {})
        first_call = guided_denoiser(net, with_weights(predictor, given))
        second_call = guided_denoiser(net, with_weights(corrector, second))
        denoised, _ = first_call(x, given["sigma"], labels)
        euler = euler_step(x, denoised, t, t_next, coords)
        if sampling.solver == "euler":
            return (euler,)
        going_on = t_next > 0  # the last step ends at sigma 0, where no network can look: it is of first order
        target = torch.where(going_on, t_next, t)
        heun = heun_step(
            x, denoised, t, target, lambda x, t: second_call(x, t.flatten(), labels)[0], coords, sampling.alpha
        )
        return (torch.where(going_on, heun, euler),)

    return step
