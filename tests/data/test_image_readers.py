"""Readers of image data sets: what they read, and one sentence for whatever they refuse."""

from __future__ import annotations

import io
import json
import lzma
import multiprocessing
import pickle
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from uni3d.data.edm_zip import member_name, write_edm_zip
from uni3d.data.image_dataset import ImageDataset, dataset_of_array
from uni3d.data.image_readers import open_images
from uni3d.errors import UsageError

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 3, 8, 8), dtype=np.uint8)
LABELS = np.array([1, 0, 2, 2, 1])


def picture(pixels: np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    """A file of uint8 [C, H, W]."""
    buffer = io.BytesIO()
    image = pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)
    Image.fromarray(image).save(buffer, kind, **options)
    return buffer.getvalue()


def make_zip(path: Path, members: dict[str, bytes], labels: Any = "none") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
        if labels != "none":
            archive.writestr("dataset.json", json.dumps({"labels": labels}))
    return path


def five(prefix: str = "00000/") -> dict[str, bytes]:
    return {f"{prefix}img{i}.png": picture(image) for i, image in enumerate(PIXELS)}


@pytest.fixture
def dataset() -> ImageDataset:
    return dataset_of_array(PIXELS, LABELS, name="five", where="five")


def test_an_edm_zip_comes_back_as_it_was_written(tmp_path: Path, dataset: ImageDataset) -> None:
    path = write_edm_zip(dataset, tmp_path / "five-8x8.zip")
    again = open_images(path)
    assert (again.name, len(again), again.num_classes) == ("five-8x8", 5, 3)
    assert (again.num_channels, again.resolution) == (3, 8)
    assert np.array_equal(again.images(), PIXELS) and again.images().dtype == np.uint8
    assert again.labels is not None and again.labels.dtype == np.int64
    assert np.array_equal(again.labels, LABELS)
    assert np.array_equal(again.images([4, 1, 1]), PIXELS[[4, 1, 1]])
    # Equal data, equal file: nothing of the time or place of writing is in it.
    second = write_edm_zip(again, tmp_path / "second.zip")
    assert second.read_bytes() == path.read_bytes()


def test_the_zip_has_the_layout_of_edm(tmp_path: Path, dataset: ImageDataset) -> None:
    with zipfile.ZipFile(write_edm_zip(dataset, tmp_path / "a.zip")) as archive:
        assert archive.namelist()[0] == "00000/img00000000.png"
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        assert json.loads(archive.read("dataset.json"))["labels"][2] == ["00000/img00000002.png", 2]
    assert member_name(1234) == "00001/img00001234.png"
    plain = write_edm_zip(open_images(tmp_path / "a.zip", labels="none"), tmp_path / "b.zip")
    with zipfile.ZipFile(plain) as archive:
        assert json.loads(archive.read("dataset.json")) == {"labels": None}
    assert open_images(plain).labels is None and open_images(plain).num_classes == 0


def test_grey_images(tmp_path: Path) -> None:
    grey = dataset_of_array(PIXELS[:, :1], None, name="grey", where="grey")
    path = write_edm_zip(grey, tmp_path / "grey.zip")
    assert open_images(path).num_channels == 1
    assert np.array_equal(open_images(path).images(), PIXELS[:, :1])
    colour = open_images(path, as_rgb=True)
    assert colour.num_channels == 3 and np.array_equal(colour.images()[:, 2], PIXELS[:, 0])


def test_a_zip_is_in_the_order_of_its_sorted_names_and_hidden_files_are_left_out(tmp_path: Path) -> None:
    members = dict(reversed(five().items())) | {"__MACOSX/00000/img0.png": b"", "00000/._img0.png": b""}
    assert np.array_equal(open_images(make_zip(tmp_path / "a.zip", members)).images(), PIXELS)


