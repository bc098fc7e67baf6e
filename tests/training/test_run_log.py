"""Run directories, metrics, progress lines and the alarm for numbers that are not finite."""

from __future__ import annotations

import io
import json
import logging
import math
from pathlib import Path

import pytest
import torch

from uni3d.errors import TrainingDiverged, UsageError
from uni3d.training.run_log import NonFiniteGuard, Progress, RunDirectory


def test_runs_never_share_a_directory(tmp_path: Path) -> None:
    names = [RunDirectory.create(tmp_path / "outputs", "chair-0").path.name for _ in range(3)]
    assert names == ["chair-0", "chair-0-2", "chair-0-3"]


def test_a_run_directory_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "outputs").write_text("a file")
    with pytest.raises(UsageError, match="outputs"):
        RunDirectory.create(tmp_path / "outputs", "chair-0")
    with pytest.raises(UsageError, match="has no config.yaml"):
        RunDirectory.open(tmp_path)


def test_metrics_log_and_config(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, "chair-0")
    run.write_config("prompt: chair\n")
    with run:
        logging.getLogger("uni3d.training").warning("step %d skipped", 3)
        run.log_metrics(1, {"loss": 0.5, "phase": "warm-up"})
        run.log_metrics(2, {"loss": math.nan})
    logging.getLogger("uni3d.training").warning("after the run")
    rows = [json.loads(line) for line in run.metrics_path.read_text().splitlines()]
    assert rows == [{"step": 1, "loss": 0.5, "phase": "warm-up"}, {"step": 2, "loss": None}]
    log = run.log_path.read_text()
    assert "step 3 skipped" in log and "after the run" not in log
    assert RunDirectory.open(run.path).config_path.read_text() == "prompt: chair\n"


def test_a_resumed_run_forgets_later_and_broken_lines(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, "chair-0")
    for step in range(1, 6):
        run.log_metrics(step, {"loss": step})
    with run.metrics_path.open("a") as stream:
        stream.write('{"step": 6, "lo')
    run.truncate_metrics(3)
    run.log_metrics(4, {"loss": -1})
    rows = [json.loads(line) for line in run.metrics_path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and rows[-1]["loss"] == -1


def test_progress_without_a_terminal_is_plain_lines() -> None:
    stream = io.StringIO()
    with Progress(100, start=40, label="field", stream=stream, line_interval_s=0.0) as progress:
        assert math.isnan(progress.remaining_s)
        progress.update(loss=0.123456)
        for _ in range(59):
            progress.update()
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("field: step 41/100, 0:00 elapsed, 0:0")
    assert lines[0].endswith("left, loss 0.1235")
    assert lines[-1].startswith("field: step 100/100") and "0:00 left" in lines[-1]
    assert "\r" not in stream.getvalue()


def test_the_last_step_is_always_said_and_quiet_says_nothing() -> None:
    stream = io.StringIO()
    with Progress(3, stream=stream, line_interval_s=1e9) as progress:
        for _ in range(3):
            progress.update()
    assert stream.getvalue().count("\n") == 1 and "step 3/3" in stream.getvalue()
    silent = io.StringIO()
    with Progress(3, stream=silent, quiet=True, line_interval_s=0.0) as progress:
        progress.update(3)
    assert silent.getvalue() == "" and progress.done == 3


def test_progress_on_a_terminal_is_a_bar() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with Progress(10, label="field", stream=stream) as progress:
        progress.update(10, loss=1.0)
    assert "field: 100%" in stream.getvalue()


def test_three_bad_steps_in_a_row_roll_back(caplog: pytest.LogCaptureFixture) -> None:
    guard = NonFiniteGuard(patience=3, max_rollbacks=2)
    good = {"loss": torch.tensor(1.0), "fake": None, "norm": 2.0}
    bad = {"loss": torch.tensor(1.0), "gradient": torch.tensor([1.0, float("nan")])}
    with caplog.at_level(logging.WARNING):
        verdicts = [guard.check(step, bad if step in (2, 3, 5, 6, 7) else good) for step in range(1, 9)]
    assert verdicts == ["ok", "skip", "skip", "ok", "skip", "skip", "rollback", "ok"]
    assert "step 2 skipped: gradient is not finite" in caplog.text and "rolling back" in caplog.text
    assert (guard.num_skipped, guard.num_rollbacks) == (5, 1)


def test_it_gives_up_after_too_many_rollbacks() -> None:
    guard = NonFiniteGuard(patience=1, max_rollbacks=2)
    assert guard.check(1, {"loss": math.inf}) == "rollback"
    assert guard.check(2, {"loss": math.inf}) == "rollback"
    with pytest.raises(TrainingDiverged, match="loss was not finite .* lower the learning rates"):
        guard.check(3, {"loss": math.inf})
