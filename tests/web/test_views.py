"""What the page says: words of visitors escaped, times as coarse as they are known, news only once."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from web_fixtures import ALICE, order, settings_in

from uni3d.prompts import check_prompt
from uni3d.web.examples import EXAMPLE_FILES, examples_folder, load_examples
from uni3d.web.jobs import JobStore
from uni3d.web.speed import Estimates, read_trial
from uni3d.web.views import (
    duration,
    estimate_text,
    example_html,
    figures_html,
    gallery_html,
    notice_html,
    preview_html,
    result_html,
    status_html,
)

HOSTILE = "<img src=x onerror=alert(1)> \"'&"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "1 s"), (45.4, "45 s"), (89, "89 s"), (120, "2 min"), (12_000, "3 h 20 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_words_of_a_visitor_stay_words(tmp_path: Path) -> None:
    store = JobStore(settings_in(tmp_path))
    job = store.submit(order(HOSTILE), ALICE)
    failed = dataclasses.replace(job, state="failed", message=HOSTILE)
    done = dataclasses.replace(job, state="done")
    for html in (gallery_html([job, done]), status_html(failed), preview_html(done), notice_html(HOSTILE)):
        assert "<img src=x" not in html and "&lt;img" in html


def test_each_state_has_its_sentence(tmp_path: Path) -> None:
    store = JobStore(settings_in(tmp_path))
    job = store.submit(order(), ALICE)
    assert "Waiting: 2 jobs before this one." in status_html(job, 2)
    assert "Next in line." in status_html(job, 0)
    running = dataclasses.replace(
        job, state="running", phase="optimising", step=3, loss=0.25, seconds_left=4.0
    )
    assert "step 3 of 5, loss 0.25, about 4 s left" in status_html(running)
    assert "loss" not in status_html(dataclasses.replace(running, loss=None))
    assert "Cancelling" in status_html(dataclasses.replace(running, is_cancel_requested=1))
    assert "Cancelled at step 3 of 5." in status_html(dataclasses.replace(running, state="cancelled"))


def test_estimates_come_from_jobs_that_were_made(tmp_path: Path) -> None:
    store = JobStore(settings_in(tmp_path))
    estimates = Estimates(store)
    assert "being measured" in estimate_text(estimates.seconds("draft", "sds"))
    for seconds in (30.0, 40.0, 500.0):
        job = store.submit(order(), ALICE)
        store.claim(job.id)
        store.report(job.id, add_seconds=seconds)
        store.finish(job.id, "done")
    assert "about 40 s" in estimate_text(estimates.seconds("draft", "uni-instruct"))
    assert estimates.seconds("draft", "sds") == 40.0, "the quality alone is known"
    assert estimates.seconds("default", "sds") is None
    shorter = Estimates(JobStore(settings_in(tmp_path, max_steps=4)))
    assert shorter.seconds("draft", "sds") is None, "of jobs with fewer steps nothing is known"
    ahead = [store.submit(order(), ALICE) for _ in range(2)]
    store.claim(ahead[0].id)
    store.report(ahead[0].id, add_seconds=30.0)
    last = store.submit(order(), ALICE)
    assert estimates.wait(store.before(last)) == 50.0
    assert "Waiting: 2 jobs before this one, about 50 s." in status_html(last, 2, 50.0)


def test_a_long_queue_costs_no_more_than_its_kinds_of_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, asked = JobStore(settings_in(tmp_path)), []
    monkeypatch.setattr(store, "usual_seconds", lambda *kind: asked.append(kind) or 2.0)
    waiting = [store.submit(order(method=method), ALICE) for method in ("sds", "vsd", "sds", "vsd")]
    assert Estimates(store).wait(waiting) == 8.0
    assert len(asked) == 2


def test_before_the_first_job_trial_steps_tell(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    estimates = Estimates(JobStore(settings))
    speed = {"of": {"device": "auto", "teacher": "embedded", "max_steps": 5}, "seconds": {"draft": 9.0}}
    (tmp_path / "speed.json").write_text(json.dumps(speed))
    assert estimates.seconds("draft", "sds") == 9.0 and estimates.seconds("default", "sds") is None
    assert not read_trial(settings_in(tmp_path, max_steps=6)), "measured under other settings"
    (tmp_path / "speed.json").write_text("{")
    assert estimates.seconds("draft", "sds") is None


def test_the_report_says_what_was_checked_and_what_was_not() -> None:
    figures = {"triangles": 12, "closed": False, "problems": ["<b>a hole</b>"]}
    assert "not installed on this server" in figures_html({**figures, "gltf_validator": "not run: no node"})
    assert "not installed on this server" in figures_html(figures)
    assert "&lt;b&gt;a hole" in figures_html(figures)
    verdict = {"errors": 1, "warnings": 0, "messages": ["Invalid <x>"]}
    assert "1 error, 0 warnings; Invalid &lt;x&gt;" in figures_html({"gltf_validator": verdict})


def test_a_result_outlives_the_teacher_that_made_it(tmp_path: Path) -> None:
    settings = settings_in(tmp_path, teachers={"own": str(tmp_path)})
    store = JobStore(settings)
    job = dataclasses.replace(store.submit(order(teacher="own"), ALICE), state="done")
    store.folder(job.id).mkdir()
    (store.folder(job.id) / "report.json").write_text("{}")
    assert "uni3d generate" in result_html(store, job)
    without = JobStore(settings_in(tmp_path))
    assert "no longer offered" in result_html(without, job)


def test_examples_are_complete_or_left_out(tmp_path: Path) -> None:
    for name in ("1", "2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "example.json").write_text(json.dumps({"prompt": HOSTILE, "seed": 5}))
        (tmp_path / name / "report.json").write_text('{"triangles": 12}')
    for file in EXAMPLE_FILES:
        (tmp_path / "2" / file).touch()
    (example,) = load_examples(tmp_path)
    assert example.folder.name == "2" and example.order.seed == 5
    for html in example_html(example, settings_in(tmp_path)):
        assert "<img src=x" not in html


def test_the_examples_that_come_along_are_whole() -> None:
    examples = load_examples(examples_folder())
    assert len(examples) >= 12
    for example in examples:
        assert check_prompt(example.order.prompt) == example.order.prompt
        assert (example.folder / "mesh.glb").read_bytes()[:4] == b"glTF"
        assert example.report["closed"] and example.report["triangles"] > 1000
