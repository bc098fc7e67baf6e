"""`uni3d reference` and `uni3d evaluate` on images: figures through the commands, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from network_folders import write_network
from safetensors.torch import save_file
from test_sample_command import STUDENT, run
from torch import nn

from uni3d import cli
from uni3d.commands.image_evaluation import image_kind, wants_images
from uni3d.evaluation import fidelity_nets
from uni3d.evaluation.fidelity_nets import file_checksum
from uni3d.evaluation.fidelity_reference import read_reference
from uni3d.evaluation.image_tower import EfficientNetTower, TowerShape

NET = "efficientnet_lite0"
SHAPE = TowerShape((8,) * 7, (1,) * 7, stem_channels=8, head_channels=8)
DISTANCE = f"frechet_distance[{NET}]"


def scenes(num: int, seed: int) -> np.ndarray:
    """Images uint8 [num, 8, 8, 3]: a colour that fades downwards, and a little noise."""
    rng = np.random.default_rng(seed)
    colour = rng.uniform(60, 200, (num, 1, 1, 3))
    fade = np.linspace(1, rng.uniform(0.3, 1, num), 8).T[:, :, None, None]
    return (colour * fade + rng.normal(0, 5, (num, 8, 8, 3))).clip(0, 255).astype(np.uint8)


def write_tower(path: Path, *, seed: int) -> None:
    """Random weights of EfficientNet-Lite0, with statistics that keep its features from fading away."""
    torch.manual_seed(seed)
    tower = EfficientNetTower(SHAPE, input_size=None).train()
    for module in tower.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the plain mean of all batches
    shown = torch.from_numpy(scenes(16, 9)).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        tower.feature_map(nn.functional.interpolate(shown, (32, 32), mode="bilinear"))
    save_file({k: v for k, v in tower.state_dict().items() if not k.startswith("norm.")}, path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of the network of features, a data set of 60 images, noise, a teacher and a student."""
    folder = tmp_path_factory.mktemp("evaluation")
    write_tower(folder / "lite0.safetensors", seed=0)
    np.savez(folder / "scenes.npz", images=scenes(60, 0))
    noise = np.random.default_rng(2).integers(0, 256, (30, 8, 8, 3), dtype=np.uint8)
    np.savez(folder / "noise.npz", images=noise)
    write_network(folder / "teacher")
    write_network(folder / "student", source=STUDENT, label_dim=0)
    return folder


