"""What the page says: words of visitors escaped, times as coarse as they are known, news only once."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from web_fixtures import ALICE, order, settings_in

from uni3d.web.jobs import JobStore
from uni3d.web.views import duration, estimate_text, gallery_html, notice_html, preview_html, status_html

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
    assert "Not measured" in estimate_text(store, "draft", "sds")
    for seconds in (30.0, 40.0, 500.0):
        job = store.submit(order(), ALICE)
        store.claim(job.id)
        store.report(job.id, add_seconds=seconds)
        store.finish(job.id, "done")
    assert "about 40 s" in estimate_text(store, "draft", "uni-instruct")
    assert "about 40 s" in estimate_text(store, "draft", "sds"), "the quality alone is known"
    assert "Not measured" in estimate_text(store, "default", "sds")