def write_folder(folder: Path, members: dict[str, bytes]) -> Path:
    for name, data in members.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def test_folders(tmp_path: Path) -> None:
    flat = open_images(write_folder(tmp_path / "flat", five("")))
    assert flat.labels is None and np.array_equal(flat.images(num_workers=2), PIXELS)
    names = [f"{'bac'[label]}/{i}.png" for i, label in enumerate(LABELS)]
    members = {name: picture(image) for name, image in zip(names, PIXELS, strict=True)}
    by_class = open_images(write_folder(tmp_path / "classes", members | {"notes.txt": b"x"}))
    order = sorted(range(5), key=lambda i: names[i])
    assert by_class.labels is not None and by_class.num_classes == 3
    assert by_class.labels.tolist() == ["abc".index("bac"[LABELS[i]]) for i in order]
    assert np.array_equal(by_class.images(), PIXELS[order])
    assert open_images(tmp_path / "classes", labels="none").labels is None
    labels = {"labels": [[name, 7] for name in names]}
    (tmp_path / "classes" / "dataset.json").write_text(json.dumps(labels))
    from_file = open_images(tmp_path / "classes")
    assert from_file.labels is not None and set(from_file.labels.tolist()) == {7}
    assert from_file.num_classes == 8 and open_images(tmp_path / "classes", num_classes=9).num_classes == 9


def test_npz_of_arrays_and_of_encoded_pictures(tmp_path: Path) -> None:
    np.savez(tmp_path / "arrays.npz", images=PIXELS.transpose(0, 2, 3, 1), labels=LABELS)
    arrays = open_images(tmp_path / "arrays.npz")
    assert np.array_equal(arrays.images(), PIXELS) and arrays.num_classes == 3
    np.savez(tmp_path / "grey.npz", images=PIXELS[:, 0])
    assert open_images(tmp_path / "grey.npz").num_channels == 1
    assert open_images(tmp_path / "grey.npz", as_rgb=True).images().shape == (5, 3, 8, 8)
    encoded = [picture(image) for image in PIXELS]
    offsets = np.cumsum([0, *map(len, encoded)])
    data = np.frombuffer(b"".join(encoded), np.uint8)
    np.savez(tmp_path / "blob.npz", data=data, offsets=offsets, labels=LABELS)
    (tmp_path / "blob2.npz.xz").write_bytes(lzma.compress((tmp_path / "blob.npz").read_bytes()))
    for name in ("blob.npz", "blob2.npz.xz"):
        blob = open_images(tmp_path / name)
        assert np.array_equal(blob.images(), PIXELS) and blob.labels is not None
    assert blob.name == "blob2"


def test_a_data_set_in_memory_selected_and_in_batches(tmp_path: Path, dataset: ImageDataset) -> None:
    lazy = open_images(write_edm_zip(dataset, tmp_path / "a.zip"))
    held = lazy.in_memory(num_workers=2)
    (tmp_path / "a.zip").unlink()
    assert np.array_equal(held.images(), PIXELS) and held.in_memory() is held
    chosen = held.select([3, 0])
    assert len(chosen) == 2 and np.array_equal(chosen.images(), PIXELS[[3, 0]])
    assert chosen.labels is not None and chosen.labels.tolist() == [2, 1] and chosen.num_classes == 3
    assert [len(batch) for batch in held.batches(2)] == [2, 2, 1]
    assert np.array_equal(np.concatenate(list(held.batches(2))), PIXELS)
    for wrong in ([], [5], [-1]):
        with pytest.raises(UsageError, match="choose"):
            held.select(wrong)
    with pytest.raises(IndexError):
        held.images([-1])


def _sum_of(dataset: ImageDataset) -> int:
    return int(dataset.images().astype(np.int64).sum())


def test_a_zip_survives_forks_and_pickling(tmp_path: Path, dataset: ImageDataset) -> None:
    lazy = open_images(write_edm_zip(dataset, tmp_path / "a.zip"))
    expected = _sum_of(lazy)
    assert _sum_of(pickle.loads(pickle.dumps(lazy))) == expected
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(_sum_of, [lazy]) == [expected]


PNG = picture(PIXELS[0])


def refused(path: Path, **options: Any) -> str:
    """Open and read everything; the sentence of the UsageError."""
    with pytest.raises(UsageError) as caught:
        open_images(path, **options).images()
    message = str(caught.value)
    assert caught.value.exit_code == 2 and "\n" not in message and str(path.name) in message, message
    assert ";" in message, "a remedy is missing"
    return message


