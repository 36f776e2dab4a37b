"""The sampler as a whole: every image from its own seed, every network call accounted for, errors at the door."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from dgfast.config import GuidanceConfig, SamplingConfig
from dgfast.errors import UserError
from dgfast.graph import Function
from dgfast.graph.trace import trace
from dgfast.networks import Networks
from dgfast.randomness import SeedStreams
from dgfast.runtimes import RUNTIMES, Runtime
from dgfast.sampler import Sampler

NetFactory = Callable[..., Any]
CPU = torch.device("cpu")


class Counting:
    """A network that counts its calls and can answer NaN below a noise level."""

    def __init__(self, net: Callable[..., Tensor], nan_below: float = -math.inf) -> None:
        self.net, self.nan_below, self.calls = net, nan_below, 0

    def __call__(self, x: Tensor, sigma: Tensor, *rest: Any) -> Tensor:
        self.calls += 1
        out = self.net(x, sigma, *rest)
        return torch.where(sigma.view(-1, 1, 1, 1) < self.nan_below, torch.nan, out) if out.ndim == 4 else out

    def __getattr__(self, name: str) -> Any:
        return getattr(self.net, name)


# Seeds ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("sampling", "guidance"),
    [
        (SamplingConfig(num_steps=6), GuidanceConfig()),
        (SamplingConfig(num_steps=6, S_churn=3.0, S_noise=1.01), GuidanceConfig(dg_weight=1.5, boosting=True)),
        (SamplingConfig(num_steps=6, solver="dpmpp-2m"), GuidanceConfig(dg_weight=1.0, cfg_scale=1.5)),
        (SamplingConfig(num_steps=6, solver="ddpm"), GuidanceConfig(dg_weight=1.0, cfg_scale=1.5)),
        (SamplingConfig(num_steps=6, solver="ddim", eta=0.5), GuidanceConfig(dg_weight=1.0)),
    ],
    ids=["plain", "churn and boosting", "multistep", "ancestral", "ddim"],
)
def test_sampler_draws_each_image_from_its_seed_alone(
    tiny_net: NetFactory, tiny_discriminator: NetFactory, sampling: SamplingConfig, guidance: GuidanceConfig
) -> None:
    """Whatever the batch, its size and its order; rounding in other batch sizes is all that may differ."""
    networks = Networks(tiny_net(label_dim=4), discriminator=tiny_discriminator(num_classes=4))
    sampler = Sampler(networks, sampling, guidance)
    seeds = [7, 3, 123456789, 0, 42]
    together = dict(zip(seeds, sampler(seeds), strict=True))
    assert (together[7] - together[3]).abs().max() > 0.1
    for other_batch in ([3], [42, 7], seeds[::-1], [9, *seeds, 8]):
        for seed, image in zip(other_batch, sampler(other_batch), strict=True):
            if seed in together:
                assert (image - together[seed]).abs().max() < 1e-4


def test_sampler_noise_and_labels_of_a_seed_are_exactly_the_same_in_any_batch() -> None:
    seeds = [5, 1, 9]
    batch, alone = SeedStreams(seeds), [SeedStreams([seed]) for seed in seeds]
    draws: tuple[Callable[[SeedStreams], Tensor], ...] = (
        lambda s: s.normal((3, 4, 4), torch.float32, CPU),
        lambda s: s.labels(10),
        lambda s: s.normal((3, 4, 4), torch.float64, CPU),
    )
    for draw in draws:
        assert torch.equal(draw(batch), torch.cat([draw(stream) for stream in alone]))


def test_sampler_draws_in_edms_order(tiny_net: NetFactory) -> None:
    """generate.py: latents in float32, then the label, then each step's noise in float64, one generator a seed."""
    seeds, shape = [0, 17, 2**32 - 1], (1, 8, 8)
    sampler = Sampler(Networks(tiny_net(label_dim=10)), SamplingConfig(num_steps=3, S_churn=1.0))
    latents, labels, noises = [], [], []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        latents.append(torch.randn(shape, generator=generator))
        labels.append(torch.randint(10, size=(), generator=generator))
        noises.append(torch.stack([torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)]))
    drawn = sampler.draw_labels(seeds)
    assert drawn is not None and torch.equal(drawn, torch.stack(labels))
    steps = iter(torch.stack(noises, dim=1))
    one_hot = sampler.class_labels(torch.stack(labels), len(seeds))
    by_hand = sampler.integrate(torch.stack(latents), one_hot, steps.__next__)
    assert torch.equal(sampler(seeds), by_hand.float())


