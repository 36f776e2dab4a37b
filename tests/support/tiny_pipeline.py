"""The smallest modular pipeline that diffusers' own classes make: a U-Net with classes, a scheduler, a guider."""

from typing import Any

import torch
from diffusers import (
    ClassifierFreeGuidance,
    ComponentSpec,
    InputParam,
    LoopSequentialPipelineBlocks,
    ModularPipelineBlocks,
    OutputParam,
    SchedulerMixin,
    UNet2DModel,
)
from torch import Tensor, nn

CLASSES, SIZE = 3, 8


def tiny_unet(seed: int) -> UNet2DModel:
    """A randomly initialised one, which reads class `CLASSES` as no class."""
    torch.manual_seed(seed)
    net = UNet2DModel(
        sample_size=SIZE, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4, num_class_embeds=CLASSES + 1,
    )  # fmt: skip
    return net.eval().requires_grad_(False)


class _Denoise(ModularPipelineBlocks):  # type: ignore[misc]  # diffusers ships no types
    """A prediction in the way of diffusers' own loops: the guider prepares, the network predicts, the guider mixes."""

    model_name = "tiny"

    @property
    def expected_components(self) -> list[Any]:
        config = {"guidance_scale": 1.0}
        guider = ComponentSpec("guider", ClassifierFreeGuidance, config=config, default_creation_method="from_config")
        return [guider, ComponentSpec("unet", UNet2DModel), ComponentSpec("scheduler", SchedulerMixin)]

    @property
    def inputs(self) -> list[Any]:
        return [InputParam(name, required=True) for name in ("latents", "labels", "no_labels", "num_inference_steps")]

    @torch.no_grad()
    def __call__(self, components: Any, state: Any, i: int, t: Tensor) -> Any:
        guider, labels = components.guider, {"class_labels": (state.labels, state.no_labels)}
        guider.set_state(step=i, num_inference_steps=state.num_inference_steps, timestep=t)
        scaled = components.scheduler.scale_model_input(state.latents, t)
        batches = guider.prepare_inputs(labels)
        for batch in batches:
            guider.prepare_models(components.unet)
            batch.noise_pred = components.unet(scaled, t, class_labels=batch.class_labels, return_dict=False)[0]
            guider.cleanup_models(components.unet)
        state.latents = components.scheduler.step(guider(batches)[0], t, state.latents, return_dict=False)[0]
        return components, state


class _Loop(LoopSequentialPipelineBlocks):  # type: ignore[misc]  # diffusers ships no types
    model_name = "tiny"
    block_classes = (_Denoise,)
    block_names = ("denoise",)

    @property
    def loop_inputs(self) -> list[Any]:
        return [InputParam("num_inference_steps", required=True)]

    @property
    def outputs(self) -> list[Any]:
        return [OutputParam("latents")]

    @torch.no_grad()
    def __call__(self, components: Any, state: Any) -> Any:
        block_state = self.get_block_state(state)
        components.scheduler.set_timesteps(block_state.num_inference_steps)
        for i, t in enumerate(components.scheduler.timesteps):
            components, block_state = self.loop_step(components, block_state, i=i, t=t)
        self.set_block_state(state, block_state)
        return components, state


def tiny_pipeline(unet: nn.Module, scheduler: SchedulerMixin, guider: Any) -> Any:
    """A pipeline that is called with latents, labels, no_labels and num_inference_steps, and returns latents."""
    pipeline = _Loop().init_pipeline()
    pipeline.update_components(unet=unet, scheduler=scheduler, guider=guider)
    return pipeline
