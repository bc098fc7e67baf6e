"""Checkpoints: exact round trips, damage is found, and a kill at any moment loses at most the last one."""

from __future__ import annotations

import logging
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from uni3d.errors import ConfigError, MissingWeightsError, UsageError
from uni3d.training.checkpoint import (
    CheckpointStore,
    DamagedFile,
    atomic_write,
    atomic_write_json,
    atomic_write_text,
    read_safetensors,
)
from uni3d.training.state_tree import (
    capture_random_state,
    flatten_state,
    restore_random_state,
    restore_state,
)


def small_state(step: int) -> dict[str, object]:
    return {"weights": torch.full((64, 64), float(step)), "step": step, "note": "ä", "rate": 0.1}


def test_atomic_write_keeps_the_suffix_and_replaces(tmp_path: Path) -> None:
    seen: list[Path] = []

    def writer(temporary: Path) -> None:
        seen.append(temporary)
        temporary.write_text("new")

    target = tmp_path / "mesh.glb"
    target.write_text("old")
    assert atomic_write(target, writer) == target
    assert target.read_text() == "new"
    assert seen[0].suffix == ".glb" and seen[0].parent == tmp_path
    assert os.listdir(tmp_path) == ["mesh.glb"]


def test_atomic_write_leaves_the_old_file_if_the_writer_fails(tmp_path: Path) -> None:
    target = tmp_path / "mesh.glb"
    target.write_text("old")

    def writer(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        atomic_write(target, writer)
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["mesh.glb"]


def test_atomic_json_refuses_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        atomic_write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert os.listdir(tmp_path) == []
    atomic_write_text(tmp_path / "a.txt", "ü")
    assert (tmp_path / "a.txt").read_bytes() == "ü".encode()


def test_state_round_trip_is_exact(tmp_path: Path) -> None:
    shared = torch.randn(3)
    state = {
        "tensors": {"a/b": torch.randn(2), "a": {"b": torch.arange(3)}},
        "shared": [shared, shared],
        "slice": torch.randn(4, 4).t()[1:],
        "half": torch.randn(5).half(),
        "bfloat": torch.randn(5).bfloat16(),
        "flag": torch.tensor(True),
        "empty": torch.zeros(0, 3),
        "array": np.arange(6, dtype=np.float64).reshape(2, 3),
        "tuple": (1, (2.5, "x"), None),
        "numbers": {0: {"lr": 1e-3}, "1": True},
        "special": [float("inf"), float("-inf"), 0.1 + 0.2, 2**100, np.float32(0.5)],
        "$tensor": "not a tensor",
    }
    store = CheckpointStore(tmp_path)
    store.save(1, state)
    loaded = store.load_latest()
    assert loaded is not None and loaded.step == 1
    _assert_same(state, loaded.state)


def _assert_same(expected: object, got: object) -> None:
    if isinstance(expected, torch.Tensor):
        assert isinstance(got, torch.Tensor) and expected.dtype == got.dtype and torch.equal(expected, got)
    elif isinstance(expected, np.ndarray):
        assert isinstance(got, np.ndarray) and expected.dtype == got.dtype and np.array_equal(expected, got)
    elif isinstance(expected, dict):
        assert isinstance(got, dict) and list(expected) == list(got)
        for key in expected:
            _assert_same(expected[key], got[key])
    elif isinstance(expected, (list, tuple)):
        assert type(got) is type(expected) and len(expected) == len(got)
        for one, other in zip(expected, got, strict=True):
            _assert_same(one, other)
    else:
        assert got == expected


def test_saved_tensors_do_not_follow_later_updates() -> None:
    weight = torch.zeros(2)
    skeleton, tensors = flatten_state({"w": weight})
    weight += 1
    assert restore_state(skeleton, tensors)["w"].tolist() == [0.0, 0.0]


def test_what_cannot_be_saved_is_named() -> None:
    with pytest.raises(TypeError, match="state/a/0"):
        flatten_state({"a": [object()]})


def train(model: nn.Module, optimiser: torch.optim.Optimizer, num: int, generator: torch.Generator) -> None:
    for _ in range(num):
        x = torch.randn(4, 3, generator=generator) + torch.rand(1) + random.random() + np.random.rand()  # noqa: NPY002
        optimiser.zero_grad()
        model(x).square().mean().backward()
        optimiser.step()


def fresh(seed: int) -> tuple[nn.Module, torch.optim.Optimizer, torch.Generator]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2), torch.Generator().manual_seed(seed)