@pytest.mark.parametrize("seed", [-1, 2**32, 2**64, 0.5, "3"])
def test_sampler_refuses_seeds_that_edm_would_take_for_others(tiny_net: NetFactory, seed: Any) -> None:
    """Its generator takes seeds modulo 2^32, so 0 and 2^32 would be two seeds with one image."""
    with pytest.raises(UserError, match="is no whole number from 0 to 4294967295"):
        Sampler(Networks(tiny_net()), SamplingConfig(num_steps=2))([3, seed])


def test_sampler_labels_change_the_image_and_not_its_noise(tiny_net: NetFactory) -> None:
    sampler = Sampler(Networks(tiny_net(label_dim=4)), SamplingConfig(num_steps=4, S_churn=1.0))
    drawn = sampler.draw_labels([11, 12])
    assert drawn is not None
    assert torch.equal(sampler([11, 12], drawn), sampler([11, 12]))
    assert torch.equal(sampler([11, 12], drawn.tolist()), sampler([11, 12]))
    others = (drawn + 1) % 4
    assert (sampler([11, 12], others) - sampler([11, 12])).abs().max() > 1e-3


def test_sampler_shows_where_each_step_came_from_and_arrived(tiny_net: NetFactory) -> None:
    sampler = Sampler(Networks(tiny_net()), SamplingConfig(num_steps=4, solver="euler"))
    seen: list[tuple[int, Tensor, Tensor]] = []
    images = sampler([1, 2], on_step=lambda step, x, denoised, _: seen.append((step.index, x.clone(), denoised)))
    assert [index for index, _, _ in seen] == [0, 1, 2, 3]
    x = sampler.first_state(SeedStreams([1, 2]).normal((1, 8, 8), torch.float32, CPU))
    for step, (_, arrived, denoised) in zip(sampler.steps, seen, strict=True):
        level = torch.full((2,), step.sigma, dtype=torch.float64)
        torch.testing.assert_close(denoised.double(), tiny_net()(x, level, None).double(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(arrived, denoised + step.t_next / step.t * (x - denoised))
        x = arrived
    assert torch.equal(images, x.float()) and images.shape == (2, 1, 8, 8)


def test_sampler_goes_on_from_the_state_that_a_callback_returns(tiny_net: NetFactory) -> None:
    sampler = Sampler(Networks(tiny_net()), SamplingConfig(num_steps=4))
    first, other = (SeedStreams([seed]).normal((1, 8, 8), torch.float32, CPU) for seed in (1, 2))
    states: list[Tensor] = []
    sampler.integrate(other, on_step=lambda step, x, *_: states.append(x))
    images = sampler.integrate(first, on_step=lambda step, x, *_: states[1].float() if step.index == 1 else None)
    torch.testing.assert_close(images, states[-1], rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match=r"must return a state of shape \[1, 1, 8, 8\] or None; it returned \[1\]"):
        sampler.integrate(first, on_step=lambda *_: torch.zeros(1))


@pytest.mark.parametrize(
    ("guidance", "dtype", "remedy"),
    [
        (GuidanceConfig(), torch.float32, "no guidance acted: the score network itself returns them"),
        (GuidanceConfig(), torch.bfloat16, "use --dtype float32"),
        (GuidanceConfig(dg_weight=1e300), torch.float32, "lower the guidance weights"),
        (GuidanceConfig(dg_weight=1e300), torch.bfloat16, "lower the guidance weights or use --dtype float32"),
    ],
)
def test_sampler_advises_what_can_help_against_nan(
    tiny_net: NetFactory, tiny_discriminator: NetFactory, guidance: GuidanceConfig, dtype: torch.dtype, remedy: str
) -> None:
    net = copy.deepcopy(tiny_net())
    for parameter in net.parameters():
        parameter.data = parameter.data.to(dtype) * math.nan
    sampler = Sampler(Networks(net, tiny_discriminator()), SamplingConfig(num_steps=3), guidance)
    with pytest.raises(UserError) as error:
        sampler([0])
    assert error.value.message.partition("; ")[2].startswith(remedy)


# Accounts -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("solver", "plain"), [("heun", 13), ("euler", 7), ("dpmpp-2m", 7)])
def test_sampler_counts_the_network_calls_that_it_makes(
    tiny_net: NetFactory, tiny_discriminator: NetFactory, solver: str, plain: int
) -> None:
    config = SamplingConfig(num_steps=7, solver=solver)
    for guidance in (
        GuidanceConfig(),
        GuidanceConfig(dg_weight=1.0),
        GuidanceConfig(dg_weight=1.0, dg_weight_2nd=0.5, dg_window=(0.0, 2.0)),
        GuidanceConfig(cfg_scale=2.0, guidance_interval=(0.1, 20.0)),
        GuidanceConfig(cfg_scale=2.0, autoguidance=1.5, dg_weight=1.0, classifier_scale=1.0),
    ):
        score, reference = (Counting(tiny_net(label_dim=4, prefix=prefix)) for prefix in ("tiny/", "worse/"))
        discriminator = Counting(tiny_discriminator(num_classes=4))
        classifier = Counting(lambda u, t: u.flatten(1)[:, :4])
        sampler = Sampler(Networks(score, discriminator, classifier, reference), config, guidance)
        sampler([1, 2])
        assert score.calls + reference.calls == sampler.score_evaluations
        assert discriminator.calls + classifier.calls == sampler.guidance_gradients
        if guidance == GuidanceConfig():
            assert sampler.score_evaluations == config.score_evaluations == plain
            assert sampler.guidance_gradients == 0


def test_sampler_prepare_builds_every_function_that_sampling_calls(
    tiny_net: NetFactory, tiny_discriminator: NetFactory
) -> None:
    """Boosting and the two windows need several; after `prepare`, sampling builds no further one of that size."""
    built: list[torch.Size] = []

    def runtime(function: Function, example: Sequence[Tensor | None]) -> Function:
        assert example[0] is not None
        built.append(example[0].shape)
        return function

    networks = Networks(tiny_net(label_dim=4), discriminator=tiny_discriminator(num_classes=4))
    guidance = GuidanceConfig(
        dg_weight=1.0, dg_weight_2nd=0.5, boosting=True, cfg_scale=2.0, guidance_interval=(0.1, 20.0)
    )
    sampler = Sampler(networks, SamplingConfig(num_steps=7), guidance, runtime=runtime)
    assert not built
    sampler.prepare(3)
    different = {g for step in sampler.steps for g in (step.predictor, step.corrector) if g is not None}
    assert len(built) == len(different) > 3
    eager = Sampler(networks, SamplingConfig(num_steps=7), guidance)
    assert torch.equal(sampler([1, 2, 3]), eager([1, 2, 3]))
    assert built == [(3, 1, 8, 8)] * len(different)
    sampler([1, 2])  # another size is another set of functions
    assert built[len(different) :] == [(2, 1, 8, 8)] * len(different)


@pytest.mark.parametrize("captured", [False, True])
def test_sampler_builds_another_function_for_arguments_with_labels(tiny_net: NetFactory, captured: bool) -> None:
    """A traced function has forgotten what it was not traced with: labels, or that there were none."""
    networks = Networks(tiny_net(label_dim=4))
    runtime = Runtime("traced", trace, lambda device: trace if captured else None)
    sampler, eager = (Sampler(networks, SamplingConfig(num_steps=3), runtime=r) for r in (runtime, "eager"))
    latents = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = [None, eager.class_labels([3, 1], 2), None]
    images = [eager.integrate(latents, rows) for rows in labels]
    assert not torch.allclose(images[0], images[1])
    for rows, image in zip(labels, images, strict=True):
        torch.testing.assert_close(sampler.integrate(latents, rows), image)


def test_sampler_runs_in_the_runtime_that_it_is_given(tiny_net: NetFactory) -> None:
    """By its name, as itself, and as a plain function; eager where none is given."""
    networks, latents = Networks(tiny_net()), torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    config = SamplingConfig(num_steps=3)
    plain = Sampler(networks, config).integrate(latents)
    assert torch.equal(Sampler(networks, config, runtime="eager").integrate(latents), plain)
    assert torch.equal(Sampler(networks, config, runtime=RUNTIMES["eager"]).integrate(latents), plain)
    zeros = Sampler(networks, config, runtime=lambda f, example: lambda *x: tuple(0 * y for y in f(*x)))
    assert zeros.integrate(latents).abs().max() < 1e-12
    with pytest.raises(UserError, match="no runtime tvm: there are eager, compiled, onnx, package, tensorrt"):
        Sampler(networks, config, runtime="tvm")


def test_sampler_state_dtype_is_the_type_of_the_state(tiny_net: NetFactory) -> None:
    double, single = (
        Sampler(Networks(tiny_net()), SamplingConfig(num_steps=5), state_dtype=dtype)
        for dtype in (torch.float64, torch.float32)
    )
    latents = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    by_config = Sampler(Networks(tiny_net()), SamplingConfig(num_steps=5, state_dtype="float32"))
    assert torch.equal(by_config.integrate(latents), single.integrate(latents))
    with pytest.raises(UserError, match="state_dtype 'half' is not one of float64, float32"):
        SamplingConfig(state_dtype="half")
    assert double.integrate(latents).dtype == torch.float64
    assert single.integrate(latents).dtype == torch.float32
    torch.testing.assert_close(single.integrate(latents), double.integrate(latents).float(), rtol=1e-3, atol=1e-3)


# Errors ---------------------------------------------------------------------------------------------------------------
def test_sampler_names_the_step_at_which_the_images_became_nan(tiny_net: NetFactory) -> None:
    """The first such step, though the later ones are no better."""
    sigmas = [step.sigma for step in Sampler(Networks(tiny_net()), SamplingConfig(num_steps=9)).steps]
    broken = Counting(tiny_net(), nan_below=sigmas[4] * 1.001)  # Heun meets sigmas[4] first at the end of step 3
    sampler = Sampler(Networks(broken), SamplingConfig(num_steps=9))
    with pytest.raises(UserError, match=rf"step 3 of 9, sigma {sigmas[3]:.4g}"):
        sampler([1, 2])
    euler = Sampler(Networks(broken), SamplingConfig(num_steps=9, solver="euler"))
    with pytest.raises(UserError, match=rf"step 4 of 9, sigma {sigmas[4]:.4g}"):
        euler([1, 2])


@pytest.mark.parametrize(
    ("labels", "message"),
    [([0, 4], "label 4 .* 0 to 3"), ([-1, 0], "label -1 "), ([1], "1 labels for 2"), ([0, 1, 2], "3 labels for 2")],
)
def test_sampler_refuses_labels_that_the_network_does_not_know(
    tiny_net: NetFactory, labels: list[int], message: str
) -> None:
    sampler = Sampler(Networks(tiny_net(label_dim=4)), SamplingConfig(num_steps=2))
    with pytest.raises(UserError, match=message):
        sampler([1, 2], labels)


def test_sampler_refuses_labels_for_an_unconditional_network(tiny_net: NetFactory) -> None:
    sampler = Sampler(Networks(tiny_net()), SamplingConfig(num_steps=2))
    assert sampler.draw_labels([1, 2]) is None
    with pytest.raises(UserError, match="unconditional"):
        sampler([1, 2], [0, 0])


@pytest.mark.parametrize(
    ("guidance", "role"),
    [
        (GuidanceConfig(dg_weight=1.0), "discriminator"),
        (GuidanceConfig(dg_weight_2nd=1.0), "discriminator"),
        (GuidanceConfig(classifier_scale=1.0), "classifier"),
        (GuidanceConfig(autoguidance=2.0), "reference"),
    ],
)
def test_sampler_names_the_network_that_a_guidance_misses(
    tiny_net: NetFactory, guidance: GuidanceConfig, role: str
) -> None:
    with pytest.raises(UserError, match=f"needs a {role} network"):
        Sampler(Networks(tiny_net(label_dim=4)), guidance=guidance)


@pytest.mark.parametrize("guidance", [GuidanceConfig(cfg_scale=2.0), GuidanceConfig(classifier_scale=1.0)])
def test_sampler_refuses_guidance_by_class_without_classes(tiny_net: NetFactory, guidance: GuidanceConfig) -> None:
    networks = Networks(tiny_net(), classifier=lambda u, t: u.flatten(1))
    with pytest.raises(UserError, match="conditional"):
        Sampler(networks, guidance=guidance)


@pytest.mark.parametrize(
    "wrong",
    [
        {"dg_window": (0.5, 0.5)},
        {"dg_window": (1.0, 0.01)},
        {"guidance_interval": (2.0, 1.0)},
        {"guidance_interval": (math.nan, 1.0)},
    ],
)
def test_sampler_guidance_config_names_the_setting_it_refuses(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(UserError, match=name):
        GuidanceConfig(**wrong)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"img_channels": 0}, "img_channels 0 and img_resolution 8 are no shape of an image"),
        ({"img_resolution": (8,)}, r"img_channels 1 and img_resolution \(8,\) are no shape of an image"),
        ({"img_resolution": "8"}, "img_resolution '8' are no shape of an image"),
        ({"label_dim": -1}, "label_dim -1 is no number of classes; without any it is 0"),
        ({"label_dim": None}, "label_dim None is no number of classes"),
        ({"sigma_min": math.nan}, "sigma_min nan must be at least 0, and below sigma_max"),
        ({"sigma_max": None}, "below sigma_max None"),
        ({"sigma_min": 80.0, "sigma_max": 0.002}, "sigma_min 80.0 must be at least 0, and below sigma_max 0.002"),
    ],
)
def test_networks_refuse_a_denoiser_that_says_nonsense(
    tiny_net: NetFactory, changes: dict[str, Any], complaint: str
) -> None:
    net = copy.deepcopy(tiny_net())
    vars(net).update(changes)
    with pytest.raises(UserError, match=f"denoiser EDMPrecond: .*{complaint}"):
        Networks(net)


def test_networks_refuse_what_is_no_denoiser() -> None:
    with pytest.raises(UserError, match=r"the denoiser None is no network: give a function \(x, sigma, class_labels\)"):
        Networks(None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="denoiser Identity has no img_channels, img_resolution, label_dim, sigma_min"):
        Networks(torch.nn.Identity())  # type: ignore[arg-type]


def test_sampler_refuses_what_is_no_source_of_noise_and_no_runtime(tiny_net: NetFactory) -> None:
    with pytest.raises(UserError, match="noise 3 is not one of cpu, cuda"):
        Sampler(Networks(tiny_net()), noise=3)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no runtime 3: there are eager"):
        Sampler(Networks(tiny_net()), runtime=3)  # type: ignore[arg-type]
