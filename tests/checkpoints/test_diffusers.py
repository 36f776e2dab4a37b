"""Networks of diffusers: tiny ones, saved by diffusers into folders, against its own schedulers' formulas."""

import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor

from dgfast import bundle as bundles
from dgfast.config import GuidanceConfig, SamplingConfig
from dgfast.convert import main
from dgfast.networks import Networks, load
from dgfast.sample import main as sample
from dgfast.sampler import Sampler

diffusers: Any = pytest.importorskip("diffusers")
UNET = {
    "sample_size": (8, 16), "in_channels": 2, "out_channels": 2, "block_out_channels": (8, 16), "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1, "attention_head_dim": 4,
}  # fmt: skip
DIT = {
    "sample_size": 8, "in_channels": 4, "out_channels": 8, "num_attention_heads": 2, "attention_head_dim": 8,
    "num_layers": 2, "num_embeds_ada_norm": 3, "norm_num_groups": 4,
}  # fmt: skip


def saved(folder: Path, scheduler: Any = None, **changes: Any) -> Any:
    """A DDPM pipeline of two channels and twice as wide as high, saved; its network."""
    torch.manual_seed(0)
    net = diffusers.UNet2DModel(**UNET | changes).eval()
    diffusers.DDPMPipeline(net, scheduler or diffusers.DDPMScheduler()).save_pretrained(folder)
    return net


def converted(folder: Path, *options: str) -> tuple[str, bundles.Bundle]:
    out = folder.parent / "bundle"
    result = CliRunner().invoke(main, [str(folder), "--out", str(out), *options])
    assert result.exit_code == 0, result.output
    return result.output, bundles.read(out)


def refused(folder: Path, *options: str) -> str:
    result = CliRunner().invoke(main, [str(folder), "--out", str(folder.parent / "bundle"), *options])
    assert result.exit_code == 2 and result.output.count("\n") == 1, result.output
    assert not (folder.parent / "bundle").exists()
    return result.output


def predicted_clean(scheduler: Any, out: Tensor, noisy: Tensor, t: int) -> Tensor:
    """pred_original_sample of its `step`, of unit-variance noisy images at timestep t."""
    scheduler.set_timesteps(scheduler.config.num_train_timesteps)
    return scheduler.step(out, t, noisy).pred_original_sample


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_a_pipeline_is_the_denoiser_of_its_scheduler(tmp_path: Path, schedule: str, prediction: str) -> None:
    about = {"beta_schedule": schedule, "prediction_type": prediction, "clip_sample": False, "beta_end": 0.015}
    scheduler = diffusers.DDIMScheduler(num_train_timesteps=200, **about)
    net = saved(tmp_path / "pipeline", scheduler)
    _, bundle = converted(tmp_path / "pipeline")
    denoiser: Any = load(bundle).denoiser
    assert (denoiser.img_channels, denoiser.img_resolution, denoiser.label_dim) == (2, (8, 16), 0)
    alpha_bar = scheduler.alphas_cumprod.double()
    torch.testing.assert_close(denoiser.levels, ((1 - alpha_bar) / alpha_bar).sqrt(), rtol=2e-4, atol=0)
    noisy = torch.randn((2, 2, 8, 16), generator=torch.Generator().manual_seed(1))
    for t in (0, 77, 150):
        sigma = denoiser.levels[t].expand(2)
        with torch.no_grad():
            expected = predicted_clean(scheduler, net(noisy, t).sample, noisy, t)
            found = denoiser(noisy * (1 + sigma[0] ** 2).sqrt(), sigma, None)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-4)
    assert bundle.sampling.clip_denoised is False and bundle.sampling.solver == "ddim"