def test_a_resumed_run_is_bitwise_the_unbroken_one(tmp_path: Path) -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    model, optimiser, generator = fresh(0)
    store = CheckpointStore(tmp_path)
    train(model, optimiser, 5, generator)
    state = {
        "model": model.state_dict(),
        "optimiser": optimiser.state_dict(),
        "random": capture_random_state({"views": generator}),
    }
    store.save(5, state)
    train(model, optimiser, 5, generator)
    unbroken = {name: value.clone() for name, value in model.state_dict().items()}

    model, optimiser, generator = fresh(1)
    random.seed(1)
    loaded = store.load_latest()
    assert loaded is not None
    model.load_state_dict(loaded.state["model"])
    optimiser.load_state_dict(loaded.state["optimiser"])
    restore_random_state(loaded.state["random"], {"views": generator})
    train(model, optimiser, 5, generator)
    for name, value in model.state_dict().items():
        assert torch.equal(value, unbroken[name]), name


def test_random_state_holds_numpy_generators_and_checks_names(tmp_path: Path) -> None:
    generator = np.random.default_rng(3)
    store = CheckpointStore(tmp_path)
    store.save(0, capture_random_state({"shuffle": generator}))
    expected = generator.random(4)
    other = np.random.default_rng(9)
    loaded = store.load_latest()
    assert loaded is not None
    restore_random_state(loaded.state, {"shuffle": other})
    assert np.array_equal(other.random(4), expected)
    with pytest.raises(ValueError, match="shuffle"):
        restore_random_state(loaded.state, {})


