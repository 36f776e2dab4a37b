"""Every number that a user may set, under the papers' symbols."""

import math
from dataclasses import dataclass
from itertools import pairwise

from dgfast.errors import UserError

SOLVERS = ("heun", "euler", "dpmpp-2m", "ddpm", "ddim")
DISCRETIZATIONS = ("edm", "vp", "ve", "iddpm")
SCHEDULES = ("linear", "vp", "ve")
SCALINGS = ("none", "vp")
VARIANCES = ("small", "large")
REUSES = ("hold", "linear")
NORMALIZATIONS = ("none", "sample_l2", "channel_l2", "max_abs")
CLEAN_TIMES = ("t", "0")
MOST_LEVELS = 20_000
"""Noise levels of a grid or of a network, far more than any was trained with: a file may ask for a thousand million."""
KEPT = ("npz", "png", "latents")
"""Formats in which a job keeps its images, see `outputs.FORMATS`."""
PRODUCTS = ("adm", "grid")
"""Files that are made of all its images, or of the first ones, in the end."""
GRID_IMAGES = 400
"""The grid shows at most so many images."""


@dataclass(frozen=True)
class SamplingConfig:
    """Grid and solver (EDM, arXiv 2206.00364, table 1, algorithms 1 and 2).

    Attributes:
        num_steps: noise levels above 0. Heun spends 2 num_steps - 1 score evaluations.
        solver: "heun" (order 2), "euler" (order 1), "dpmpp-2m" (DPM-Solver++(2M), arXiv 2211.01095, order 2), "ddpm"
            (ancestral, arXiv 2006.11239) or "ddim" (arXiv 2010.02502).
        respacing: the grid, for networks of discrete time: which of their own noise levels, in guided-diffusion's
            notation ("250", "ddim25", "10,10,5", "" for all). num_steps and discretization then say nothing.
        clip_denoised: keep the denoised images, before any gradient guidance, in [-1, 1].
        eta: noise of the ddim solver, 0 for none, 1 for as much as the posterior's.
        fixed_variance: of the ddpm solver where the network learns none, "small" (the posterior's) or "large" (beta).
        discretization: how noise levels are spaced: "edm", "vp", "ve" or "iddpm".
        schedule: sigma(t): "linear" t, "ve" sqrt(t), or "vp".
        scaling: s(t): "none" 1, or "vp" 1 / sqrt(1 + sigma^2).
        sigma_min, sigma_max: first and last non-zero noise level; None takes the discretisation's own.
        rho: exponent of the "edm" spacing.
        alpha: Heun's second point, as a share of the step (1: trapezoidal, 1/2: midpoint).
        S_churn: noise added anew over the whole run; S_min, S_max: the noise levels between which; S_noise: its
            standard deviation, 1 for what the theory says.
        epsilon_s: last time of the "vp" discretisation and schedule. C_1, C_2, M: iDDPM's grid.
    """

    num_steps: int = 18
    solver: str = "heun"
    discretization: str = "edm"
    schedule: str = "linear"
    scaling: str = "none"
    sigma_min: float | None = None
    sigma_max: float | None = None
    rho: float = 7.0
    alpha: float = 1.0
    S_churn: float = 0.0
    S_min: float = 0.0
    S_max: float = math.inf
    S_noise: float = 1.0
    epsilon_s: float = 1e-3
    C_1: float = 0.001
    C_2: float = 0.008
    M: int = 1000
    respacing: str | None = None
    clip_denoised: bool = False
    eta: float = 0.0
    fixed_variance: str = "small"

    def __post_init__(self) -> None:
        for name, allowed in (
            ("solver", SOLVERS),
            ("discretization", DISCRETIZATIONS),
            ("schedule", SCHEDULES),
            ("scaling", SCALINGS),
            ("fixed_variance", VARIANCES),
        ):
            if getattr(self, name) not in allowed:
                raise UserError(f"{name} {getattr(self, name)!r} is not one of {', '.join(allowed)}")
        counted = isinstance(self.num_steps, int) and isinstance(self.M, int)
        if not counted or self.M < 1 or max(self.num_steps, self.M) > MOST_LEVELS:
            raise UserError(
                f"num_steps {self.num_steps} and M {self.M} must be whole numbers, M at least 1, "
                f"and at most {MOST_LEVELS:,}"
            )
        ends = [0 if end is None else end for end in (self.sigma_min, self.sigma_max)]
        if not all(map(math.isfinite, (*ends, self.C_1, self.C_2))) or not isinstance(self.clip_denoised, bool):
            raise UserError("sigma_min, sigma_max, C_1 and C_2 must be finite numbers, clip_denoised true or false")
        if not isinstance(self.respacing, str | None) or len(self.respacing or "") > 200:
            raise UserError(f"respacing {self.respacing!r:.80} is not a text such as 250, ddim25 or 10,10,5")
        if not 0 < self.epsilon_s < 1 or math.isnan(self.S_min) or math.isnan(self.S_max):
            raise UserError("epsilon_s must lie between 0 and 1, S_min and S_max must be numbers")
        if not self.rho > 0 or not 0 < self.alpha <= 1 or not self.S_churn >= 0 or not self.S_noise >= 0:
            raise UserError("rho must be above 0, alpha in (0, 1], S_churn and S_noise at least 0")
        if not 0 <= self.eta <= 1 or (self.eta and self.solver != "ddim"):
            raise UserError(f"eta {self.eta} must lie between 0 and 1, and is for the solver ddim alone")
        special = self.solver in ("dpmpp-2m", "ddpm", "ddim")
        if special and (self.S_churn or self.schedule != "linear" or self.scaling != "none"):
            raise UserError(f"{self.solver} takes no churn and only the linear schedule without scaling")

    @property
    def score_evaluations(self) -> int:
        """Score-network forwards of one image, without guidance."""
        return 2 * self.num_steps - 1 if self.solver == "heun" else self.num_steps

    def gamma(self, sigma: float) -> float:
        """Relative rise of the noise level before the step at `sigma` (EDM, algorithm 2)."""
        if not self.S_min <= sigma <= self.S_max:
            return 0.0
        return min(self.S_churn / self.num_steps, math.sqrt(2) - 1)


