"""Evaluation of images end to end with small networks, references on disk, and what is refused."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from uni3d.errors import MissingPackageError, UsageError
from uni3d.evaluation.fidelity import (
    FidelitySettings,
    evaluate_images,
    measure_features,
    measure_reference,
    metric_name,
    score_features,
)
from uni3d.evaluation.fidelity_nets import (
    INCEPTION_SHA256,
    EfficientNetLite0,
    InceptionV3,
    NetOutput,
    file_checksum,
    network_output,
)
from uni3d.evaluation.fidelity_reference import read_reference, write_reference
from uni3d.evaluation.image_tower import LITE_SHAPES, EfficientNetTower

SETTINGS = FidelitySettings(num_subsets=10, subset_size=50)


@dataclass
class PatchNet:
    """Features of an image: its 2 x 2 average colours, and logits that tell its brightest colour."""

    name: str = "patches"
    checksum: str = "a" * 64
    input_size: int = 8
    value_range: tuple[float, float] = (-1.0, 1.0)
    num_features: int = 12
    device: torch.device = torch.device("cpu")
    has_logits: bool = True

    def __call__(self, images: Tensor) -> NetOutput:
        features = nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)
        return NetOutput(features, 50 * images.mean(dim=(2, 3)) if self.has_logits else None)


def scenes(num: int, seed: int) -> np.ndarray:
    """Images uint8 [num, 3, 8, 8]: a colour that fades downwards, and a little noise."""
    rng = np.random.default_rng(seed)
    colour = rng.uniform(60, 200, (num, 3, 1, 1))
    fade = np.linspace(1, rng.uniform(0.3, 1, num), 8).T[:, None, :, None]
    return (colour * fade + rng.normal(0, 5, (num, 3, 8, 8))).clip(0, 255).astype(np.uint8)


def batches(images: np.ndarray, size: int = 32) -> list[np.ndarray]:
    return [images[start : start + size] for start in range(0, len(images), size)]


def test_two_halves_are_near_and_noise_is_far() -> None:
    net = PatchNet()
    reference = measure_reference(batches(scenes(400, 0)), net, source="scenes", num_kept=None)
    half = evaluate_images(batches(scenes(400, 1)), reference, net, settings=SETTINGS)
    noise = np.random.default_rng(2).integers(0, 256, (400, 3, 8, 8), dtype=np.uint8)
    far = evaluate_images(batches(noise), reference, net, settings=SETTINGS)
    near, wide = half.metrics, far.metrics
    assert near["frechet_distance[patches]"] < 0.02 < 0.3 < wide["frechet_distance[patches]"]
    assert abs(near["kernel_distance[patches]"]) < 3 * near["kernel_distance_std[patches]"]
    assert wide["kernel_distance[patches]"] > 10 * abs(near["kernel_distance[patches]"])
    assert wide["kernel_distance[patches]"] > 2 * wide["kernel_distance_std[patches]"]
    assert near["precision[patches]"] > 0.8 and near["recall[patches]"] > 0.8
    assert wide["recall[patches]"] < 0.1
    assert near["inception_score[patches]"] > wide["inception_score[patches]"] >= 1


def test_figures_do_not_depend_on_the_batches_or_on_ranks() -> None:
    net = PatchNet()
    reference = measure_reference([scenes(120, 0)], net, source="scenes", num_kept=None)
    images = scenes(100, 1)
    whole = evaluate_images([images], reference, net, settings=SETTINGS).metrics
    cut = evaluate_images(batches(images, 7), reference, net, settings=SETTINGS).metrics
    left, right = (measure_features([part], net) for part in (images[:30], images[30:]))
    left.merge(right)
    ranks = score_features(left, reference, net, settings=SETTINGS).metrics
    for name, value in whole.items():
        assert cut[name] == pytest.approx(value, rel=1e-6, abs=1e-9), name
        assert ranks[name] == pytest.approx(value, rel=1e-6, abs=1e-9), name
    with pytest.raises(UsageError, match="kept its features"):
        left.merge(measure_features([images], net, num_kept=0))


@pytest.mark.gpu
def test_figures_on_a_gpu_are_those_of_the_cpu() -> None:
    nets = PatchNet(), PatchNet(device=torch.device("cuda"))
    references = [measure_reference(batches(scenes(120, 0)), net, source="s", num_kept=None) for net in nets]
    found = [
        evaluate_images(batches(scenes(100, 1)), reference, net, settings=SETTINGS).metrics
        for reference, net in zip(references, nets, strict=True)
    ]
    assert found[1] == pytest.approx(found[0], rel=1e-4, abs=1e-5)


def test_the_result_says_everything(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    net = PatchNet()
    found = measure_reference([scenes(60, 0)], net, source="scenes-train", num_kept=None)
    reference = read_reference(write_reference(found, tmp_path / "reference.npz"))
    with caplog.at_level(logging.WARNING):
        result = evaluate_images(
            iter(batches(scenes(90, 1))), reference, net, num_images=50, seeds=(100, 149), ema="500 kimg"
        )
    saved = json.loads(result.write(tmp_path / "result.json").read_text())
    assert saved["num_images"] == 50 and saved["seeds"] == {"first": 100, "last": 149}
    assert saved["ema"] == "500 kimg" and saved["metrics"] == result.metrics
    assert saved["feature_net"] == {
        "name": "patches", "checksum": "a" * 64, "input_size": 8, "value_range": [-1.0, 1.0]
    }  # fmt: skip
    assert saved["reference"]["source"] == "scenes-train" and saved["reference"]["num_images"] == 60
    assert saved["reference"]["file_sha256"] == file_checksum(tmp_path / "reference.npz")
    assert saved["settings"]["num_neighbours"] == 3
    assert any("50 images; published figures are of 50000" in note for note in saved["notes"])
    assert any("subsets of the kernel distance hold 50 images" in note for note in saved["notes"])
    assert len(caplog.records) == len(saved["notes"])


def test_what_cannot_be_measured_is_left_out() -> None:
    net = PatchNet(has_logits=False)
    moments_only = measure_reference([scenes(60, 0)], net, source="scenes")
    assert moments_only.features is None
    result = evaluate_images([scenes(60, 1)], moments_only, net)
    assert set(result.metrics) == {"frechet_distance[patches]"}
    assert any("kept no features" in note for note in result.notes)
    few = evaluate_images([scenes(3, 1)], replace(moments_only, features=torch.zeros(9, 12)), net)
    assert "precision[patches]" not in few.metrics and "kernel_distance[patches]" in few.metrics
    assert any("far too large" in note for note in few.notes)
    some = measure_reference(batches(scenes(60, 0)), net, source="scenes", num_kept=40)
    assert some.features is not None and len(some.features) == 40 and some.num_images == 60


def test_only_the_distance_of_inception_is_called_fid() -> None:
    assert metric_name("frechet_distance", "inception_v3") == "fid"
    assert metric_name("kernel_distance", "inception_v3") == "kid"
    assert metric_name("inception_score", "inception_v3") == "inception_score"
    assert metric_name("frechet_distance", "efficientnet_lite0") == "frechet_distance[efficientnet_lite0]"
    assert metric_name("frechet_distance", "inception_v3_custom") == "frechet_distance[inception_v3_custom]"


def test_grey_images_are_shown_as_colour_and_floats_are_refused() -> None:
    net = PatchNet()
    grey = scenes(5, 0)[:, :1]
    shown = network_output(net, np.repeat(grey, 3, axis=1)).features
    torch.testing.assert_close(network_output(net, grey).features, shown)
    assert float(shown.min()) >= -1 and float(shown.max()) <= 1
    torch.testing.assert_close(network_output(net, grey[..., ::-1]).features.sum(), shown.sum())
    extremes = np.zeros((2, 3, 4, 4), np.uint8)
    extremes[1] = 255
    ends = network_output(net, extremes).features
    assert ends[0].eq(-1).all() and ends[1].eq(1).all()
    for wrong, message in (
        (torch.zeros(2, 3, 8, 8), "type float32; make them uint8"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), "expected uint8"),
        (torch.zeros(2, 4, 8, 8, dtype=torch.uint8), "expected uint8"),
    ):
        with pytest.raises(UsageError, match=message):
            network_output(net, wrong)


def test_refused_evaluations() -> None:
    net = PatchNet()
    reference = measure_reference([scenes(60, 0)], net, source="scenes")

    def never() -> Any:
        raise AssertionError("images were read")
        yield

    for other, message in (
        (PatchNet(name="other"), "measured by patches and the images by other; use one network"),
        (PatchNet(checksum="b" * 64), "weights aaaaaaaaaaaa and the images with bbbbbbbbbbbb"),
        (PatchNet(num_features=13), "has 12 features and patches 13"),
    ):
        with pytest.raises(UsageError, match=message):
            evaluate_images(never(), reference, other)
    with pytest.raises(UsageError, match="got 60 images, expected 61; make or pass more"):
        evaluate_images([scenes(60, 0)], reference, net, num_images=61)
    with pytest.raises(UsageError, match="got 0 images"):
        evaluate_images([], reference, net)
    with pytest.raises(UsageError, match="at least 2"):
        evaluate_images([scenes(1, 0)], reference, net)
    with pytest.raises(UsageError, match="seeds 0 to 9 made 10 images, and 60"):
        evaluate_images([scenes(60, 0)], reference, net, seeds=(0, 9))
    with pytest.raises(UsageError, match="NaN"):
        evaluate_images([scenes(4, 0)], reference, PatchNet(value_range=(math.nan, 1.0)))


# --- references


def test_a_reference_comes_back_as_it_was_written(tmp_path: Path) -> None:
    found = measure_reference([scenes(60, 0)], PatchNet(), source="a name", num_kept=20)
    again = read_reference(write_reference(found, tmp_path / "a.npz"))
    assert torch.equal(again.mean, found.mean) and torch.equal(again.covariance, found.covariance)
    assert again.features is not None and found.features is not None
    assert torch.equal(again.features, found.features)
    assert replace(again, file_sha256=None).record() == found.record()
    with pytest.raises(UsageError, match=r"must end in \.npz"):
        write_reference(found, tmp_path / "a.json")


def test_a_reference_of_edm_is_one_of_inception(tmp_path: Path) -> None:
    root = np.random.default_rng(0).normal(size=(12, 12))
    np.savez(tmp_path / "edm.npz", mu=np.zeros(12), sigma=root @ root.T)
    reference = read_reference(tmp_path / "edm.npz")
    assert (reference.feature_net, reference.checksum, reference.num_images) == ("inception_v3", None, None)
    assert reference.source == "edm.npz" and reference.features is None
    with pytest.raises(UsageError, match="measured by inception_v3 and the images by patches"):
        evaluate_images([scenes(9, 0)], reference, PatchNet())
    result = evaluate_images([scenes(60, 0)], reference, PatchNet(name="inception_v3"))
    assert "fid" in result.metrics
    assert any("does not say which weights" in note for note in result.notes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mu": None}, "holds no 'mu'"),
        ({"sigma": None}, "holds no 'sigma'"),
        ({"mu": np.zeros(3)}, "has mu [3] and sigma [2, 2]"),
        ({"mu": np.zeros((1, 2))}, "expected [F] and [F, F]"),
        ({"mu": np.array(["a", "b"])}, "of real numbers"),
        ({"mu": np.array([{}, {}], dtype=object)}, "cannot be read as a .npz"),
        ({"mu": np.array([0, np.nan])}, "NaN or infinity"),
        ({"sigma": np.array([[1.0, 2], [0, 1]])}, "not symmetric"),
        ({"record": np.frombuffer(b"{", np.uint8)}, "record of reference"),
        ({"record": np.frombuffer(b"[]", np.uint8)}, "record of reference"),
        ({"record": np.frombuffer(b'{"format": "x"}', np.uint8)}, "its format is x"),
        (
            {"record": np.frombuffer(b'{"format": "uni3d-reference-1", "feature_net": 3}', np.uint8)},
            "its feature_net is 3",
        ),
    ],
)
def test_refused_references(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    arrays = {"mu": np.zeros(2), "sigma": np.eye(2), **changes}
    path = tmp_path / "r.npz"
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    with pytest.raises(UsageError) as caught:
        read_reference(path)
    assert message in str(caught.value) and "r.npz" in str(caught.value) and ";" in str(caught.value)


def test_more_refused_references(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        read_reference(tmp_path / "none.npz")
    (tmp_path / "bad.npz").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"cannot be read as a \.npz"):
        read_reference(tmp_path / "bad.npz")
    with pytest.raises(UsageError, match="is a pickle, which is not read"):
        read_reference(tmp_path / "imagenet.pkl")
    found = measure_reference([scenes(9, 0)], PatchNet(), source="x", num_kept=None)
    assert found.features is not None
    path = write_reference(replace(found, features=found.features[:, :5]), tmp_path / "c.npz")
    with pytest.raises(UsageError, match="do not fit its mu"):
        read_reference(path)


# --- networks


@pytest.fixture(scope="module")
def lite0_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of the shape of EfficientNet-Lite0."""
    torch.manual_seed(0)
    tower = EfficientNetTower(LITE_SHAPES[0], input_size=None)
    path = tmp_path_factory.mktemp("lite0") / "lite0.safetensors"
    save_file({k: v for k, v in tower.state_dict().items() if not k.startswith("norm.")}, path)
    return path