def test_only_the_newest_are_kept_and_rolled_back_steps_go(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    for step in (1, 2, 3, 4):
        store.save(step, small_state(step))
    assert [path.name for path in store.paths()] == ["step_00000004.safetensors", "step_00000003.safetensors"]
    store.save(3, small_state(3))
    assert [path.name for path in store.paths()] == ["step_00000003.safetensors"]
    assert CheckpointStore(tmp_path / "none").load_latest() is None


DAMAGE = ["truncated", "empty", "header", "tensor", "metadata", "garbage"]


def damage(path: Path, kind: str) -> None:
    data = bytearray(path.read_bytes())
    match kind:
        case "truncated":
            data = data[: len(data) // 2]
        case "empty":
            data = bytearray()
        case "header":
            data[3] ^= 0xFF
        case "tensor":
            data[-5] ^= 0x01
        case "metadata":
            place = data.index(b'\\"rate\\":') + 9
            data[place : place + 3] = b"0.2"
        case "garbage":
            data = bytearray(os.urandom(len(data)))
            data[0] = 0
    path.write_bytes(data)


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = CheckpointStore(tmp_path)
    store.save(1, small_state(1))
    newest = store.save(2, small_state(2))
    damage(newest, kind)
    with caplog.at_level(logging.WARNING):
        loaded = store.load_latest()
    assert loaded is not None and loaded.step == 1
    assert "step_00000002" in caplog.text and "going back" in caplog.text


def test_truncation_is_found_at_every_length(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    path = store.save(1, {"weights": torch.randn(8), "note": "x"})
    whole = path.read_bytes()
    for length in range(0, len(whole), max(1, len(whole) // 50)):
        path.write_bytes(whole[:length])
        with pytest.raises(DamagedFile):
            store.load(path)


def test_every_flipped_bit_of_the_contents_is_found(tmp_path: Path) -> None:
    """Flips that only change how the header is laid out may pass, but never with other contents."""
    store = CheckpointStore(tmp_path)
    state = {"weights": torch.randn(8), "note": "x"}
    path = store.save(1, state)
    whole = path.read_bytes()
    draw = random.Random(0)
    for _ in range(150):
        position = draw.randrange(len(whole))
        data = bytearray(whole)
        data[position] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
        try:
            loaded = store.load(path)
        except DamagedFile:
            continue
        _assert_same(state, loaded.state)


def test_all_damaged_is_one_sentence(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for step in (1, 2):
        damage(store.save(step, small_state(step)), "truncated")
    with pytest.raises(UsageError, match=r"every checkpoint .* is damaged .*; start the run anew") as caught:
        store.load_latest()
    assert caught.value.exit_code == 2


def test_other_settings_are_refused_key_by_key(tmp_path: Path) -> None:
    first = {"method": "vsd", "guidance": {"scale": [[0, 12.0]]}}
    CheckpointStore(tmp_path, fingerprint=first).save(1, small_state(1))
    assert CheckpointStore(tmp_path, fingerprint=first).load_latest() is not None
    second = {"method": "vsd", "guidance": {"scale": [[0, 7.0]]}}
    with pytest.raises(ConfigError, match=r"guidance.scale was \[\[0, 12.0\]\], now \[\[0, 7.0\]\]"):
        CheckpointStore(tmp_path, fingerprint=second).load_latest()


class Bomb:
    """A pickle that would leave a trace if it were ever loaded."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (Path.touch, (self.trace,))


@pytest.mark.parametrize("writer", ["pickle", "torch"])
def test_pickles_are_refused_and_not_run(tmp_path: Path, writer: str) -> None:
    trace = tmp_path / "ran"
    path = tmp_path / "weights.safetensors"
    if writer == "pickle":
        path.write_bytes(pickle.dumps(Bomb(trace)))
    else:
        torch.save(Bomb(trace), path)
    with pytest.raises(DamagedFile, match="looks like a pickle .* convert it to safetensors"):
        read_safetensors(path)
    assert not trace.exists()


def test_a_safetensors_file_whose_header_length_looks_like_a_pickle_loads(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    for padding in range(0, 400, 4):
        save_file({"w": torch.ones(2)}, path, metadata={"padding": "x" * padding})
        assert torch.equal(read_safetensors(path)[0]["w"], torch.ones(2))


def test_missing_weights_have_exit_code_3(tmp_path: Path) -> None:
    with pytest.raises(MissingWeightsError, match="does not exist") as caught:
        read_safetensors(tmp_path / "none.safetensors")
    assert caught.value.exit_code == 3


WRITER = """
import os, sys, torch
from uni3d.training.checkpoint import CheckpointStore
torch.set_num_threads(1)
for _ in sys.stdin:
    child = os.fork()
    if child == 0:
        store = CheckpointStore(sys.argv[1])
        found = store.load_latest()
        step = found.step if found else 0
        print(os.getpid(), flush=True)
        while True:
            step += 1
            store.save(step, {"step": step, "w": torch.full((300_000,), float(step))})
    os.waitpid(child, 0)
    print("gone", flush=True)
"""


def test_killed_while_writing_it_always_resumes(tmp_path: Path) -> None:
    """kill -9 at random moments of processes that do nothing but write checkpoints."""
    draw = random.Random(1)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert server.stdin is not None and server.stdout is not None
    reached = num_strays = 0
    with server.stdin, server.stdout:
        for _ in range(25):
            server.stdin.write("go\n")
            server.stdin.flush()
            writer = int(server.stdout.readline())
            time.sleep(draw.uniform(0.02, 0.12))
            os.kill(writer, signal.SIGKILL)
            assert server.stdout.readline() == "gone\n"
            num_strays += any(path.name.startswith(".") for path in tmp_path.iterdir())
            store = CheckpointStore(tmp_path)
            assert len(store.paths()) <= 3
            loaded = store.load_latest()
            if loaded is None:
                continue
            assert loaded.step >= reached
            assert loaded.path == store.paths()[0], "atomic writes leave no damaged checkpoint behind"
            assert loaded.state["step"] == loaded.step
            assert torch.equal(loaded.state["w"], torch.full((300_000,), float(loaded.step)))
            reached = loaded.step
    server.wait()
    assert reached > 25
    assert num_strays > 0, "no kill hit a write, so the test proved nothing"
