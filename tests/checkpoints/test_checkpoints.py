"""The readers of other people's checkpoints: exact on honest files, calm and harmless on all others."""

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dgfast import bundle, nets
from dgfast.checkpoints import nvidia_pickle, one_line, openai_pt
from dgfast.errors import UserError
from tests.support.snapshots import Persistent, persistent, pickled

TINY: dict[str, Any] = {
    "img_resolution": 8, "img_channels": 1, "label_dim": 0, "model_type": "SongUNet",
    "model_channels": 8, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": [8],
}  # fmt: skip
ADM: dict[str, Any] = {
    "classifier_use_fp16": False, "classifier_attention_resolutions": "32,16,8", "classifier_pool": "attention",
    "classifier_use_scale_shift_norm": True, "classifier_resblock_updown": True,
}  # fmt: skip


@pytest.fixture(scope="session")
def dump(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any], Path]:
    """(object) -> a file with its pickle, in which persistent objects name EDM's module."""

    def write(content: Any) -> Path:
        path = tmp_path_factory.mktemp("snapshot") / "net.pkl"
        path.write_bytes(pickled(content))
        return path

    return write


@pytest.fixture(scope="session")
def tiny_snapshot(dump: Callable[[Any], Path]) -> Path:
    """An honest snapshot of a few kilobytes."""
    return dump({"ema": persistent(nets.build("EDMPrecond", **TINY), **TINY)})


# EDM's snapshots ------------------------------------------------------------------------------------------------------
def test_golden_snapshot_has_the_recipes_weights(own_golden_folder: Path, golden_fill: ModuleType) -> None:
    snapshot = nvidia_pickle.read(own_golden_folder / "edm_tiny.pkl")
    built = nets.build(snapshot.kind, **snapshot.keywords).state_dict()
    assert list(snapshot.tensors) and snapshot.tensors.keys() == built.keys()
    for name, tensor in snapshot.tensors.items():
        drawn = golden_fill.value(name, tensor.shape, "pub/tiny_pkl/")
        torch.testing.assert_close(
            tensor, built[name] if drawn is None else torch.from_numpy(drawn), rtol=0, atol=0, msg=name
        )


@pytest.mark.parametrize(
    ("kind", "own"),
    [
        pytest.param("EDMPrecond", {"sigma_data": 0.25, "sigma_max": 80}, id="edm"),
        pytest.param("VPPrecond", {"beta_d": 18.0, "M": 500}, id="vp"),
        pytest.param("VEPrecond", {"embedding_type": "fourier", "resample_filter": [1, 3, 3, 1]}, id="ve"),
        pytest.param("iDDPMPrecond", {"model_type": "DhariwalUNet", "M": 100}, id="iddpm"),
    ],
)
def test_snapshot_gives_back_what_was_saved(dump: Callable[[Any], Path], kind: str, own: dict[str, Any]) -> None:
    keywords = {**TINY, **own}
    net = nets.build(kind, **keywords)
    snapshot = nvidia_pickle.read(dump({"ema": persistent(net, **keywords, use_fp16=True), "loss_fn": None}))
    assert (snapshot.kind, snapshot.keywords) == (kind, keywords)
    assert snapshot.tensors.keys() == net.state_dict().keys()
    assert all(torch.equal(snapshot.tensors[name], tensor) for name, tensor in net.state_dict().items())


def test_infinite_default_and_temporary_buffers_are_left_out(dump: Callable[[Any], Path]) -> None:
    net = nets.build("EDMPrecond", **TINY)
    net.register_buffer("scratch", torch.zeros(3), persistent=False)
    keywords = {name: value for name, value in TINY.items() if name != "model_type"}
    snapshot = nvidia_pickle.read(dump({"ema": persistent(net, **keywords, sigma_max=float("inf"))}))
    assert snapshot.keywords == TINY, "model_type is the class of the model where the file does not name it"
    assert "scratch" not in snapshot.tensors


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_snapshot_keeps_values_of_every_float_type(dump: Callable[[Any], Path], dtype: torch.dtype) -> None:
    net = nets.build("EDMPrecond", **TINY).to(dtype)
    tensors = nvidia_pickle.read(dump({"ema": persistent(net, **TINY)})).tensors
    assert all(torch.equal(tensors[name], tensor) for name, tensor in net.state_dict().items())


