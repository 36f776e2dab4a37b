"""References: EDM's npz and EDM2's pickle of moments, and files that are none."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dgfast.checkpoints import statistics
from dgfast.errors import UserError
from dgfast.evaluation import features, reference

_CPU = torch.device("cpu")


def _moments(width: int = 6, seed: int = 0) -> dict[str, np.ndarray]:
    values = np.random.default_rng(seed).normal(size=(20, width))
    return {"mu": values.mean(0), "sigma": np.cov(values.T)}


@pytest.fixture
def extractor(detector: Path) -> features.Extractor:
    return features.of_file(detector, None, None, _CPU)


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_edm2s_pickle_is_read_and_the_features_tell_which_metric(
    protocol: int, tmp_path: Path, extractor: features.Extractor
) -> None:
    fid = _moments(6)
    fid["sigma"] = np.asfortranarray(fid["sigma"] + 1e-6 * np.triu(np.ones((6, 6))))  # rounded, so its order is seen
    content = {"num_images": 50_000, "fid": fid, "fd_dinov2": _moments(4, seed=1)}
    (tmp_path / "ref.pkl").write_bytes(pickle.dumps(content, protocol))
    found = reference.of_moments(tmp_path / "ref.pkl", extractor, 6)
    assert found.name == f"{tmp_path / 'ref.pkl'}: fid" and found.images is None and found.sample is None
    np.testing.assert_array_equal(found.moments.mean, fid["mu"])
    np.testing.assert_array_equal(found.moments.covariance, fid["sigma"])
    assert reference.of_moments(tmp_path / "ref.pkl", extractor, 4).name.endswith(": fd_dinov2")


def test_edms_npz_is_read_and_told_from_one_of_images(tmp_path: Path, extractor: features.Extractor) -> None:
    np.savez(tmp_path / "ref.npz", **_moments())  # type: ignore[arg-type]
    np.savez(tmp_path / "images.npz", images=np.zeros((3, 4, 4, 3), np.uint8))
    assert reference.holds_moments(tmp_path / "ref.npz") and not reference.holds_moments(tmp_path / "images.npz")
    found = reference.of_moments(tmp_path / "ref.npz", extractor, 6)
    np.testing.assert_array_equal(found.moments.covariance, _moments()["sigma"])


def _asymmetric() -> np.ndarray:
    return np.eye(300) + np.diag(np.full(29, 0.5), 271)  # in one of its last rows, and not where that is mirrored


@pytest.mark.parametrize(
    ("moments", "complaint"),
    [
        ({"sigma": -np.eye(2)}, "its diagonal has negative numbers, or zeros alone"),
        ({"sigma": np.zeros((2, 2))}, "its diagonal has negative numbers, or zeros alone"),
        ({"sigma": np.array([[1, 0.5], [0, 1]])}, "it is not symmetric"),
        ({"sigma": _asymmetric()}, "it is not symmetric"),
        ({"sigma": np.array([[1, 2.0], [2, 1]])}, "larger than the variances beside it allow"),
        ({"sigma": 1e300 * np.eye(2)}, "mu or sigma has numbers beyond 1e"),
        ({"mu": np.full(2, -1e300)}, "mu or sigma has numbers beyond 1e"),
    ],
)
def test_what_can_be_no_covariance_is_one_line(
    moments: dict[str, np.ndarray], complaint: str, tmp_path: Path, extractor: features.Extractor
) -> None:
    width = len(moments.get("sigma", np.eye(2)))
    path = tmp_path / "ref.npz"
    np.savez(path, **{"mu": np.zeros(width), "sigma": np.eye(width), **moments})  # type: ignore[arg-type]
    with pytest.raises(UserError, match=complaint) as error:
        reference.of_moments(path, extractor, width)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_names_of_metrics_stay_in_one_short_line(tmp_path: Path, extractor: features.Extractor) -> None:
    content = {f"{k}\n\x1b[31m" + 100 * "x": _moments(2) for k in range(30)}
    (tmp_path / "ref.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match="have 6 numbers, and the moments there are those of 0") as error:
        reference.of_moments(tmp_path / "ref.pkl", extractor, 6)
    assert str(error.value).isprintable() and len(str(error.value)) < 600


class _Shell:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        import os

        return os.system, ("touch /tmp/executed",)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ({"fid": {"mu": _Shell(), "sigma": 0}}, "it asks for the global 'posix.system'"),
        ({"fid": {"mu": np.zeros(3)}}, "it has no metric with mu and sigma"),
        ([1, 2], "it has list where dict belongs"),
        ({"fid": {"mu": 1.0, "sigma": 2.0}}, "they are no arrays"),
        ({"fid": {"mu": np.zeros(3), "sigma": np.zeros((3, 2))}}, r"found \[3\] and \[3, 2\]"),
        ({"fid": {"mu": np.zeros(2), "sigma": np.full((2, 2), np.nan)}}, "others than finite"),
        ({"fid": {"mu": np.zeros(2), "sigma": np.zeros((2, 2), np.complex64)}}, "other numbers than floats"),
        ({"fid": {"mu": np.array([None]), "sigma": 1}}, "other numbers than floats"),
        ({"fid": {"mu": np.zeros((1, 1, 2)), "sigma": 1}}, "of more dimensions"),
    ],
)
def test_a_pickle_of_anything_else_is_one_line(content: object, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "ref.pkl"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match=complaint) as error:
        statistics.read_pickle(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert not Path("/tmp/executed").exists()


def test_a_torn_pickle_is_one_line(tmp_path: Path) -> None:
    whole = pickle.dumps({"fid": _moments(2)})
    path = tmp_path / "ref.pkl"
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        with pytest.raises(UserError, match="no file of statistics as EDM2 writes them"):
            statistics.read_pickle(path)


def test_moments_of_other_features_are_one_line(tmp_path: Path, extractor: features.Extractor) -> None:
    np.savez(tmp_path / "ref.npz", **_moments(5))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"inception\.pt .* have 6 numbers, and the moments there are those of 5"):
        reference.of_moments(tmp_path / "ref.npz", extractor, 6)
    np.savez(tmp_path / "ref.npz", mu=np.zeros(5))
    with pytest.raises(UserError, match=r"neither images .* nor moments: no sigma; it holds mu"):
        reference.of_moments(tmp_path / "ref.npz", extractor, 6)