def test_efficientnet_lite0(lite0_file: Path) -> None:
    net = EfficientNetLite0(lite0_file)
    assert (net.name, net.num_features, net.input_size) == ("efficientnet_lite0", 1280, 224)
    assert net.checksum == hashlib.sha256(lite0_file.read_bytes()).hexdigest()
    images = scenes(2, 0)
    output = network_output(net, images)
    assert output.features.shape == (2, 1280) and output.features.dtype == torch.float32
    assert output.logits is None and not output.features.requires_grad
    # Features belong to the image, whatever stands beside it.
    torch.testing.assert_close(network_output(net, images[:1]).features, output.features[:1])
    plain = net._tower.feature_map(torch.zeros(1, 3, 224, 224)).mean(dim=(2, 3))
    black = network_output(net, np.zeros((1, 1, 224, 224), np.uint8)).features
    torch.testing.assert_close(black, plain)


def test_refused_lite0(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="feature network '.*none.safetensors' does not exist"):
        EfficientNetLite0(tmp_path / "none.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(UsageError, match="feature network '.*a.safetensors' does not fit the tower"):
        EfficientNetLite0(tmp_path / "a.safetensors")


class _FakeExtractor(nn.Module):
    """What InceptionV3 relies on in torch-fidelity 0.4: its constructor and the tuple it returns."""

    def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: Any) -> None:
        super().__init__()
        assert features_list == ["2048", "logits_unbiased"]
        self.scale = nn.Parameter(torch.ones(1))
        self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=True))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        assert images.dtype == torch.uint8
        mean = images.float().mean(dim=(1, 2, 3))[:, None] * self.scale
        return mean.expand(-1, 2048), mean.expand(-1, 1008)


