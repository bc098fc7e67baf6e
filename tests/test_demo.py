"""The web page without a browser: what a run says, cancelling, errors, and that gradio accepts the page."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from uni3d.demo import build_page, run_steps
from uni3d.errors import ConfigError, MissingPackageError, UsageError


class Result:
    def save(self, path: Path) -> Path:
        path.write_bytes(b"glTF")
        return path


def three_steps(prompt: str, *, seed: int, config: Any, callback_on_step_end: Callable[..., bool]) -> Result:
    assert config.quality == "draft" and seed == 7
    for step in (1, 2, 3):
        if not callback_on_step_end(step, {}):
            break
    return Result()


def test_a_run_says_its_steps_and_ends_with_a_mesh(tmp_path: Path) -> None:
    said = list(run_steps(three_steps, " a Red chair ", 7, "draft", tmp_path))
    assert [text.partition(" of ")[0] for text, _ in said] == [
        "starting",
        "step 1",
        "step 2",
        "step 3",
        "done",
    ]
    assert [mesh for _, mesh in said] == [None] * 4 + [tmp_path / "a-red-chair-7.glb"]
    assert (tmp_path / "a-red-chair-7.glb").read_bytes() == b"glTF"


def test_leaving_the_page_stops_the_run(tmp_path: Path) -> None:
    go_on, stopped = threading.Event(), threading.Event()

    def endless(prompt: str, *, seed: int, config: Any, callback_on_step_end: Callable[..., bool]) -> Result:
        while callback_on_step_end(1, {}):
            go_on.wait(0.01)
        stopped.set()
        return Result()

    run = run_steps(endless, "a chair", 7, "draft", tmp_path)
    assert [next(run)[0], next(run)[0].partition(" of")[0]] == ["starting", "step 1"]
    run.close()
    assert stopped.wait(5)


def test_bad_input_and_failures_are_raised(tmp_path: Path) -> None:
    def failing(prompt: str, **settings: Any) -> Result:
        raise UsageError("no surface; try another prompt")

    with pytest.raises(UsageError, match="the prompt is empty"):
        next(run_steps(three_steps, " ", 7, "draft", tmp_path))
    with pytest.raises(ConfigError, match="seed is -1"):
        next(run_steps(three_steps, "a", -1, "draft", tmp_path))
    with pytest.raises(UsageError, match="no surface"):
        list(run_steps(failing, "a", 7, "draft", tmp_path))


def test_without_gradio_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(MissingPackageError, match=r'pip install "uni3d\[demo\]"') as caught:
        build_page(lambda: three_steps, tmp_path)
    assert caught.value.exit_code == 3


def test_gradio_accepts_the_page(tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason="the demo extra is not installed")
    assert build_page(lambda: three_steps, tmp_path) is not None
