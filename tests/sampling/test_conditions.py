"""Extra conditions: handed through to the denoiser in every runtime and batch, refused where they do not fit."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dgfast.batches import draw
from dgfast.chunks import Chunk
from dgfast.config import GuidanceConfig, SamplingConfig
from dgfast.engines import runtime_of
from dgfast.errors import UserError
from dgfast.export.joint_graph import joint
from dgfast.export.onnx_file import export
from dgfast.job import Job
from dgfast.networks import Networks
from dgfast.outputs import Drawn, Fetcher
from dgfast.ranges import Ranges
from dgfast.runtimes.onnx.session import OnnxEngine
from dgfast.sampler import Sampler


class Conditional(nn.Module):
    """Images 4 x 6 of 2 channels, drawn toward a mean that a text, a strength and the class decide."""

    img_channels, img_resolution, label_dim, sigma_min, sigma_max = 2, (4, 6), 3, 0.0, 80.0
    conditions: ClassVar[Mapping[str, tuple[int, ...]]] = {"text": (5, 3), "strength": ()}

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.classes = nn.Linear(15, 48), nn.Linear(3, 48)

    def forward(
        self, x: Tensor, sigma: Tensor, class_labels: Tensor | None, *, text: Tensor, strength: Tensor
    ) -> Tensor:
        mean = self.embed(text.flatten(1)) * strength[:, None]
        if class_labels is not None:
            mean = mean + self.classes(class_labels)
        variance = (sigma.float() ** 2).view(-1, 1, 1, 1)
        return (x.float() + variance * mean.view(-1, 2, 4, 6)) / (1 + variance)

    def round_sigma(self, sigma: Tensor) -> Tensor:
        return sigma


SEEDS, LABELS = [3, 1, 4], [0, 2, 1]
CONFIG = SamplingConfig(num_steps=3)
CFG = GuidanceConfig(cfg_scale=1.5)


def values(count: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"text": torch.randn((count, 5, 3), generator=generator), "strength": torch.linspace(0.5, 1, count)}


def networks(**others: Any) -> Networks:
    return Networks(Conditional().eval().requires_grad_(False), **others)


@pytest.mark.parametrize("solver", ["heun", "ddim", "dpmpp-2m", "ddpm"])
def test_conditions_reach_the_network_one_row_a_sample(solver: str) -> None:
    sampler, given = Sampler(networks(), SamplingConfig(num_steps=3, solver=solver), CFG), values()
    images = sampler(SEEDS, LABELS, conditions=given)
    assert images.shape == (3, 2, 4, 6)
    for k in range(3):
        alone = sampler(SEEDS[k : k + 1], LABELS[k : k + 1], conditions={n: v[k : k + 1] for n, v in given.items()})
        torch.testing.assert_close(alone[0], images[k], rtol=1e-4, atol=1e-3)
    for name in given:
        assert not torch.allclose(images, sampler(SEEDS, LABELS, conditions=given | {name: given[name] + 1}))


def test_conditions_are_in_every_term_of_guidance_that_drops_labels_alone() -> None:
    """Classifier-free guidance mixes with the network of no class, under the same conditions; autoguidance too."""
    net, worse = networks().denoiser, Conditional(seed=1).eval().requires_grad_(False)
    x, sigma, rows = torch.randn(3, 2, 4, 6).double(), torch.full((3,), 2.0).double(), torch.eye(3)[LABELS]
    job = Job(Networks(net, reference=worse), CONFIG, GuidanceConfig(cfg_scale=1.5, autoguidance=2.0))
    function, given = job.called(job.steps[0].predictor), values()
    assert function.inputs == ("x", "sigma", "class_labels", "text", "strength")
    denoised, _ = function(x, sigma, rows, given["text"], given["strength"])
    own: Any = net
    plain, unlabelled = own(x, sigma, rows, **given), own(x, sigma, None, **given)
    expected = plain + 0.5 * (plain - unlabelled) + (plain - worse(x, sigma, rows, **given))
    torch.testing.assert_close(denoised, expected.double(), rtol=1e-4, atol=1e-4)


def test_one_row_serves_all() -> None:
    sampler, given = Sampler(networks(), CONFIG), values(1)
    rows = {name: value.expand(3, *value.shape[1:]) for name, value in given.items()}
    images = sampler(SEEDS, LABELS, conditions=rows)
    assert torch.equal(sampler(SEEDS, LABELS, conditions=given), images)
    assert torch.equal(sampler(SEEDS, LABELS, conditions={n: v[0].double() for n, v in given.items()}), images)


@pytest.mark.parametrize("runtime", ["compiled", "onnx"])
def test_conditions_are_inputs_in_every_runtime(runtime: str) -> None:
    eager, built = (Sampler(networks(), CONFIG, CFG, runtime=name) for name in ("eager", runtime))
    built.prepare(3)
    for seed in (0, 1):
        given = {name: value + seed for name, value in values().items()}
        images = eager(SEEDS, LABELS, conditions=given)
        torch.testing.assert_close(built(SEEDS, LABELS, conditions=given), images, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("what", ["denoiser", "step"])
def test_conditions_are_named_inputs_of_exported_files(tmp_path: Path, what: str) -> None:
    subject = joint(networks(), CONFIG, CFG, what)
    about = {"what": what}
    export(subject, tmp_path / "one.onnx", batch=None, dtype="float32", opset=18, target="onnxruntime", metadata=about)
    engine = OnnxEngine(tmp_path / "one.onnx", torch.device("cpu"))
    assert {name: [*sizes[1:]] for name, (sizes, _) in engine.inputs.items()}.items() >= {
        "text": [5, 3], "strength": [], "x": [2, 4, 6]
    }.items()  # fmt: skip
    if what == "denoiser":
        by_file, eager = (Sampler(networks(), CONFIG, CFG, runtime=kind) for kind in (runtime_of(engine), "eager"))
        images = eager(SEEDS, LABELS, conditions=values())
        torch.testing.assert_close(by_file(SEEDS, LABELS, conditions=values()), images, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("static", [True, False])
def test_conditions_go_with_their_seeds_through_batches(static: bool) -> None:
    """Through chunks that are filled up and batches that are halved because they do not fit."""
    sampler, given = Sampler(networks(), CONFIG), values(7)
    seeds, labels = Ranges.of(range(7)), [0, 1, 2, 0, 1, 2, 0]
    expected = sampler([*seeds], labels, conditions=given)
    sizes: list[int] = []

    def small(*arguments: Any, **keywords: Any) -> Tensor:
        sizes.append(len(arguments[0]))
        if sizes[-1] > 2:
            raise RuntimeError("can't allocate memory")
        return sampler(*arguments, **keywords)

    chunks = [
        Chunk(i, seeds[k : k + 4], labels[k : k + 4], {name: rows[k : k + 4] for name, rows in given.items()})
        for i, k in enumerate((0, 4))
    ]
    written: list[Drawn] = []
    small.forget, small.device, small.draw_labels = (lambda: None), sampler.device, sampler.draw_labels  # type: ignore
    draw(small, chunks, 4, written.append, fetcher=Fetcher(images=False, latents=True), static=static)  # type: ignore
    images = np.concatenate([drawn.arrays["latents"] for drawn in written])
    assert max(sizes) == 4 and np.abs(images - expected.numpy()).max() < 1e-3


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"text": None}, r"condition text is missing: give conditions={'text': tensor of \[3, 5, 3\]}"),
        ({"text": torch.ones(3, 5)}, r"condition text has the shape \[3, 5\]; give \[3, 5, 3\], or \[5, 3\] for all"),
        ({"text": torch.ones(2, 5, 3)}, r"condition text has the shape \[2, 5, 3\]; give \[3, 5, 3\]"),
        ({"text": "a cat"}, "condition text is a str, not a tensor of numbers"),
        ({"text": torch.ones(5, 3) * 1j}, "condition text has complex numbers"),
        ({"strength": torch.tensor(torch.nan)}, "condition strength has NaN in it"),
        ({"mask": torch.ones(3)}, r"the network has no condition 'mask'; it has text, strength"),
    ],
)
def test_conditions_that_do_not_fit_are_refused_before_anything_runs(changes: dict[str, Any], complaint: str) -> None:
    given = {name: value for name, value in (values() | changes).items() if value is not None}
    called: list[object] = []
    sampler = Sampler(networks(), CONFIG, noise=lambda seeds: called.append(seeds))  # type: ignore
    with pytest.raises(UserError, match=complaint):
        sampler(SEEDS, LABELS, conditions=given)
    with pytest.raises(UserError, match=complaint):
        sampler.integrate(torch.zeros(3, 2, 4, 6), torch.eye(3), conditions=given)
    assert not called


def test_conditions_that_are_none_or_no_mapping_are_refused() -> None:
    sampler: Any = Sampler(networks(), CONFIG)
    with pytest.raises(UserError, match="condition text is missing"):
        sampler(SEEDS, LABELS, conditions=values() | {"text": None})
    with pytest.raises(UserError, match="tensors by name, not a list"):
        sampler(SEEDS, LABELS, conditions=[torch.ones(5, 3)])


def test_an_infinite_condition_is_named_where_the_images_are_not_finite() -> None:
    sampler = Sampler(networks(), CONFIG)
    with pytest.raises(UserError, match=r"NaN or infinite at step 0 of 3, sigma 80; condition strength is infinite"):
        sampler(SEEDS, LABELS, conditions=values() | {"strength": torch.tensor(torch.inf)})


@pytest.mark.parametrize(
    ("declared", "complaint"),
    [
        ({"sigma": (1,)}, "'sigma' is no name for one"), ({"dg_weight": ()}, "'dg_weight' is no name for one"),
        ({"a text": (1,)}, "'a text' is no name for one"), ({"text": (0,)}, r"condition text: \(0,\) is no shape"),
        (["text"], "are no shapes by name"), ({"text": 5}, "are no shapes by name"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_condition_is_refused(declared: Any, complaint: str) -> None:
    net: Any = Conditional()
    net.conditions = declared
    with pytest.raises(UserError, match=complaint):
        Sampler(Networks(net))
    with pytest.raises(UserError, match="condition"):
        other: Any = Conditional()
        other.conditions = {"text": (5, 3), "strength": (), "more": (1,)}
        Sampler(networks(reference=other))