@pytest.mark.parametrize(
    ("members", "labels", "message"),
    [
        ({}, "none", "holds no pictures"),
        ({"a.npy": b"x"}, "none", "holds .npy arrays"),
        ({"a.png": b""}, "none", "a.png cannot be decoded"),
        ({"a.png": PNG[:60]}, "none", "a.png cannot be decoded"),
        ({"a.png": b"no picture"}, "none", "a.png cannot be decoded"),
        ({"a.png": picture(PIXELS[0, :, :4])}, "none", "8x4 pixels; crop"),
        ({"a.png": PNG, "b.png": picture(PIXELS[0, :, :4, :4])}, "none", "b.png is 4x4 RGB and"),
        ({"a.png": PNG, "b.png": picture(PIXELS[0, :1])}, "none", "b.png is 8x8 grey and"),
        ({"a.png": PNG, "b.png": picture(np.zeros((4, 8, 8), np.uint8))}, "none", "mode RGBA"),
        ({"../a.png": PNG}, "none", "unsafe name"),
        ({"x/../../a.png": PNG}, "none", "unsafe name"),
        ({"/etc/a.png": PNG}, "none", "unsafe name"),
        ({"..\\a.png": PNG}, "none", "unsafe name"),
        ({"C:/a.png": PNG}, "none", "unsafe name"),
        ({"a.png": PNG, "b.png": PNG}, [["a.png", 0]], "no label for 1 of 2 images, the first is b.png"),
        ({"a.png": PNG}, [["a.png", 0], ["b.png", 1]], "labels 1 files that are not there"),
        ({"a.png": PNG}, [["a.png", -1]], "has the label -1; expected 0 or more"),
        ({"a.png": PNG}, [["a.png", 2**40]], "number the classes from 0"),
        ({"a.png": PNG}, [["a.png", 10**400]], "number the classes from 0"),
        ({"a.png": PNG}, [["a.png", 0.5]], "expected [file name, whole number]"),
        ({"a.png": PNG}, [["a.png", True]], "expected [file name, whole number]"),
        ({"a.png": PNG}, [["a.png", [0, 1]]], "expected [file name, whole number]"),
        ({"a.png": PNG}, {"a.png": 1}, "expected [file name, whole number]"),
        ({"a.png": PNG}, [["a.png", 0], ["a.png", 1]], "two classes"),
    ],
)
def test_refused_zips(tmp_path: Path, members: dict[str, bytes], labels: Any, message: str) -> None:
    assert message in refused(make_zip(tmp_path / "set.zip", members, labels))


def test_more_refused_zips(tmp_path: Path) -> None:
    path = tmp_path / "set.zip"
    path.write_bytes(b"PK\x03\x04 not a zip")
    assert "cannot be read as a zip" in refused(path)
    path.write_bytes(b"")
    assert "cannot be read as a zip" in refused(path)
    make_zip(path, five(), [[f"00000/img{i}.png", i] for i in range(5)])
    assert "has the label 4; expected 0 to 2" in refused(path, num_classes=3)
    assert "has no labels where 3 classes" in refused(make_zip(path, five()), num_classes=3)
    for text in (b"{", b"[]", b"{}", b"\xff", b"[" * 100_000):
        make_zip(path, {**five(), "dataset.json": text})
        assert "dataset.json in" in refused(path)
    make_zip(path, five())
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "cannot be read as a zip" in refused(path)
    # A bit of the first member flips: its checksum tells.
    at = whole.index(b"IDAT") + 20
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    assert "img0.png is damaged (Bad CRC-32" in refused(path)
    with zipfile.ZipFile(path, "w") as archive, pytest.warns(UserWarning):
        archive.writestr("a.png", PNG)
        archive.writestr("a.png", PNG)
    assert "holds a.png twice" in refused(path)


def test_a_zip_bomb_is_refused_before_it_unpacks(tmp_path: Path) -> None:
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("a.png", "w") as member:
            for _ in range(65):
                member.write(bytes(2**20))
    assert path.stat().st_size < 2**17
    assert "unpacks to 65 MiB, more than 64" in refused(path)
    # A picture of a few hundred bytes that claims 30,000 x 30,000 pixels.
    header = b"IHDR" + (30_000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
    huge = b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4, "big") + header + zlib.crc32(header).to_bytes(4, "big")
    tail = PNG[PNG.index(b"IDAT") - 4 :]
    assert "more than 4096" in refused(make_zip(tmp_path / "huge.zip", {"a.png": huge + tail}))
    header = header.replace((30_000).to_bytes(4, "big"), (5_000).to_bytes(4, "big"))
    large = b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4, "big") + header + zlib.crc32(header).to_bytes(4, "big")
    assert "5000x5000 pixels" in refused(make_zip(tmp_path / "large.zip", {"a.png": large + tail}))


