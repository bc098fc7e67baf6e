"""`uni3d dataset`: what it says, what it writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from uni3d import cli
from uni3d.data.image_readers import open_images

PIXELS = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    np.savez(tmp_path / "small.npz", images=PIXELS, labels=np.array([0, 1, 1, 2]))
    return tmp_path / "small.npz"


def test_check_and_convert(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["dataset", str(source)]) == 0
    assert capsys.readouterr().out == "small: 4 images, 8x8 RGB, 3 classes\n"
    output = source.with_suffix(".zip")
    assert cli.main(["dataset", str(source), "--output", str(output), "--limit", "3", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["num_images"], facts["num_classes"], facts["output"]) == (3, 3, str(output))
    again = open_images(output)
    assert np.array_equal(again.images(), PIXELS[:3].transpose(0, 3, 1, 2))
    assert cli.main(["dataset", str(output), "--labels", "none"]) == 0
    assert capsys.readouterr().out == "small: 3 images, 8x8 RGB, no labels\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none.zip"], "'none.zip' does not exist; pass a .zip, a folder"),
        (["{source}", "--output", "{source}.rar"], "use one of .zip"),
        (["{source}", "--output", "{folder}/none/a.zip"], "does not exist; create it first"),
        (["{zip}", "--output", "{zip}"], "exists; choose another name or pass --overwrite"),
        (["{zip}", "--output", "{zip}", "--overwrite"], "is the data set itself; choose another name"),
        (["{source}", "--limit", "0"], "--limit is 0"),
        (["{source}", "--compress-level", "10"], "--compress-level is 10"),
        (["{source}", "--split", "validation"], "--split"),
    ],
)
def test_refusals(source: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = source.with_suffix(".zip")
    assert cli.main(["dataset", str(source), "--output", str(file)]) == 0
    before = file.read_bytes()
    capsys.readouterr()
    filled = [word.format(source=source, folder=source.parent, zip=file) for word in words]
    assert cli.main(["dataset", *filled]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1, err
    assert file.read_bytes() == before
