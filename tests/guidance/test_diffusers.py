"""Guiders for diffusers: judged by what its own schedulers make of a prediction, and in one of its pipelines."""

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import (
    ClassifierFreeGuidance,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)
from torch import Tensor, nn

from dgfast import guidance
from dgfast.diffusers import Autoguidance, DiscriminatorGuidance
from dgfast.errors import UserError
from dgfast.guidance import guided_denoiser
from tests.support.guidance import DATA, exact_discriminator
from tests.support.tiny_pipeline import CLASSES, SIZE, tiny_pipeline, tiny_unet

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of its schedulers

SCHEDULERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "euler, epsilon": (EulerDiscreteScheduler, {}),
    "euler, velocity": (EulerDiscreteScheduler, {"prediction_type": "v_prediction"}),
    "euler, karras": (EulerDiscreteScheduler, {"use_karras_sigmas": True}),
    "ddim, epsilon": (DDIMScheduler, {"clip_sample": False}),
    "ddim, sample": (DDIMScheduler, {"clip_sample": False, "prediction_type": "sample"}),
    "ddim, zero snr": (
        DDIMScheduler,
        {
            "clip_sample": False,
            "prediction_type": "v_prediction",
            "rescale_betas_zero_snr": True,
            "timestep_spacing": "trailing",
        },
    ),
}


def predicted(x: Tensor, denoised: Tensor, sigma: float, kind: str) -> Tensor:
    """Of clean images, what such a network would say; x in VE coordinates."""
    noise = (x - denoised) / sigma
    return {
        "epsilon": noise,
        "sample": denoised,
        "v_prediction": (noise - sigma * denoised) / (1 + sigma**2) ** 0.5,
        "flow": noise - denoised,
    }[kind]


def guided(guider: Any, network: Callable[..., Tensor], read: Tensor, t: Tensor, step: int) -> Tensor:
    """What a pipeline gets from a guider, for a network that has no condition."""
    net = nn.Identity()
    net.forward = lambda sample, timestep, **unused: network(sample)  # type: ignore[method-assign]
    guider.set_state(step=step, num_inference_steps=5, timestep=t)
    batches = guider.prepare_inputs({})
    for batch in batches:
        guider.prepare_models(net)
        batch.noise_pred = net(read, t)
        guider.cleanup_models(net)
    assert not net._forward_pre_hooks
    result: Tensor = guider(batches)[0]
    return result


@pytest.mark.parametrize("name", SCHEDULERS)
def test_guider_gives_the_scheduler_the_denoised_images_of_the_guided_denoiser(name: str) -> None:
    kind, settings = SCHEDULERS[name]
    scheduler = kind(**settings)
    scheduler.set_timesteps(5)
    guider = DiscriminatorGuidance(exact_discriminator, scheduler, weight=0.7)
    expected = guided_denoiser(DATA, [guidance.DiscriminatorGuidance(exact_discriminator, 0.7)])
    generator, acted = torch.Generator().manual_seed(0), 0
    for step, t in enumerate(scheduler.timesteps):
        kept = float(scheduler.alphas_cumprod[int(t)])
        has_sigmas = hasattr(scheduler, "sigmas")
        if not kept and not has_sigmas:  # nothing but noise: no level that a discriminator knows
            read = torch.randn(2, 1, 2, 2, generator=generator)
            assert torch.equal(guided(guider, lambda u: 2 * u, read, t, step), 2 * read)
            continue
        sigma = float(scheduler.sigmas[step]) if has_sigmas else ((1 - kept) / kept) ** 0.5
        x = 0.3 + (0.25 + sigma**2) ** 0.5 * torch.randn(2, 1, 2, 2, generator=generator)
        latents = x if has_sigmas else x * kept**0.5
        read = scheduler.scale_model_input(latents, t)
        levels = torch.full((2,), sigma, dtype=torch.float64)
        plain = DATA(x.double(), levels, None)
        prediction = predicted(x.double(), plain, sigma, scheduler.config.prediction_type).float()
        corrected = guided(guider, lambda u, p=prediction: p, read, t, step)
        step_kwargs: dict[str, Any] = {"return_dict": True}
        denoised = scheduler.step(corrected, t, latents, **step_kwargs).pred_original_sample
        want, log_ratio = expected(x.double(), levels, None)
        # What float32 makes of a difference of numbers of sigma's size.
        torch.testing.assert_close(denoised.double(), want, rtol=0, atol=2e-6 * (1 + sigma))
        acted += int((log_ratio < 1e6).all() and bool((want - plain).abs().max() > 1e-3))
    assert acted >= 3