def _shared(net: Persistent) -> None:
    net.meta["state"]["_modules"]["again"] = net.meta["state"]["_modules"]["model"]


def _endless(net: Persistent) -> None:
    encoder = net.meta["state"]["_modules"]["model"].meta["state"]["_modules"]["enc"]
    encoder._modules["self"] = encoder


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        pytest.param({"model_channels": 10**9}, "100,000 is the most", id="wide"),
        pytest.param({"model_channels": 8192}, "misshapen", id="somewhat_wide"),
        pytest.param({"num_blocks": 10**4}, "far more tensors than its weights", id="deep"),
        pytest.param({"channel_mult": [1] * 10**4}, "not a number, a word or a short list", id="long"),
        pytest.param({"channel_mult": [[1]]}, "'channel_mult' is not a number", id="nested"),
        pytest.param({"sigma_max": float("-inf")}, "not a finite number", id="infinite"),
        pytest.param({"dropout": float("nan")}, "not a finite number", id="nan"),
        pytest.param({"num_blocks": "2"}, "make no EDMPrecond", id="word"),
        pytest.param({"model_channels": 9.5}, "make no EDMPrecond", id="broken_number"),
        pytest.param({"model_channels": -8}, "is negative", id="negative"),
        pytest.param({"colour": "red"}, "make no EDMPrecond", id="unknown_keyword"),
        pytest.param({"colour": "red\n\x1b[2J"}, "cannot be shown", id="control_characters"),
        pytest.param({"sigma_data": "1"}, "sigma_data '1' is not of the type float", id="text_for_a_number"),
        pytest.param({"model_type": "DiT"}, "its model is 'SongUNet'", id="other_model"),
        pytest.param(_shared, "stands at two places", id="shared_module"),
        pytest.param(_endless, "stands at two places", id="endless"),
    ],
)
def test_dishonest_networks_are_refused(dump: Callable[[Any], Path], spoil: Any, complaint: str) -> None:
    changes = {} if callable(spoil) else spoil
    net = persistent(nets.build("EDMPrecond", **TINY), **{**TINY, **changes})
    if callable(spoil):
        spoil(net)
    with pytest.raises(UserError, match=complaint) as caught:
        nvidia_pickle.read(dump({"ema": net}))
    assert caught.value.message.isprintable()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        pytest.param({"G_ema": None}, "no network under 'ema'", id="other_project"),
        pytest.param([1, 2], "no network under 'ema'", id="list"),
        pytest.param({"ema": {}}, "dict where PersistentObject belongs", id="dict"),
        pytest.param({"ema": Persistent("EDM2Precond", {})}, "its network is 'EDM2Precond'", id="our_name"),
        pytest.param({"ema": Persistent("EDMPrecond", {"_init_args": (32,)})}, "positional", id="positional"),
        pytest.param({"ema": Persistent("EDMPrecond", {})}, "KeyError", id="empty"),
    ],
)
def test_foreign_pickles_are_refused(dump: Callable[[Any], Path], content: Any, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        nvidia_pickle.read(dump(content))


@pytest.mark.parametrize(
    ("size", "stride", "offset"),
    [
        pytest.param((3,), (1,), 2, id="behind_the_end"),
        pytest.param((2,), (4,), 0, id="over_the_end"),
        pytest.param((1000, 1000), (0, 0), 0, id="stride_0"),
        pytest.param((2,), (-1,), 3, id="negative_stride"),
        pytest.param((-1,), (1,), 0, id="negative_size"),
        pytest.param((2,), (1, 1), 0, id="ranks"),
        pytest.param((0,), (1,), 5, id="empty_outside"),
        pytest.param((1,) * 70, (1,) * 70, 0, id="rank_70"),
        pytest.param((2.0,), (1,), 0, id="float"),
    ],
)
def test_tensors_reach_no_further_than_their_storage(
    dump: Callable[[Any], Path], size: Any, stride: Any, offset: int
) -> None:
    class View:
        def __reduce__(self) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
            values = torch.zeros(4)
            storage = torch.storage.TypedStorage(
                wrap_storage=values.untyped_storage(), dtype=values.dtype, _internal=True
            )
            return torch._utils._rebuild_tensor_v2, (storage, offset, size, stride, False, {})

    with pytest.raises(UserError, match=r"beyond its storage|no valid shape|float where int|Opaque where"):
        nvidia_pickle.read(dump({"ema": View()}))


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.3, 0.5, 0.8, 0.99, 0.9999])
def test_torn_snapshots_are_refused(own_golden_folder: Path, tmp_path: Path, share: float) -> None:
    whole = (own_golden_folder / "edm_tiny.pkl").read_bytes()
    (tmp_path / "torn.pkl").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(UserError, match=r"torn\.pkl is no network snapshot of EDM or EDM2: broken pickle"):
        nvidia_pickle.read(tmp_path / "torn.pkl")


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    edits=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=4),
    kept=st.one_of(st.just(1.0), st.floats(0, 1)),
)
def test_altered_snapshots_are_read_or_refused(
    tiny_snapshot: Path, edits: list[tuple[float, int]], kept: float
) -> None:
    content = bytearray(tiny_snapshot.read_bytes())
    for position, byte in edits:
        content[int(position * len(content))] = byte
    path = tiny_snapshot.with_name("altered.pkl")
    path.write_bytes(content[: int(kept * len(content))])
    try:
        snapshot = nvidia_pickle.read(path)
        bundle.load_state(nets.build(snapshot.kind, **snapshot.keywords), snapshot.tensors, path)
    except UserError as error:
        assert error.message.isprintable()


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(program=st.binary(max_size=200))
def test_random_programs_are_refused(tmp_path_factory: pytest.TempPathFactory, program: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "random.pkl"
    path.write_bytes(b"\x80\x04" + program)
    with pytest.raises(UserError, match="nothing in it was run"):
        nvidia_pickle.read(path)


def test_missing_file_is_named(tmp_path: Path) -> None:
    for read in (nvidia_pickle.read, openai_pt.read):
        with pytest.raises(UserError, match=r"cannot read .*absent"):
            read(tmp_path / "absent.pkl")


# State dicts ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("size", "depth", "in_channels", "out_channels", "condition"),
    [
        pytest.param(64, 4, 3, 1000, False, id="openai_64"),
        pytest.param(128, 2, 3, 1000, False, id="openai_128"),
        pytest.param(256, 2, 3, 1000, False, id="openai_256"),
        pytest.param(512, 2, 3, 1000, False, id="openai_512"),
        pytest.param(32, 4, 3, 1000, False, id="dg_trunk"),
        pytest.param(32, 2, 4, 1000, False, id="dg_latent_trunk"),
        pytest.param(8, 2, 512, 1, False, id="dg_unconditional"),
        pytest.param(8, 2, 384, 1, True, id="dg_conditional"),
    ],
)
def test_published_encoders_are_known_by_their_shapes(
    size: int, depth: int, in_channels: int, out_channels: int, condition: bool
) -> None:
    keywords = {"image_size": size, "classifier_width": 128, "classifier_depth": depth, "in_channels": in_channels}
    keywords |= {**ADM, "out_channels": out_channels, "condition": condition}
    with torch.device("meta"):
        tensors = nets.build("create_classifier", **keywords).state_dict()
    assert openai_pt.classifier_keywords(tensors, {}, "x.pt") == keywords


