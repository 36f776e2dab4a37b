"""What the goldens cannot show of EDM2's network: folding, number formats, its layers' magnitude, and refusals."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.workloads import WORKLOADS, fill_
from dgfast import GuidanceConfig, Networks, SamplingConfig, nets
from dgfast.errors import UserError
from dgfast.job import Job
from dgfast.magnitude import Fourier, Layer, concatenated, mix, normalise
from dgfast.runtimes import RUNTIMES
from dgfast.weights import placed
from tests.support.runtimes import FLOAT32_TOL, largest_error

SMALL: dict[str, Any] = {
    "img_resolution": 8, "img_channels": 3, "label_dim": 4, "model_channels": 16, "channel_mult": [1, 2],
    "num_blocks": 1, "attn_resolutions": [4], "channels_per_head": 8,
}  # fmt: skip
X, SIGMA = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.01, 1.0, 40.0])
LABELS = torch.eye(4)[:3]


def made(**keywords: Any) -> Any:
    net = nets.build("EDM2Precond", **{**SMALL, **keywords})
    return fill_(net, torch.Generator().manual_seed(0)).eval().requires_grad_(False)


# Layers ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("t", [0.2, 0.5, 0.9])
def test_edm2_sums_and_concatenations_keep_unit_magnitude_and_shares(t: float) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(64, 6, 16, 16), torch.randn(64, 2, 16, 16)
    of_a, of_b = mix(t)
    assert math.hypot(of_a, of_b) == pytest.approx(1) and of_b / of_a == pytest.approx(t / (1 - t))
    both = concatenated(a, b, t)
    assert both.square().mean().sqrt() == pytest.approx(1, abs=0.01)
    shares = both[:, :6].square().sum().sqrt() / both[:, 6:].square().sum().sqrt()
    assert shares == pytest.approx((1 - t) / t, rel=0.02)


def test_edm2_norm_counts_its_epsilon_beside_the_root_and_stands_zeros() -> None:
    x = torch.tensor([[3e-4, 4e-4], [0.0, 0.0]]).requires_grad_()
    rms = math.sqrt((3e-4**2 + 4e-4**2) / 2)
    torch.testing.assert_close(normalise(x, 1)[0], x[0].detach() / (rms + 1e-4))
    (gradient,) = torch.autograd.grad(normalise(x, 1).sum(), x)
    assert gradient.isfinite().all()


def test_edm2_layer_does_not_hear_the_size_of_its_weight() -> None:
    layer = Layer(8, 5, [3, 3]).requires_grad_(False)
    x, gain = torch.randn(2, 8, 6, 6), torch.tensor(0.7)
    small = layer(x, gain)
    layer.weight.mul_(1000)
    torch.testing.assert_close(layer(x, gain), small, rtol=2e-4, atol=1e-5)
    assert Fourier(4)(torch.tensor([0.3, 2.0])).abs().max() <= math.sqrt(2)


# Folding --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "keywords",
    [
        pytest.param({}, id="usual"),
        pytest.param({"label_dim": 0}, id="unconditional"),
        pytest.param({"channels_per_head": 64}, id="no_heads"),
        pytest.param({"clip_act": None, "resample_filter": [1, 3, 3, 1]}, id="filter"),
        pytest.param({"res_balance": 0.5, "attn_balance": 0.1, "label_balance": 0.2, "clip_act": 0.5}, id="balances"),
    ],
)
def test_edm2_folded_weights_give_the_same_images(keywords: dict[str, Any]) -> None:
    net = made(**keywords)
    folded = copy.deepcopy(net)
    folded.fold()
    labels = LABELS if net.label_dim else None
    for classes in (labels, None):
        torch.testing.assert_close(folded(X, SIGMA, classes), net(X, SIGMA, classes), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(folded.log_variance(SIGMA), net.log_variance(SIGMA), rtol=1e-5, atol=1e-6)
    once = folded(X, SIGMA, labels)
    folded.fold()
    assert torch.equal(folded(X, SIGMA, labels), once), "a second fold changes nothing"


def test_edm2_folded_and_official_weights_are_not_taken_for_each_other() -> None:
    net, folded = made(), made()
    folded.fold()
    assert {name for name in net.state_dict().keys() - folded.state_dict().keys()} == {
        name for name in net.state_dict() if name.endswith("gain")
    }
    for one, other in ((net, folded), (folded, net)):
        with pytest.raises(RuntimeError, match="gain"):
            one.load_state_dict(other.state_dict())


def test_edm2_without_enough_channels_for_a_head_has_no_attention() -> None:
    assert not [name for name in made(channels_per_head=64).state_dict() if "attn" in name]
    assert "unet.dec.4x4_in0.attn_qkv.weight" in made(attn_resolutions=[]).state_dict(), "there it always stands"
    with pytest.raises(ValueError, match="40 channels cannot be shared among 3 heads"):
        made(model_channels=20, channels_per_head=13)


def test_edm2_clips_its_activations() -> None:
    net = made(clip_act=0.01)
    assert (net(X, SIGMA, LABELS) - made()(X, SIGMA, LABELS)).abs().max() > 1e-3


# Number formats and runtimes ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_edm2_keeps_embedding_and_images_in_float32_whatever_its_type(dtype: torch.dtype) -> None:
    net = placed(made(), "cpu", dtype)
    types = {name: value.dtype for name, value in net.state_dict().items()}
    kept = {name for name, found in types.items() if found == torch.float32}
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in kept} == {
        "emb_fourier", "emb_noise", "emb_label", "emb_linear", "logvar_fourier", "logvar_linear",
    }  # fmt: skip
    assert {types[name] for name in types.keys() - kept} == {dtype}
    images = net(X, SIGMA, LABELS)
    assert images.dtype == torch.float32
    error = largest_error(images, made()(X, SIGMA, LABELS))
    assert 1e-6 < error < (0.05 if dtype == torch.bfloat16 else 0.01)


@pytest.mark.parametrize("runtime", ["compiled", "onnx"])
def test_edm2_guided_by_a_worse_network_is_the_same_in_every_runtime(runtime: str) -> None:
    workload = WORKLOADS["edm2-tiny"]()
    networks = workload.load(torch.device("cpu"), torch.float32)
    job = Job(networks, workload.sampling, workload.guidance)
    function = job.guided("denoiser", job.steps[0].predictor)
    sigma, labels = torch.tensor([0.02, 3.0, 60.0]), torch.eye(3)
    example = X, torch.ones(3), labels
    run = RUNTIMES[runtime].build(function, example)
    with torch.no_grad():
        for seed in (1, 2):
            noise = torch.randn(X.shape, generator=torch.Generator().manual_seed(seed))
            arguments = (0.5 + sigma).view(-1, 1, 1, 1) * noise, sigma, labels
            assert largest_error(run(*arguments)[0], function(*arguments)[0]) < FLOAT32_TOL


# Guidance by a network of its own -------------------------------------------------------------------------------------
def test_edm2_is_guided_by_an_unconditional_network() -> None:
    net, unconditional = made(), made(label_dim=0, model_channels=8)
    job = Job(Networks(net, reference=unconditional), SamplingConfig(), GuidanceConfig(autoguidance=1.4))
    function = job.guided("denoiser", job.steps[0].predictor)
    plain, worse = net(X, SIGMA, LABELS), unconditional(X, SIGMA, None)
    torch.testing.assert_close(function(X, SIGMA, LABELS)[0], worse + 1.4 * (plain - worse), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("keywords", "complaint"),
    [
        ({"img_resolution": 16}, "knows 16 pixels a side, the score network 8"),
        ({"img_channels": 4}, "knows 4 channels, the score network 3"),
        ({"label_dim": 5}, "knows 5 classes, the score network 4"),
    ],
)
def test_edm2_reference_of_other_images_is_refused(keywords: dict[str, Any], complaint: str) -> None:
    networks = Networks(made(), reference=made(**keywords))
    with pytest.raises(UserError, match=complaint):
        Job(networks, SamplingConfig(), GuidanceConfig(autoguidance=1.4))


def test_edm2_is_not_guided_by_itself_without_labels() -> None:
    with pytest.raises(UserError, match="an unconditional network as reference guides by --autoguidance"):
        Job(Networks(made()), SamplingConfig(), GuidanceConfig(cfg_scale=1.4))


def test_edm2_gradients_of_its_images_are_finite() -> None:
    """Guidances that differentiate the denoiser do so through its norms."""
    net: nn.Module = made()
    net.fold()  # type: ignore[operator]
    x = torch.zeros(1, 3, 8, 8).requires_grad_()
    (gradient,) = torch.autograd.grad(net(x, torch.tensor([1.0]), LABELS[:1]).sum(), x)
    assert gradient.isfinite().all() and gradient.abs().max() > 0