@pytest.fixture(scope="module", autouse=True)
def _small_network() -> Iterator[None]:
    """The network of features is narrow and sees 32 pixels: 8 features are few beside 30 images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fidelity_nets.EfficientNetLite0, "input_size", 32)
        patch.setitem(fidelity_nets.LITE_SHAPES, 0, SHAPE)
        yield


@pytest.fixture(scope="module")
def reference(folder: Path) -> Path:
    words = ["reference", folder / "scenes.npz", "--images", "0-29", "--net", NET, "--quiet"]
    words += ["--weights", folder / "lite0.safetensors", "--output", folder / "ref.npz"]
    assert cli.main([str(word) for word in words]) == 0
    return folder / "ref.npz"


def evaluate(folder: Path, reference: Path, source: str, *more: object) -> list[object]:
    words = ["evaluate", folder / source, "--reference", reference, "--quiet"]
    return [*words, "--weights", folder / "lite0.safetensors", *more]


def test_two_halves_are_near_and_noise_is_far(
    folder: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "half.json"
    words = evaluate(folder, reference, "scenes.npz", "--images", "30-59", "--json", "--output", out)
    half = json.loads(run(capsys, *words))
    noise = json.loads(run(capsys, *evaluate(folder, reference, "noise.npz", "--json")))
    same = json.loads(run(capsys, *evaluate(folder, reference, "scenes.npz", "--images", "0-29", "--json")))
    assert abs(same["metrics"][DISTANCE]) < 1e-6 * noise["metrics"][DISTANCE]
    assert half["metrics"][DISTANCE] < 0.2 * noise["metrics"][DISTANCE]
    kernel = f"kernel_distance[{NET}]"
    assert abs(half["metrics"][kernel]) < 0.2 * noise["metrics"][kernel]
    assert half["metrics"][f"recall[{NET}]"] > noise["metrics"][f"recall[{NET}]"]
    assert json.loads(out.read_text()) == half
    assert half["num_images"] == 30 and half["seeds"] is None and half["ema"] is None
    assert half["feature_net"]["name"] == NET
    assert half["feature_net"]["checksum"] == file_checksum(folder / "lite0.safetensors")
    assert half["reference"]["source"] == "scenes, images 0-29"
    assert half["reference"]["file_sha256"] == file_checksum(reference)
    assert half["images"] == {"data": str(folder / "scenes.npz"), "images": "30-59"}


def test_a_network_is_sampled(folder: Path, reference: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = evaluate(folder, reference, "student", "--seeds", "5-14", "--json")
    report = json.loads(run(capsys, *words))
    assert report["seeds"] == {"first": 5, "last": 14} and report["num_images"] == 10
    assert report["ema"] == "half-life 500 kimg" and report["images"]["num_evaluations"] == 1
    again = json.loads(run(capsys, *words, "--batch-size", "3"))
    assert again["metrics"][DISTANCE] == pytest.approx(report["metrics"][DISTANCE], rel=1e-2)
    text = run(capsys, *evaluate(folder, reference, "teacher", "--seeds", "0-3", "--steps", "2"))
    assert text.splitlines()[0].startswith(DISTANCE)
    assert text.splitlines()[-1] == "4 images against scenes, images 0-29, seeds 0-3, 3 evaluations each"


def test_reference_keeps_what_it_is_told(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["reference", folder / "scenes.npz", "--images", "0-9", "--net", NET]
    words += ["--weights", folder / "lite0.safetensors", "--quiet", "--json"]
    for keep, kept in (("0", 0), ("4", 4), (None, 10)):
        out = tmp_path / f"{keep}.npz"
        more = [] if keep is None else ["--keep", keep]
        record = json.loads(run(capsys, *words, "--output", out, *more))
        assert record["num_features_kept"] == kept and record["num_images"] == 10
        features = read_reference(out).features
        assert (0 if features is None else len(features)) == kept
    again = run(capsys, *words, "--output", tmp_path / "4.npz", code=2)
    assert "exists; choose another name or pass --overwrite" in again
    itself = run(capsys, *words, "--output", folder / "scenes.npz", "--overwrite", code=2)
    assert "is the data set itself" in itself
    wrong = run(capsys, *words, "--output", tmp_path / "x.json", code=2)
    assert "use one of .npz" in wrong


@pytest.mark.parametrize(
    ("source", "more", "message"),
    [
        ("scenes.npz", ["--seeds", "0-9"], "is a data set, and --seeds is for networks"),
        ("scenes.npz", ["--images", "0-60"], "has the images 0 to 59"),
        ("scenes.npz", ["--net", "inception_v3"], "SHA-256"),
        ("student", ["--images", "0-9"], "is a network, and --images is for data sets"),
        ("student", ["--steps", "3"], "leave --steps out"),
        ("student", ["--seeds", "1,5"], "pass one run of seeds"),
        ("none", [], "does not exist"),
        ("lite0.safetensors", [], "is neither a data set of images"),
        ("scenes.npz", ["--settings.num-subsets", "0"], "num-subsets is 0"),
    ],
)
def test_bad_options_are_one_sentence(
    source: str,
    more: list[str],
    message: str,
    folder: Path,
    reference: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = evaluate(folder, reference, source, "--output", tmp_path / "r.json", *more)
    assert message in run(capsys, *words, code=2)
    assert not (tmp_path / "r.json").exists()


def test_missing_files_are_one_sentence(
    folder: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    no_reference = evaluate(folder, tmp_path / "no.npz", "scenes.npz")
    assert "no.npz" in run(capsys, *no_reference, code=2)
    words = ["evaluate", folder / "scenes.npz", "--reference", reference, "--weights", tmp_path / "no"]
    assert "is not a file; pass the weights of efficientnet_lite0" in run(capsys, *words, code=2)
    # Images without --reference are told apart from meshes.
    for source in ("scenes.npz", "student"):
        assert "--reference" in run(capsys, "evaluate", folder / source, code=2)


def test_a_reference_of_other_weights_is_refused(
    folder: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tower(tmp_path / "b.safetensors", seed=1)
    words = ["evaluate", folder / "scenes.npz", "--reference", reference, "--quiet"]
    assert "use one file for both" in run(capsys, *words, "--weights", tmp_path / "b.safetensors", code=2)


def test_help_shows_both_kinds(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", "--help"]) == 0
    out = capsys.readouterr().out
    assert "--prompt" in out and "--reference" in out


def test_what_a_source_is(folder: Path, tmp_path: Path) -> None:
    assert image_kind(folder / "scenes.npz") == "images" and image_kind(folder / "student") == "network"
    pictures = tmp_path / "pictures"
    (pictures / "cat").mkdir(parents=True)
    assert image_kind(pictures) is None
    (pictures / "cat" / "1.png").touch()
    assert image_kind(pictures) == "images" and wants_images([str(pictures)])
    # The directory of a run holds pictures too, and is scored by its mesh.
    for name in ("mesh.glb", "config.yaml"):
        run_folder = tmp_path / name.partition(".")[0]
        run_folder.mkdir()
        (run_folder / "preview.png").touch()
        (run_folder / name).touch()
        assert image_kind(run_folder) is None and not wants_images([str(run_folder)])
    assert wants_images(["x.glb", "--reference=r.npz"]) and not wants_images([])