def test_given_keywords_go_over_those_read_off() -> None:
    shape = {"image_size": 8, "classifier_width": 64, "classifier_depth": 3, "in_channels": 3, "out_channels": 5}
    keywords = {**ADM, **shape, "classifier_pool": "adaptive", "condition": False}
    with torch.device("meta"):
        tensors = nets.build("create_classifier", **keywords).state_dict()
    with pytest.raises(UserError, match=r"superfluous input_blocks\.3.*nearest.*image_size 8"):
        openai_pt.classifier_keywords(tensors, {}, "x.pt")
    assert openai_pt.classifier_keywords(tensors, {"classifier_depth": 3}, "x.pt") == keywords


def test_other_networks_are_no_classifiers(tiny_net: Callable[..., nn.Module]) -> None:
    with pytest.raises(UserError, match=r"no ADM classifier .* time_embed\.0\.weight is missing"):
        openai_pt.classifier_keywords(tiny_net().state_dict(), {}, "x.pt")
    narrow = {"time_embed.0.weight": (20, 5), "out.3.weight": (10, 5, 1, 1), "input_blocks.0.0.weight": (5, 3, 3, 3)}
    with pytest.raises(UserError, match="--kind EncoderUNetModel"):
        openai_pt.classifier_keywords({name: torch.zeros(shape) for name, shape in narrow.items()}, {}, "x.pt")