@pytest.mark.parametrize("runtime, kind", [("compiled", "unet"), ("onnx", "dit")])
def test_what_diffusers_made_runs_compiled_and_in_onnx(tmp_path: Path, runtime: str, kind: str) -> None:
    guidance = GuidanceConfig()
    if kind == "unet":
        one = {
            "block_out_channels": (8,),
            "down_block_types": ("AttnDownBlock2D",),
            "up_block_types": ("AttnUpBlock2D",),
        }
        saved(tmp_path / "model", num_class_embeds=3, **one)
        converted(tmp_path / "model")
    else:
        torch.manual_seed(0)
        diffusers.DiTTransformer2DModel(**DIT).save_pretrained(tmp_path / "model")
        converted(tmp_path / "model", "--set", "beta_schedule=linear", "--set", "prediction_type=epsilon")
        guidance = GuidanceConfig(cfg_scale=1.5)
    networks, config = load(bundles.read(tmp_path / "bundle")), SamplingConfig(solver="ddim", respacing="2")
    eager, built = (Sampler(networks, config, guidance, runtime=kind) for kind in ("eager", runtime))
    images = eager([1, 2], [0, 2])
    assert images.shape[1:] == ((2, 8, 16) if kind == "unet" else (4, 8, 8))
    assert not torch.equal(images, eager([1, 2], [1, 2]))
    torch.testing.assert_close(built([1, 2], [0, 2]), images, rtol=0, atol=1e-3 * float(images.abs().max()))


def test_a_dit_pipeline_brings_classes_no_class_variance_and_its_decoder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    dit = diffusers.DiTTransformer2DModel(**DIT).eval()
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=8)
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    diffusers.DiTPipeline(dit, vae, scheduler, {0: "a", 1: "b", 2: "c"}).save_pretrained(tmp_path / "pipeline")
    told, bundle = converted(tmp_path / "pipeline")
    assert "folder of diffusers: DiTTransformer2DModel and DDIMScheduler" in told
    denoiser: Any = load(bundle).denoiser
    assert (denoiser.label_dim, denoiser.null_class, denoiser.learn_sigma) == (3, 3, True)
    noisy = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(1))
    sigma = denoiser.levels[500].expand(2)
    x = noisy * (1 + sigma[0] ** 2).sqrt()
    for rows, classes in ((torch.eye(3)[[0, 2]], torch.tensor([0, 2])), (None, torch.tensor([3, 3]))):
        with torch.no_grad():
            out = dit(noisy, timestep=torch.tensor([500, 500]), class_labels=classes).sample
            found, v = denoiser.with_variance(x, sigma, rows)
        torch.testing.assert_close(v, out[:, 4:], rtol=1e-4, atol=1e-4)
        expected = predicted_clean(scheduler, out[:, :4], noisy, 500)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    options = ["--bundle", str(bundle.folder), "--seeds", "0-1", "--respacing", "2", "--out", str(tmp_path / "drawn")]
    drawn = CliRunner().invoke(sample, options)
    assert drawn.exit_code == 0, drawn.output


def test_images_of_two_channels_that_are_not_square_are_drawn(tmp_path: Path) -> None:
    """By the command, into what has room for them."""
    import numpy as np
    from PIL import Image

    saved(tmp_path / "pipeline")
    told, bundle = converted(tmp_path / "pipeline", "--vae", "none")
    assert "[8, 16]" in told
    command = ["--bundle", str(bundle.folder), "--seeds", "0-3", "--respacing", "2", "--out", str(tmp_path / "out")]
    drawn = CliRunner().invoke(sample, command)
    assert drawn.exit_code == 0 and "grid.png: the first 4, their 2 channels side by side" in drawn.output
    with np.load(tmp_path / "out" / "images-00000.npz") as shard:
        assert shard["images"].shape == (4, 8, 16, 2)
        images = shard["images"]
    with Image.open(tmp_path / "out" / "grid.png") as grid:
        assert grid.size == (2 * 32, 2 * 8) and np.array_equal(np.asarray(grid)[8:, :16], images[2, ..., 0])
        assert np.array_equal(np.asarray(grid)[8:, 16:32], images[2, ..., 1])
    for name in ("png", "adm"):
        refusal = CliRunner().invoke(sample, [*command[:-1], str(tmp_path / name), "--format", name])
        assert (
            refusal.exit_code == 2
            and f"--format {name} keeps grey and colour images, and these have 2 channels; us" in (refusal.output)
        )
    assert "Networks: DiffusersPrecond of FromDiffusers" in repr(load(bundle)) and "2 x 8 x 16" in repr(load(bundle))
    bare = CliRunner().invoke(sample, ["--bundle", str(bundle.folder), "--dry-run", "--vae", "none", "--seeds", "0"])
    assert bare.exit_code == 0, bare.output