def weights_file(path: Path, content: Any) -> tuple[Path, str]:
    torch.save(content, path)
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


def test_inception_checks_its_file_before_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    library.FeatureExtractorInceptionV3 = _FakeExtractor  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "torch_fidelity", ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, library.__name__, library)
    path, digest = weights_file(tmp_path / "w.pth", {"scale": torch.full((1,), 2.0)})
    net = InceptionV3(path, sha256=digest.upper())
    assert net.name == "inception_v3_custom" and net.checksum == digest
    images = np.array([0, 7, 255], np.uint8)[:, None, None, None].repeat(3, 1).repeat(4, 2).repeat(4, 3)
    output = network_output(net, images)
    assert output.features[:, 0].tolist() == [0, 14, 510]
    assert output.logits is not None and output.logits.shape == (3, 1008)
    with pytest.raises(UsageError, match=f"have the SHA-256 {digest}, expected {INCEPTION_SHA256}"):
        InceptionV3(path)
    with pytest.raises(UsageError, match="cannot be read"):
        InceptionV3(tmp_path / "none.pth")
    path, digest = weights_file(tmp_path / "w.pth", {"other": torch.zeros(1)})
    with pytest.raises(UsageError, match="does not hold the weights of the Inception-v3"):
        InceptionV3(path, sha256=digest)