def test_attributes_from_the_file_hide_nothing(tmp_path: Path) -> None:
    class Hiding:
        def __reduce__(self) -> tuple[Any, ...]:
            return OrderedDict, (), {"items": 5}, None, iter([("a", torch.zeros(2))])

    torch.save(Hiding(), tmp_path / "x.pt")
    assert list(openai_pt.read(tmp_path / "x.pt").tensors) == ["a"]

    tensor = torch.zeros(2)
    tensor.__dict__["colour"] = "red"
    torch.save({"a": tensor}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="no tensors by name, only a "):
        openai_pt.read(tmp_path / "x.pt")


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_state_dicts_are_read_exactly(tmp_path: Path, legacy: bool) -> None:
    tensors = nets.build("EDMPrecond", **TINY).get_submodule("model").state_dict()
    torch.save(tensors, tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    found = openai_pt.read(tmp_path / "x.pt").tensors
    assert list(found) == list(tensors) and all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_state_dicts_hold_views_that_are_no_larger_than_their_storage(tmp_path: Path) -> None:
    tensors = {"row": torch.arange(12.0).view(3, 4)[1], "turned": torch.arange(12.0).view(3, 4).T}
    tensors["all of it"] = torch.arange(10.0).as_strided((2, 5), (0, 1))
    torch.save(tensors, tmp_path / "x.pt")
    found = openai_pt.read(tmp_path / "x.pt").tensors
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        pytest.param([torch.zeros(2)], "holds a list", id="list"),
        pytest.param({"a": torch.zeros(2, dtype=torch.int64)}, "'a' is not a dense tensor of floats", id="integers"),
        # 16 floats of a storage of 10: fewer than its 40 bytes, more than it has floats
        pytest.param({"a": torch.ones(10).as_strided((2, 8), (0, 1))}, "a tensor that is not dense", id="overlapping"),
        pytest.param({"a": torch.ones(10).half().as_strided((11,), (0,))}, "a tensor that is not dense", id="one_more"),
        pytest.param({"a": torch.zeros(1).expand(10**9)}, r"only a \(a tensor that is not dense\)", id="stride_0"),
        pytest.param({"a": torch.eye(3).to_sparse()}, "no tensors by name, only a ", id="sparse"),
        pytest.param({"step": 3}, r"no tensors by name, only step \(int\)", id="no_tensors"),
        pytest.param({"a\nb": torch.zeros(2)}, "is not a dense tensor", id="newline"),
    ],
)
def test_other_contents_are_no_state_dicts(tmp_path: Path, content: Any, complaint: str) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UserError, match=complaint) as caught:
        openai_pt.read(tmp_path / "x.pt")
    assert caught.value.message.isprintable()


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04", b"\x80\x02.", b"\xff" * 1000], ids=["empty", "zip", "pickle", "noise"]
)
def test_broken_files_are_no_state_dicts(tmp_path: Path, ending: str, content: bytes) -> None:
    (tmp_path / f"x{ending}").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.(pt|safetensors)"):
        openai_pt.read(tmp_path / f"x{ending}")


def test_quoted_text_cannot_move_the_cursor() -> None:
    assert one_line("a\nb\x1b[2Jc\t\u202e" + "d" * 1000, most=20) == "a b [2Jc " + "d" * 10