def test_names_that_would_break_a_line_are_quoted(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "set.zip", {"a\n\x1b[31m.png": b"x"})
    assert r"'a\n\x1b[31m.png' cannot be decoded" in refused(path)
    path = make_zip(tmp_path / "set.zip", {f"{'a' * 300}.png": b"x"})
    assert "aaa... cannot be decoded" in refused(path)


def test_modes_of_pictures(tmp_path: Path) -> None:
    def file_of(image: Image.Image, **options: Any) -> Path:
        buffer = io.BytesIO()
        image.save(buffer, "PNG", **options)
        return make_zip(tmp_path / "set.zip", {"a.png": buffer.getvalue()})

    palette = Image.fromarray(PIXELS[0].transpose(1, 2, 0)).quantize(4)
    path = file_of(palette)
    assert "mode P" in refused(path) and "--rgb" in refused(path)
    assert open_images(path, as_rgb=True).images().shape == (1, 3, 8, 8)
    path = file_of(palette, transparency=0)
    assert "without transparency" in refused(path, as_rgb=True)
    path = file_of(Image.fromarray(np.zeros((8, 8), np.uint16)))
    assert "mode I;16" in refused(path, as_rgb=True)


def test_refused_folders_and_files(tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "holds no pictures" in refused(tmp_path / "empty")
    folder = write_folder(tmp_path / "mixed", {"a.png": PNG, "cats/b.png": PNG})
    assert "at its top (a.png) and in subfolders (cats)" in refused(folder)
    assert len(open_images(folder, labels="none")) == 2
    (folder / "dataset.json").write_text('{"labels": [["../a.png", 0], ["cats/b.png", 1]]}')
    with pytest.raises(UsageError, match=r"no label for 1 of 2 images, the first is a\.png"):
        open_images(folder)
    (tmp_path / "set.rar").write_bytes(b"x")
    assert "no data set this version reads" in refused(tmp_path / "set.rar")


def test_refused_npz(tmp_path: Path) -> None:
    path = tmp_path / "set.npz"

    def saved(**arrays: Any) -> Path:
        np.savez(path, **arrays)
        return path

    path.write_bytes(b"x")
    assert "cannot be read as a .npz" in refused(path)
    (tmp_path / "a.npz.xz").write_bytes(b"x")
    assert "cannot be read as a .npz" in refused(tmp_path / "a.npz.xz")
    assert "cannot be read as a .npz" in refused(saved(images=np.array([{}], dtype=object)))
    assert "holds neither" in refused(saved(labels=LABELS))
    assert "float64" in refused(saved(images=np.zeros((2, 8, 8, 3))))
    assert "expected [N, H, W, 3]" in refused(saved(images=np.zeros((2, 3, 8, 8), np.uint8)))
    assert "no images" in refused(saved(images=np.zeros((0, 8, 8, 3), np.uint8)))
    images = PIXELS.transpose(0, 2, 3, 1)
    assert "5 images and 4 labels" in refused(saved(images=images, labels=LABELS[:4]))
    assert "not whole numbers" in refused(saved(images=images, labels=LABELS / 2))
    data = np.frombuffer(PNG, np.uint8)
    for offsets in ([0, len(PNG) + 1], [0, 5, 5], [5, 2], [-1, 5], [0], [0.0, 5.0]):
        assert "do not cut" in refused(saved(data=data, offsets=np.array(offsets)))
    assert "picture 0 cannot be decoded" in refused(saved(data=data, offsets=np.array([0, 40])))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 10_000), value=st.integers(0, 255), cut=st.booleans())
def test_damage_anywhere_is_read_or_refused_in_a_sentence(
    tmp_path: Path, position: int, value: int, cut: bool
) -> None:
    path = tmp_path / "set.zip"
    data = bytearray(make_zip(path, five(), [[f"00000/img{i}.png", i] for i in range(5)]).read_bytes())
    position %= len(data)
    data[position] = value
    path.write_bytes(data[:position] if cut else data)
    try:
        open_images(path).images()
    except UsageError:
        pass


@settings(max_examples=200, deadline=None)
@given(position=st.integers(0, 10_000), value=st.integers(0, 255))
def test_damaged_pictures_are_decoded_or_refused_in_a_sentence(position: int, value: int) -> None:
    from uni3d.data.image_decoding import decode_image

    for kind in ("PNG", "JPEG", "WEBP", "BMP"):
        data = bytearray(picture(PIXELS[0], kind))
        data[position % len(data)] = value
        try:
            decode_image(bytes(data), title="it", as_rgb=True)
        except UsageError:
            pass