@dataclass(frozen=True)
class GuidanceConfig:
    """Weights of the guidances; the defaults guide nothing, and what guides nothing runs no network.

    Attributes:
        dg_weight, dg_weight_2nd: discriminator guidance at the solver's first and second point of a step
            (arXiv 2211.17091). dg_window: the VP times tau between which it acts.
        dg_every: compute the discriminator's gradient at every so many guided calls only. dg_reuse: what the calls
            between use: "hold" the last gradient, or the "linear" continuation of the last two in log sigma.
        boosting: DG's boosting for conditional nets: every fifth step churns, every second doubles the guidance, both
            only for samples that the discriminator holds for generated.
        published_window: judge dg_window by the smallest tau of the batch, as DG's code does.
        dg_schedule, classifier_schedule: factors on these two weights along the trajectory: (tau, factor) by rising VP
            time, linear between and constant beyond them; two of the same tau are a jump.
        classifier_scale: classifier guidance (arXiv 2105.05233).
        cfg_scale: classifier-free guidance (arXiv 2207.12598) in the convention of Imagen, diffusers and EDM2: 1 is
            unguided. Ho and Salimans' w is cfg_scale - 1.
        cfg_scale_low: the scale at noise levels sigma of cfg_branch and below; None: cfg_scale everywhere.
        cfg_channels: let cfg_scale guide the first so many channels alone, as DiT's published numbers do; None: all.
        guidance_interval: (low, high]: noise levels sigma at which cfg_scale acts (arXiv 2404.07724).
        autoguidance: weight of guidance by a worse reference net (arXiv 2406.02507); 1 is unguided.
        diversity: a, low-density guidance (arXiv 2606.13347, algorithm 1): away from what the classifier is sure of in
            the noisy image. perceptual: toward it instead (algorithm 2).
        fidelity: b, guidance toward the class in the predicted clean image. clean_time: the time that the classifier
            reads there: the noisy image's, "t", or "0".
        normalize: what both do to the length of their gradients; see `guidance.gradient.normalized`.
        target_class, base_class: the class of the diversity and of the fidelity term, for mixing two classes; None is
            each sample's own.
    """

    dg_weight: float = 0.0
    dg_weight_2nd: float = 0.0
    dg_window: tuple[float, float] = (0.01, 1.0)
    dg_every: int = 1
    dg_reuse: str = "hold"
    boosting: bool = False
    published_window: bool = False
    classifier_scale: float = 0.0
    cfg_scale: float = 1.0
    cfg_scale_low: float | None = None
    cfg_branch: float = 0.0
    cfg_channels: int | None = None
    guidance_interval: tuple[float, float] = (0.0, math.inf)
    autoguidance: float = 1.0
    dg_schedule: tuple[tuple[float, float], ...] = ()
    classifier_schedule: tuple[tuple[float, float], ...] = ()
    diversity: float = 0.0
    fidelity: float = 0.0
    perceptual: bool = False
    normalize: str = "none"
    clean_time: str = "t"
    target_class: int | None = None
    base_class: int | None = None

    def __post_init__(self) -> None:
        weights = "dg_weight", "dg_weight_2nd", "classifier_scale", "cfg_scale", "autoguidance", "diversity", "fidelity"
        for name in weights:
            if not math.isfinite(getattr(self, name)):
                raise UserError(f"{name} {getattr(self, name)} is not a finite number")
        for name in ("dg_window", "guidance_interval"):
            pair = getattr(self, name)
            if len(pair) != 2 or not pair[0] < pair[1]:
                raise UserError(f"{name} {pair}: give two numbers, the first below the second")
        if (self.cfg_scale_low is None) != (self.cfg_branch == 0):
            raise UserError("cfg_scale_low and cfg_branch belong together: give both, or neither")
        if not math.isfinite(self.cfg_scale_low or 0) or not 0 <= self.cfg_branch < math.inf:
            raise UserError(
                f"cfg_scale_low {self.cfg_scale_low} must be finite, cfg_branch {self.cfg_branch} too and at least 0"
            )
        if self.cfg_channels is not None and (not isinstance(self.cfg_channels, int) or self.cfg_channels < 1):
            raise UserError(f"cfg_channels {self.cfg_channels} must be a whole number, at least 1")
        for name in ("dg_schedule", "classifier_schedule"):
            points = getattr(self, name)
            numbers = all(len(point) == 2 and all(map(math.isfinite, point)) for point in points)
            if not numbers or any(later[0] < point[0] for point, later in pairwise(points)):
                raise UserError(f"{name} {points}: give pairs of numbers, time tau and factor, by rising tau")
        if not isinstance(self.dg_every, int) or self.dg_every < 1:
            raise UserError(f"dg_every {self.dg_every} must be a whole number, at least 1")
        if self.dg_reuse not in REUSES:
            raise UserError(f"dg_reuse {self.dg_reuse!r} is not one of {', '.join(REUSES)}")
        if self.dg_every > 1 and self.boosting:
            raise UserError("boosting judges every call by its own log-ratio; it does not go with dg_every above 1")
        if self.boosting and not self.dg_weight:
            raise UserError("boosting needs discriminator guidance; give it a weight other than 0")
        self._check_low_density()

    def _check_low_density(self) -> None:
        for name, allowed in (("normalize", NORMALIZATIONS), ("clean_time", CLEAN_TIMES)):
            if getattr(self, name) not in allowed:
                raise UserError(f"{name} {getattr(self, name)!r} is not one of {', '.join(allowed)}")
        if self.diversity < 0 or self.fidelity < 0:
            raise UserError("diversity and fidelity are at least 0; perceptual turns the direction of diversity round")
        for name in ("target_class", "base_class"):
            label = getattr(self, name)
            if label is not None and not (isinstance(label, int) and label >= 0):
                raise UserError(f"{name} {label} is no class; they are counted from 0")
        for name, weight in (("perceptual", "diversity"), ("target_class", "diversity"), ("base_class", "fidelity")):
            chosen = getattr(self, name)
            if chosen is not None and chosen is not False and not getattr(self, weight):  # class 0 is one
                raise UserError(f"{name} needs {weight}; give it a weight above 0")
        if self.diversity and self.classifier_scale and self.target_class is None:
            raise UserError(
                "diversity and classifier_scale weigh one and the same gradient; set one of them to 0 "
                "(perceptual diversity is classifier guidance)"
            )

    @property
    def classifier_free(self) -> bool:
        """Whether classifier-free guidance acts at any noise level."""
        return self.cfg_scale != 1 or self.cfg_scale_low not in (None, 1)
