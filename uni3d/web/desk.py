"""What the events of the page ask and do: order, look, cancel, each for the visitor of the request alone."""

from __future__ import annotations

import random
import secrets
from collections.abc import Sequence
from typing import Any

import gradio as gr

from uni3d.errors import Uni3DError, UsageError
from uni3d.web import views
from uni3d.web.access import address_of, visitor_from
from uni3d.web.job_queue import JobQueue
from uni3d.web.jobs import Job, JobStore
from uni3d.web.orders import MAX_SEED_ON_PAGE, Order, check_order
from uni3d.web.speed import Estimates

OWN_DIVERGENCE = "the method's own"
EXAMPLE = "example"  # what a panel has seen that shows a finished example


class Desk:
    """Answers the events of the page. Each takes the visitor from the request, never from the page."""

    def __init__(self, store: JobStore, queue: JobQueue) -> None:
        self.store = store
        self.queue = queue
        self.estimates = Estimates(store)

    def visitor(self, request: gr.Request) -> str:
        """Who asks; an error on the page for a browser without cookies."""
        visitor = visitor_from(request.headers)
        if visitor is None:
            raise gr.Error("this page needs a cookie to know which jobs are yours; allow it and reload")
        return visitor

    def order(self, request: gr.Request, order: Order, pair: str | None = None) -> Job:
        """Check an order and put it in line; UsageError for what is wrong with it."""
        job = self.store.submit(
            check_order(order, self.store.settings),
            self.visitor(request),
            pair=pair,
            address=address_of(request.client),
        )
        self.queue.add(job.id)
        return job

    def order_all(self, request: gr.Request, orders: Sequence[Order]) -> list[Job]:
        """Order what belongs together: all of it or, with UsageError, nothing."""
        visitor = self.visitor(request)
        pair = secrets.token_urlsafe(24)
        jobs: list[Job] = []
        try:
            for order in orders:
                jobs.append(self.order(request, order, pair))
        except Uni3DError:
            for job in jobs:
                self.store.cancel(job.id, visitor)
            raise
        return jobs

    def panel(self, job_id: str, seen: str, visitor: str) -> list[Any]:
        """Values for the outputs of a panel: what has changed since `seen`."""
        job = self.find(job_id, visitor)
        before = self.store.before(job) if job is not None and job.state == "queued" else []
        position, seen = len(before), str(seen or "")
        now = _mark(job, position)
        if now == seen or (job is None and seen == EXAMPLE):
            return [gr.skip()] * 6
        had_model, has_model = seen.endswith("/done"), now.endswith("/done")
        model: Any = gr.skip()
        if job is not None and has_model:
            file = self.store.folder(job.id) / "mesh.glb"
            model = str(file) if file.is_file() else None
        elif had_model or not seen:
            model = None
        return [
            "" if job is None else job.id,
            now,
            views.status_html(job, position, self.estimates.wait(before) if before else None),
            views.preview_html(job),
            model,
            views.result_html(self.store, job) if has_model or had_model or not seen else gr.skip(),
        ]

    def is_waiting(self, job_id: str, visitor: str) -> bool:
        """Whether there will be news of the job."""
        job = self.find(job_id, visitor)
        return job is not None and not job.is_finished

    def find(self, job_id: Any, visitor: str) -> Job | None:
        """The job of this visitor that a page names, whatever a request has put in that place."""
        return self.store.find(job_id, visitor) if isinstance(job_id, str) and job_id else None

    def cancel(self, job_id: Any, visitor: str) -> None:
        """Cancel the job of this visitor that a page names."""
        if (job := self.find(job_id, visitor)) is not None:
            self.store.cancel(job.id, visitor)


def _mark(job: Job | None, position: int) -> str:
    if job is None:
        return "none"
    numbers = (job.id, job.phase, job.step, job.num_previews, job.is_cancel_requested, position, job.state)
    return "/".join(str(number) for number in numbers)


def read_order(
    prompt: str,
    negative: str,
    method: str,
    divergence: str,
    teacher: str,
    seed: float | None,
    is_random: bool,
    quality: str,
) -> Order:
    chosen = random.SystemRandom().randint(0, MAX_SEED_ON_PAGE) if is_random else seed_of(seed)
    return Order(
        prompt=text_of(prompt),
        negative_prompt=text_of(negative),
        method=text_of(method),
        divergence=None if divergence in (OWN_DIVERGENCE, None) else text_of(divergence),
        teacher=text_of(teacher),
        seed=chosen,
        quality=text_of(quality),
    )


def text_of(value: Any) -> str:
    """A text field of a request, which may hold anything that JSON can say; an empty one is null."""
    if value is not None and not isinstance(value, str):
        raise UsageError("a field of the page held something that is no text; reload the page")
    return value or ""


def seed_of(value: Any) -> int:
    """A whole number of a request; -1, which is refused later, for what is none."""
    if value is None:
        return 0
    return int(value) if isinstance(value, int | float) and abs(value) < 2**62 else -1