class _Attack:
    def __reduce__(self) -> tuple:
        return (os.system, ("touch hacked",))


def test_inception_weights_that_run_code_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path, digest = weights_file(tmp_path / "w.pth", {"a": _Attack()})
    with pytest.raises(UsageError, match="are no plain tensors"):
        InceptionV3(path, sha256=digest)
    path.write_bytes(b"no weights")
    with pytest.raises(UsageError, match="are no plain tensors"):
        InceptionV3(path, sha256=hashlib.sha256(b"no weights").hexdigest())
    assert not (tmp_path / "hacked").exists()


def test_inception_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    path, digest = weights_file(tmp_path / "w.pth", {})
    with pytest.raises(MissingPackageError, match=r'pip install "uni3d\[eval\]"'):
        InceptionV3(path, sha256=digest)


def test_the_real_architecture_of_inception(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch-fidelity installed: random weights load without the network and give 2048 features."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import (  # pyright: ignore[reportMissingImports]
            FeatureExtractorInceptionV3,
        )
    except (ImportError, RuntimeError):
        pytest.skip("needs torch-fidelity (the extra eval)")
    with monkeypatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        empty = io.BytesIO()
        torch.save({}, empty)
        empty.seek(0)
        random = FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=empty)
    path, digest = weights_file(tmp_path / "w.pth", random.state_dict())
    net = InceptionV3(path, sha256=digest)
    images = scenes(2, 0)
    output = network_output(net, images)
    assert output.features.shape == (2, 2048)
    assert output.logits is not None and output.logits.shape == (2, 1008)
    torch.testing.assert_close(output.features, random(torch.from_numpy(images))[0])
