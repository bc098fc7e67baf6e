"""CIFAR-10 in both versions, unpacked and as an archive, and pickles that are up to something."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uni3d.data.cifar10 import _read_batch
from uni3d.data.image_readers import open_images
from uni3d.errors import UsageError
from uni3d.pickle_reader import PickleReader

NUM = 6
RNG = np.random.default_rng(1)
PIXELS = RNG.integers(0, 256, (6 * NUM, 3072), dtype=np.uint8)
LABELS = RNG.integers(0, 10, 6 * NUM)
STEMS = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


def text(value: bytes) -> bytes:
    """A string as Python 2 pickled it."""
    if len(value) < 256:
        return b"U" + bytes([len(value)]) + value
    return b"T" + struct.pack("<I", len(value)) + value


def array(pixels: np.ndarray) -> bytes:
    """An array of uint8 [N, 3072] as numpy of Python 2 pickled it, protocol 2."""
    rows = b"M" + struct.pack("<H", len(pixels))
    head = b"cnumpy.core.multiarray\n_reconstruct\nq\x05cnumpy\nndarray\nq\x06K\x00\x85U\x01b\x87Rq\x07"
    minus_one = b"J\xff\xff\xff\xff"
    kind = b"cnumpy\ndtype\nq\x08U\x02u1K\x00K\x01\x87Rq\x09(K\x03U\x01|NNN" + 2 * minus_one + b"K\x00tb"
    return head + b"(K\x01" + rows + b"M\x00\x0c\x86q\x0a" + kind + b"\x89" + text(pixels.tobytes()) + b"tb"


def batch(pixels: np.ndarray, labels: np.ndarray) -> bytes:
    """One batch of the python version: a dict of batch_label, labels, data, filenames."""
    numbers = b"".join(b"K" + bytes([label]) for label in labels.tolist())
    names = b"".join(text(b"image_%d.png" % i) for i in range(len(labels)))
    return (
        b"\x80\x02}q\x01(" + text(b"batch_label") + b"q\x02" + text(b"training batch 1 of 5")
        + text(b"labels") + b"]q\x03(" + numbers + b"e" + text(b"data") + array(pixels)
        + text(b"filenames") + b"]q\x04(" + names + b"eu."
    )  # fmt: skip


def records(pixels: np.ndarray, labels: np.ndarray) -> bytes:
    """One batch of the binary version."""
    return np.concatenate([labels.astype(np.uint8)[:, None], pixels], axis=1).tobytes()


def files(is_binary: bool) -> dict[str, bytes]:
    folder = f"cifar-10-batches-{'bin' if is_binary else 'py'}"
    write = records if is_binary else batch
    found = {f"{folder}/readme.html": b"x", f"{folder}/batches.meta": b"x"}
    for i, stem in enumerate(STEMS):
        part = slice(i * NUM, (i + 1) * NUM)
        found[f"{folder}/{stem}{'.bin' if is_binary else ''}"] = write(PIXELS[part], LABELS[part])
    return found


def archive_of(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def test_the_hand_written_batch_is_what_pickle_reads() -> None:
    loaded = pickle.loads(batch(PIXELS[:3], LABELS[:3]), encoding="bytes")
    assert np.array_equal(loaded[b"data"], PIXELS[:3]) and loaded[b"labels"] == LABELS[:3].tolist()


@pytest.mark.parametrize("is_binary", [False, True])
@pytest.mark.parametrize("place", ["folder", "parent", "archive"])
def test_both_versions_wherever_they_lie(tmp_path: Path, is_binary: bool, place: str) -> None:
    members = files(is_binary)
    if place == "archive":
        path = archive_of(tmp_path / "cifar-10.tar.gz", members)
    else:
        for name, data in members.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(data)
        path = tmp_path if place == "parent" else tmp_path / next(iter(members)).split("/")[0]
    train, test = open_images(path), open_images(path, split="test")
    assert (train.name, test.name, train.num_classes) == ("cifar10-train", "cifar10-test", 10)
    assert (train.resolution, train.num_channels) == (32, 3)
    assert np.array_equal(train.images().reshape(-1, 3072), PIXELS[: 5 * NUM])
    assert np.array_equal(test.images().reshape(-1, 3072), PIXELS[5 * NUM :])
    assert train.labels is not None and np.array_equal(train.labels, LABELS[: 5 * NUM])
    assert open_images(path, labels="none").labels is None


def refused(path: Path) -> str:
    with pytest.raises(UsageError) as caught:
        open_images(path)
    assert "\n" not in str(caught.value) and ";" in str(caught.value) and path.name in str(caught.value)
    return str(caught.value)


def test_refused_archives(tmp_path: Path) -> None:
    path = tmp_path / "cifar.tar.gz"
    path.write_bytes(b"no archive")
    assert "cannot be read as a tar archive" in refused(path)
    whole = archive_of(path, files(True)).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "cannot be read as a tar archive" in refused(path)
    assert "holds no data_batch_1" in refused(archive_of(path, {"a": b"x"}))
    members = files(True)
    name = "cifar-10-batches-bin/data_batch_1.bin"
    assert "no multiple of 3073" in refused(archive_of(path, {**members, name: b"x" * 100}))
    assert "no multiple of 3073" in refused(archive_of(path, {**members, name: b""}))
    assert "label 255; expected 0 to 9" in refused(archive_of(path, {**members, name: b"\xff" * 3073}))
    assert "more than once" in refused(archive_of(path, {name: members[name], f"x/{name}": b""}))
    many = {f"{i}": b"" for i in range(1001)}
    assert "far more than CIFAR-10" in refused(archive_of(path, many))


def test_an_archive_writes_nothing_and_follows_no_link(tmp_path: Path) -> None:
    path = tmp_path / "cifar.tar.gz"
    members = files(True)
    data = members.pop("cifar-10-batches-bin/data_batch_1.bin")
    secret = tmp_path / "secret"
    secret.write_bytes(data)
    with tarfile.open(path, "w:gz") as archive:
        link = tarfile.TarInfo("cifar-10-batches-bin/data_batch_1.bin")
        link.type, link.linkname = tarfile.SYMTYPE, str(secret)
        archive.addfile(link)
        for name, content in {**members, "../../escape": b"x"}.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    assert "holds no data_batch_1" in refused(path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["cifar.tar.gz", "secret"]


def test_an_archive_bomb_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cifar.tar"
    info = tarfile.TarInfo("cifar-10-batches-bin/data_batch_1.bin")
    info.size = 2**26 + 1
    path.write_bytes(info.tobuf() + bytes(1024))
    assert "larger than any batch" in refused(path)
    info.size = 2**31
    path.write_bytes(info.tobuf() + bytes(1024))
    assert "far more than CIFAR-10" in refused(path)


class Attack:
    def __reduce__(self) -> tuple:
        return (os.system, ("touch hacked",))


def folder_with(tmp_path: Path, data: bytes) -> Path:
    for name, content in files(False).items():
        file = tmp_path / name.partition("/")[2]
        file.write_bytes(data if file.name == "data_batch_1" else content)
    return tmp_path


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_a_hostile_pickle_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: int
) -> None:
    monkeypatch.chdir(tmp_path)
    message = refused(folder_with(tmp_path, pickle.dumps({b"data": Attack()}, protocol)))
    assert "data_batch_1 is not what it should be" in message
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is not what it should be"),
        (b"\x80\x02}q\x01.", "is no batch of CIFAR-10"),
        (b"\x80\x02]q\x01.", "is no batch of CIFAR-10"),
        (b"}q\x01.", "does not begin as a pickle"),
        (b"\x80\x02N", "it ends in the middle"),
        (b"\x80\x02cos\nsystem\n(U\x04truetR.", "it names 'os.system'"),
        (b"\x80\x02(S'true'\ntR.", "it uses the operation STRING"),
        (b"\x80\x02(U\x04trueios\nsystem\n.", "it uses the operation INST"),
        (b"\x80\x02K\x01K\x02a.", "it appends to a value of the kind 'int'"),
        (b"\x80\x02K\x01}b.", "it sets the state of a value of the kind 'int'"),
        (b"\x80\x02K\x01)R.", "it calls a value of the kind 'int'"),
        (b"\x80\x02cnumpy\nndarray\n(K\x01tR.", "it calls 'numpy.ndarray'"),
        (b"\x80\x02cnumpy\ndtype\n)Rcnumpy\ndtype\n)RR.", "it calls a value of the kind '_ArrayType'"),
        (b"\x80\x02cnumpy\ndtype\n)R.", "is no batch of CIFAR-10"),
        (b"\x80\x02}(" + b")" + b"\x85" * 200_000 + b"K\x01u.", "kind 'tuple' as a key"),
        (b"\x80\x02" + b"N0" * 600_000 + b"N.", "more operations than any"),
        (b"\x80\x02T\xff\xff\xff\x7f", "it ends in the middle"),
        (b"\x80\x02h\x05.", "never remembered"),
        (b"\x80\x020.", "never made"),
        (batch(PIXELS[:3], LABELS[:2]), "has 3 images and 2 labels"),
        (batch(PIXELS[:3, :3000].copy(), LABELS[:3]), "is no batch of CIFAR-10"),
        (batch(PIXELS[:3], LABELS[:3]).replace(b"u1", b"i1"), "its data are no bytes"),
        (batch(PIXELS[:3], LABELS[:3]).replace(b"cnumpy\nndarray", b"cnumpy\nmatrixx"), "numpy.matrixx"),
        (pickle.dumps({b"data": list(range(9)), b"labels": [1]}, 2), "is not what it should be"),
    ],
)
def test_refused_batches(tmp_path: Path, data: bytes, message: str) -> None:
    assert message in refused(folder_with(tmp_path, data))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_pickles_are_read_or_refused(draw: st.DataObject) -> None:
    data = bytearray(batch(PIXELS[:1], LABELS[:1]))
    for _ in range(draw.draw(st.integers(1, 4))):
        data[draw.draw(st.integers(0, 200)) % len(data)] = draw.draw(st.integers(0, 255))
    with contextlib.suppress(UsageError):
        _read_batch("data_batch_1", bytes(data), Path("folder"))


def test_plain_data_of_every_protocol_since_2() -> None:
    value = {"a": [1, 2.5, None, True, (1, 2, 3, 4), (), (1,)], "b": {"c": "text"}}
    for protocol in (2, 3, 4, 5):
        data = memoryview(pickle.dumps(value, protocol))
        assert PickleReader(data, {}).read() == (value, len(data))