def test_the_size_of_a_network_for_any_is_told(tmp_path: Path) -> None:
    saved(tmp_path / "pipeline", sample_size=None)
    assert "its sample_size is open; give --set img_resolution=64, or [height,width]" in refused(tmp_path / "pipeline")
    assert "must be a whole number, or height and width" in refused(
        tmp_path / "pipeline", "--set", "img_resolution=[8,8,8]"
    )
    _, bundle = converted(tmp_path / "pipeline", "--set", "img_resolution=[16,8]")
    assert Sampler(load(bundle)).shape == (2, 16, 8)


@pytest.mark.parametrize(
    ("place", "changes", "complaint"),
    [
        ("scheduler", {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "its scheduler is FlowMatchEulerDiscreteSch"),
        ("scheduler", {"beta_schedule": "sigmoid"}, "its scheduler's beta_schedule is 'sigmoid'; dgfast has linear"),
        ("scheduler", {"prediction_type": "flow_prediction"}, "prediction_type is 'flow_prediction'; dgfast has eps"),
        ("scheduler", {"trained_betas": [0.1]}, "its scheduler has trained_betas"),
        ("scheduler", {"rescale_betas_zero_snr": True}, "its scheduler has rescale_betas_zero_snr"),
        ("scheduler", {"beta_end": 2}, "its betas must lie between 0 and 1"),
        ("scheduler", {"num_train_timesteps": 10**9}, "100,000 is the most"),
        ("unet", {"_class_name": "UNet2DConditionModel"}, "diffusers' UNet2DConditionModel; dgfast reads UNet2DModel"),
        ("unet", {"time_embedding_type": "fourier"}, "time_embedding_type 'fourier': dgfast reads those with posi"),
    ],
)  # fmt: skip
def test_what_dgfast_has_not_is_refused_by_name(
    tmp_path: Path, place: str, changes: dict[str, Any], complaint: str
) -> None:
    saved(tmp_path / "pipeline")
    file = tmp_path / "pipeline" / place / ("config.json" if place == "unet" else "scheduler_config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    assert complaint in refused(tmp_path / "pipeline")


def test_what_a_folder_lacks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "pipeline"
    net = saved(folder)
    assert "say itself" not in refused(folder, "--role", "classifier")
    assert "which says itself what it is" in refused(folder, "--kind", "EDMPrecond")
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "diffusers", None)
        assert "needs diffusers" in (line := refused(folder)) and "pip install 'dgfast[latent]'" in line
    assert "has no scheduler_config.json: give --set beta_schedule=linear and --set" in refused(folder / "unet")
    assert "takes sides that are multiples of 2" in refused(folder, "--set", "img_resolution=[7,16]")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    save_file(state | {"conv_in.bias": torch.full_like(state["conv_in.bias"], torch.nan)}, weights)
    assert "weights that are not finite" in refused(folder)
    weights.unlink()
    torch.save(net.state_dict(), weights.with_suffix(".bin"))
    assert "no UNet2DModel with safetensors weights there" in refused(folder)


def test_keywords_that_divide_by_zero_are_refused(tmp_path: Path) -> None:
    saved(tmp_path / "pipeline")
    file = tmp_path / "pipeline" / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"norm_num_groups": 0}))
    assert "no UNet2DModel" in refused(tmp_path / "pipeline")


def test_folder_without_safetensors_gets_one_line(tmp_path: Path) -> None:
    """diffusers' own loader reports a missing file in its log, too."""
    saved(tmp_path / "pipeline")
    (tmp_path / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    logged: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = logged.append  # type: ignore[method-assign, assignment]
    diffusers.utils.logging.add_handler(handler)
    try:
        assert "no UNet2DModel with safetensors weights there" in refused(tmp_path / "pipeline")
    finally:
        diffusers.utils.logging.remove_handler(handler)
    assert not logged


def test_a_network_of_diffusers_in_python_needs_no_bundle() -> None:
    """Wrapped by hand, as any network of your own."""
    from dgfast.denoiser import DiffusersPrecond
    from dgfast.nets.from_diffusers import FromDiffusers

    torch.manual_seed(0)
    net = FromDiffusers(diffusers.UNet2DModel(**UNET), null_class=None).eval().requires_grad_(False)
    sampler = Sampler(Networks(DiffusersPrecond(net, (8, 16), 2, 0)), SamplingConfig(num_steps=2))
    assert sampler([0]).shape == (1, 2, 8, 16)