def test_guider_corrects_the_velocity_of_flow_matching() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    scheduler.set_timesteps(5)
    guider = DiscriminatorGuidance(exact_discriminator, scheduler, weight=0.7)
    expected = guided_denoiser(DATA, [guidance.DiscriminatorGuidance(exact_discriminator, 0.7)])
    for step, t in enumerate(scheduler.timesteps):
        share = float(scheduler.sigmas[step])  # of noise; at first all of it
        if share == 1:
            read = torch.randn(2, 1, 2, 2)
            assert torch.equal(guided(guider, lambda u: 2 * u, read, t, step), 2 * read)
            continue
        sigma = share / (1 - share)
        x = 0.3 + (0.25 + sigma**2) ** 0.5 * torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(step))
        levels = torch.full((2,), sigma, dtype=torch.float64)
        prediction = predicted(x.double(), DATA(x.double(), levels, None), sigma, "flow").float()
        velocity = guided(guider, lambda u, p=prediction: p, x * (1 - share), t, step)
        denoised = x * (1 - share) - share * velocity  # x_t = (1 - share) x0 + share noise, v = noise - x0
        torch.testing.assert_close(denoised.double(), expected(x.double(), levels, None)[0], rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def call() -> dict[str, Any]:
    latents = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    none = torch.full((2,), CLASSES)
    return {"latents": 157 * latents, "labels": torch.tensor([0, 2]), "no_labels": none, "num_inference_steps": 4}


def bright(u: Tensor, t: Tensor, class_labels: Tensor | None) -> Tensor:
    """The logit of a discriminator for which real images are bright; small, for at 11.5 its gradient ends."""
    return 0.03 * u.mean(dim=(1, 2, 3))


def test_guiders_stand_around_one_another_in_a_pipeline(call: dict[str, Any]) -> None:
    unet, scheduler, reference = tiny_unet(0), EulerDiscreteScheduler(), tiny_unet(1)

    def drawn(guider: Any) -> Tensor:
        latents: Tensor = tiny_pipeline(unet, scheduler, guider)(**call, output="latents")
        return latents

    cfg = ClassifierFreeGuidance(guidance_scale=2.0)
    plain = drawn(cfg)
    idle = DiscriminatorGuidance(bright, scheduler, weight=0.0, guider=cfg)
    assert torch.equal(drawn(idle), plain)
    assert torch.equal(drawn(Autoguidance(reference, 1.0, guider=cfg)), plain)
    acting = DiscriminatorGuidance(bright, scheduler, weight=3000.0, guider=cfg)
    brighter = drawn(acting)
    assert (brighter - plain).mean() > 0.05  # as the discriminator likes them
    torch.testing.assert_close(drawn(idle.new(weight=3000.0)), brighter, rtol=0, atol=0)
    apart = drawn(Autoguidance(reference, 1.5, guider=cfg)) - plain
    assert apart.abs().max() > 1e-2
    both = drawn(Autoguidance(reference, 1.5, guider=acting))
    assert (both - plain - apart).mean() > 0.05
    assert "weight" in repr(acting) and acting.num_conditions == 2


def test_autoguidance_asks_the_reference_for_the_conditional_prediction(call: dict[str, Any]) -> None:
    """An Euler step of it is the step of D_ref + w (D - D_ref), which the two networks make by themselves."""
    unet, reference, w = tiny_unet(0), tiny_unet(1), 1.7
    scheduler = EulerDiscreteScheduler()
    one = {**call, "num_inference_steps": 1}
    guider = Autoguidance(reference, w, guider=ClassifierFreeGuidance(guidance_scale=3.0))
    mine = tiny_pipeline(unet, scheduler, guider)(**one, output="latents")
    cfg = tiny_pipeline(unet, scheduler, ClassifierFreeGuidance(guidance_scale=3.0))(**one, output="latents")
    better, worse = (
        tiny_pipeline(net, scheduler, ClassifierFreeGuidance(1.0))(**one, output="latents") for net in (unet, reference)
    )
    torch.testing.assert_close(mine, cfg + (w - 1) * (better - worse), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("scheduler", "line"),
    [
        (EDMEulerScheduler(), "EDMEulerScheduler with prediction_type 'epsilon' is none that dgfast knows"),
        (DPMSolverMultistepScheduler(prediction_type="odd"), "prediction_type 'odd' is none that dgfast knows"),
    ],
    ids=["edm", "prediction"],
)
def test_guider_refuses_schedulers_of_another_scale(scheduler: Any, line: str) -> None:
    with pytest.raises(UserError, match=line):
        DiscriminatorGuidance(bright, scheduler)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"scheduler": None}, "scheduler is a NoneType; give the pipeline's own"),
        ({"guider": ClassifierFreeGuidance}, "guider is the class ClassifierFreeGuidance; give a guider that was made"),
        ({"guider": 7.5}, "guider is a float"),
        ({"weight": float("nan")}, "weight nan must be a finite number"),
        ({"window": (1.0, 0.01)}, r"window \(1.0, 0.01\): give two times, the first below the second"),
        ({"window": (1.0,)}, "give two times"),
        ({"class_labels": torch.ones(3)}, r"class_labels are \[3\]; give a tensor \[B, label_dim\]"),
        ({"class_labels": 3}, "class_labels are int"),
    ],
    ids=str,
)
def test_guider_of_arguments_that_mean_nothing_is_refused(arguments: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        DiscriminatorGuidance(bright, **{"scheduler": EulerDiscreteScheduler(), **arguments})


def test_guider_says_what_it_cannot_guide(call: dict[str, Any]) -> None:
    scheduler = EulerDiscreteScheduler()
    scheduler.set_timesteps(5)
    t = scheduler.timesteps[2]
    images = torch.zeros(2, 3, 4, 4)
    with pytest.raises(UserError, match=r"of images \[B, C, H, W\]"):
        guided(DiscriminatorGuidance(bright, scheduler), lambda u: u, torch.zeros(2, 16, 4), t, 2)
    with pytest.raises(UserError, match="timestep 123 is none of the scheduler's"):
        guided(DiscriminatorGuidance(bright, scheduler), lambda u: u, images, torch.tensor(123.0), 2)
    with pytest.raises(UserError, match=r"class_labels are \[3, 4\], of another number than the 2 images"):
        guided(DiscriminatorGuidance(bright, scheduler, class_labels=torch.ones(3, 4)), lambda u: u, images, t, 2)
    with torch.inference_mode(), pytest.raises(UserError, match="not inference_mode"):
        guided(DiscriminatorGuidance(bright, scheduler), lambda u: u, images, t, 2)
    with pytest.raises(UserError, match="saw no call of the denoiser"):
        DiscriminatorGuidance(bright, scheduler).forward(images)
    small = UNet2DModel(
        sample_size=SIZE, in_channels=3, out_channels=1, layers_per_block=1, block_out_channels=(8,), norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), num_class_embeds=CLASSES + 1,
    )  # fmt: skip
    pipeline = tiny_pipeline(tiny_unet(0), scheduler, Autoguidance(small, 2.0))
    with pytest.raises(UserError, match=r"the reference predicts \[2, 1, 8, 8\], the denoiser \[2, 3, 8, 8\]"):
        pipeline(**call, output="latents")


def test_a_diffusers_without_guiders_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", ModuleType("diffusers"))
    monkeypatch.delitem(sys.modules, "dgfast.diffusers")
    with pytest.raises(ImportError, match=r"needs a diffusers with guiders, .*: pip install -U 'dgfast\[latent\]'"):
        importlib.import_module("dgfast.diffusers")
