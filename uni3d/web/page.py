"""The page: order a mesh, watch it grow, take it away; earlier jobs; two methods side by side.

The server keeps nothing about an open page. Which job is shown stands in a hidden text field of the page, and
a timer asks the store how that job is; so a reload, a lost connection or a restarted server changes nothing.
"""

from __future__ import annotations

import random
import secrets
from dataclasses import dataclass
from typing import Any

from uni3d.config import TextTo3DConfig
from uni3d.config_values import DIVERGENCE_NAMES
from uni3d.errors import MissingPackageError, Uni3DError, UsageError
from uni3d.presets import PRESET_FILES
from uni3d.web import views
from uni3d.web.access import visitor_from
from uni3d.web.examples import Example, example_prompts
from uni3d.web.job_queue import JobQueue
from uni3d.web.jobs import Job, JobStore
from uni3d.web.orders import MAX_SEED_ON_PAGE, METHODS, METHODS_WITH_DIVERGENCE, Order, check_order

try:
    import gradio as gr
except ImportError as error:
    raise MissingPackageError('the web page needs gradio: pip install "uni3d[demo]"') from error

POLL_INTERVAL_S = 1.0
OWN_DIVERGENCE = "the method's own"
QUALITY_NAMES = {"draft": "Draft (coarse, fast)", "default": "Default (finer, slower)"}
SHOW_IN_ADDRESS = "(id) => { history.replaceState(null, '', id ? '?job=' + encodeURIComponent(id) : '.') }"
GREETING = """# uni3d
Say what to make, and a textured 3D mesh grows from noise while you watch. Jobs run one after the other on
this machine; you may close the page and come back."""


@dataclass(frozen=True)
class Panel:
    """The parts of the page that show one job. `seen` tells what they show, so that only news are sent."""

    job_id: Any
    seen: Any
    status: Any
    preview: Any
    model: Any
    result: Any

    @property
    def inputs(self) -> list[Any]:
        """What a handler is told about the panel."""
        return [self.job_id, self.seen]

    @property
    def outputs(self) -> list[Any]:
        """What `Desk.panel` fills."""
        return [self.job_id, self.seen, self.status, self.preview, self.model, self.result]


class Desk:
    """Answers the events of the page. Each takes the visitor from the request, never from the page."""

    def __init__(self, store: JobStore, queue: JobQueue) -> None:
        self.store = store
        self.queue = queue

    def visitor(self, request: gr.Request) -> str:
        """Who asks; an error on the page for a browser without cookies."""
        visitor = visitor_from(request.headers)
        if visitor is None:
            raise gr.Error("this page needs a cookie to know which jobs are yours; allow it and reload")
        return visitor

    def order(self, visitor: str, order: Order, pair: str | None = None) -> Job:
        """Check an order and put it in line; UsageError for what is wrong with it."""
        job = self.store.submit(check_order(order, self.store.settings), visitor, pair=pair)
        self.queue.add(job.id)
        return job

    def order_two(
        self, visitor: str, prompt: Any, seed: Any, methods: tuple[Any, Any], quality: Any
    ) -> list[Job]:
        """Order the same by two methods: both or, with UsageError, neither."""
        if methods[0] == methods[1]:
            raise UsageError("both methods are the same; choose two")
        pair = secrets.token_urlsafe(24)
        jobs: list[Job] = []
        try:
            for method in methods:
                order = Order(
                    prompt=_text(prompt),
                    method=_text(method),
                    seed=_seed(seed),
                    quality=_text(quality),
                    teacher=next(iter(self.store.settings.teachers)),
                )
                jobs.append(self.order(visitor, order, pair))
        except Uni3DError:
            for job in jobs:
                self.store.cancel(job.id, visitor)
            raise
        return jobs

    def panel(self, job_id: str, seen: str, visitor: str) -> list[Any]:
        """Values for the outputs of a panel: what has changed since `seen`."""
        job = self.find(job_id, visitor)
        position = self.store.position(job) if job is not None and job.state == "queued" else 0
        now, seen = _mark(job, position), str(seen or "")
        if now == seen:
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
            views.status_html(job, position),
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


def build_page(store: JobStore, queue: JobQueue, examples: list[Example]) -> Any:
    """The Gradio page over a store and its queue."""
    desk = Desk(store, queue)
    with gr.Blocks(title="uni3d", analytics_enabled=False) as page:
        gr.Markdown(GREETING)
        with gr.Tabs():
            with gr.Tab("Create"):
                _build_create(page, desk, examples)
            with gr.Tab("Compare two methods"):
                _build_compare(page, desk)
            with gr.Tab("Your jobs") as tab:
                gallery = gr.HTML(views.gallery_html([]))

                def show_gallery(request: gr.Request) -> str:
                    return views.gallery_html(desk.store.jobs_of(desk.visitor(request)))

                tab.select(show_gallery, None, gallery, queue=False, api_name="gallery")
    return page


def theme() -> Any:
    """Gradio's look with the fonts of the reader's own system, so that nothing is fetched elsewhere."""
    return gr.themes.Soft(  # pyright: ignore[reportPrivateImportUsage]
        primary_hue="indigo",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )


def _build_panel(name: str) -> Panel:
    status = gr.HTML(views.status_html(None), elem_id=f"{name}-status")
    preview = gr.HTML("", elem_id=f"{name}-preview")
    model = gr.Model3D(
        label="Mesh (drag to turn)",
        display_mode="solid",
        clear_color=(0.93, 0.93, 0.93, 1.0),
        interactive=False,
        height=380,
        elem_classes="u3-model",
        elem_id=f"{name}-model",
    )
    result = gr.HTML("", elem_id=f"{name}-result")
    job_id = gr.Textbox("", visible="hidden", elem_id=f"{name}-job", label="job")
    seen = gr.Textbox("", visible="hidden", label="seen")
    return Panel(job_id, seen, status, preview, model, result)


@dataclass(frozen=True)
class OrderForm:
    """The fields of an order, in the order of `Desk` handlers."""

    prompt: Any
    negative: Any
    method: Any
    divergence: Any
    teacher: Any
    seed: Any
    is_random: Any
    quality: Any

    @property
    def fields(self) -> list[Any]:
        """The components."""
        return [
            self.prompt,
            self.negative,
            self.method,
            self.divergence,
            self.teacher,
            self.seed,
            self.is_random,
            self.quality,
        ]


def _build_form(desk: Desk) -> OrderForm:
    teachers = list(desk.store.settings.teachers)
    prompt = gr.Textbox(
        label="What to make", placeholder="a red wooden chair", max_length=1024, lines=2, autofocus=True
    )
    quality = gr.Radio(
        [(QUALITY_NAMES.get(name, name), name) for name in reversed(PRESET_FILES)],
        value="draft",
        label="Quality",
    )
    with gr.Row():
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED_ON_PAGE, min_width=120)
        is_random = gr.Checkbox(True, label="New seed each time", min_width=120)
    with gr.Accordion("Method, teacher and what to avoid", open=False):
        method = gr.Dropdown(
            [(f"{name}: {purpose}", name) for name, purpose in METHODS.items()],
            value=TextTo3DConfig.method,
            label="Method",
        )
        divergence = gr.Dropdown(
            [OWN_DIVERGENCE, *DIVERGENCE_NAMES], value=OWN_DIVERGENCE, label="Divergence"
        )
        teacher = gr.Dropdown(teachers, value=teachers[0], label="Teacher")
        negative = gr.Textbox(label="What it should not look like", max_length=1024)
    method.change(
        lambda name: gr.Dropdown(interactive=name in METHODS_WITH_DIVERGENCE),
        method,
        divergence,
        queue=False,
        show_progress="hidden",
        api_visibility="private",
    )
    return OrderForm(prompt, negative, method, divergence, teacher, seed, is_random, quality)


def _read_form(
    prompt: str,
    negative: str,
    method: str,
    divergence: str,
    teacher: str,
    seed: float | None,
    is_random: bool,
    quality: str,
) -> Order:
    chosen = random.SystemRandom().randint(0, MAX_SEED_ON_PAGE) if is_random else _seed(seed)
    return Order(
        prompt=_text(prompt),
        negative_prompt=_text(negative),
        method=_text(method),
        divergence=None if divergence in (OWN_DIVERGENCE, None) else _text(divergence),
        teacher=_text(teacher),
        seed=chosen,
        quality=_text(quality),
    )


def _text(value: Any) -> str:
    """A text field of a request, which may hold anything that JSON can say; an empty one is null."""
    if value is not None and not isinstance(value, str):
        raise UsageError("a field of the page held something that is no text; reload the page")
    return value or ""


def _seed(value: Any) -> int:
    """A whole number of a request; -1, which is refused later, for what is none."""
    if value is None:
        return 0
    return int(value) if isinstance(value, int | float) and abs(value) < 2**62 else -1


def _build_create(page: Any, desk: Desk, examples: list[Example]) -> None:
    with gr.Row(equal_height=False):
        with gr.Column(scale=4, min_width=300, elem_classes="u3-left"):
            form = _build_form(desk)
            estimate = gr.Markdown(elem_classes="u3-small")
            with gr.Row():
                start = gr.Button("Generate", variant="primary", elem_id="generate")
                cancel = gr.Button("Cancel", variant="stop", interactive=False, elem_id="cancel")
            notice = gr.HTML("", elem_id="notice")
            place = gr.Column(elem_classes="u3-examples")
        with gr.Column(scale=6, min_width=300, elem_classes="u3-shown"):
            panel = _build_panel("create")
    with place:
        _build_examples(form, panel, examples)
    timer = gr.Timer(POLL_INTERVAL_S, active=False)

    def followed(visitor: str, job_id: str, seen: str) -> list[Any]:
        """The panel, the cancel button and the timer."""
        is_waiting = desk.is_waiting(job_id, visitor)
        values = desk.panel(job_id, seen, visitor)
        return [*values, gr.Button(interactive=is_waiting), gr.Timer(active=is_waiting)]

    followers = [*panel.outputs, cancel, timer]

    def submit(
        prompt: str,
        negative: str,
        method: str,
        divergence: str,
        teacher: str,
        seed: float | None,
        is_random: bool,
        quality: str,
        request: gr.Request,
    ) -> list[Any]:
        visitor = desk.visitor(request)
        try:
            order = _read_form(prompt, negative, method, divergence, teacher, seed, is_random, quality)
            job = desk.order(visitor, order)
        except Uni3DError as error:
            return [views.notice_html(str(error)), *[gr.skip()] * (1 + len(followers))]
        return ["", job.seed, *followed(visitor, job.id, "")]

    def progress(job_id: str, seen: str, request: gr.Request) -> list[Any]:
        return followed(desk.visitor(request), job_id, seen)

    def cancel_job(job_id: str, seen: str, request: gr.Request) -> list[Any]:
        visitor = desk.visitor(request)
        desk.cancel(job_id, visitor)
        return followed(visitor, job_id, seen)

    def opened(quality: str, method: str, request: gr.Request) -> list[Any]:
        visitor = desk.visitor(request)
        wanted, missing = str(request.query_params.get("job", "")), ""
        if not wanted:
            latest = [job for job in desk.store.jobs_of(visitor, limit=20) if job.pair is None]
            wanted = latest[0].id if latest and not latest[0].is_finished else ""
        elif desk.store.find(wanted, visitor) is None:
            missing = "there is no such job in this browser; it may have been removed to make room"
        job = desk.find(wanted, visitor)
        if job is None:
            filled: list[Any] = [gr.skip()] * len(form.fields)
        else:
            divergence = job.divergence or OWN_DIVERGENCE
            filled = [job.prompt, job.negative_prompt, job.method, divergence, job.teacher]
            filled += [job.seed, gr.skip(), job.quality]
        return [
            views.notice_html(missing),
            views.estimate_text(desk.store, quality, method),
            *filled,
            *followed(visitor, wanted, ""),
        ]

    def estimated(quality: str, method: str) -> str:
        return views.estimate_text(desk.store, quality, method)

    quiet: dict[str, Any] = {"queue": False, "show_progress": "hidden"}
    gr.on(
        [start.click, form.prompt.submit],
        submit,
        form.fields,
        [notice, form.seed, *followers],
        queue=False,
        api_name="submit",
    ).success(None, panel.job_id, None, js=SHOW_IN_ADDRESS)
    timer.tick(progress, panel.inputs, followers, api_name="progress", **quiet)
    cancel.click(cancel_job, panel.inputs, followers, api_name="cancel", **quiet)
    page.load(
        opened,
        [form.quality, form.method],
        [notice, estimate, *form.fields, *followers],
        api_name="opened",
        **quiet,
    )
    gr.on(
        [form.quality.change, form.method.change, panel.result.change],
        estimated,
        [form.quality, form.method],
        estimate,
        api_visibility="private",
        **quiet,
    )


def _build_examples(form: OrderForm, panel: Panel, examples: list[Example]) -> None:
    """Finished results at a click, or prompts where this installation has no results."""
    if not examples:
        gr.Examples(
            [[prompt] for prompt in example_prompts()], form.prompt, label="For example", examples_per_page=12
        )
        return
    gallery = gr.Gallery(
        [(str(example.folder / "preview.png"), example.order.prompt) for example in examples],
        label="Finished examples",
        columns=3,
        height="auto",
        allow_preview=False,
        object_fit="contain",
        elem_id="examples",
    )

    def show(event: gr.SelectData) -> list[Any]:
        example = examples[int(event.index)]
        order = example.order
        text = f"A finished example: {order.prompt}, {order.method}, {order.quality}, seed {order.seed}."
        return [
            order.prompt,
            order.method,
            order.seed,
            False,
            order.quality,
            "",
            "example",
            f'<div class="u3-status"><p role="status">{text}</p></div>',
            "",
            str(example.folder / "mesh.glb"),
            "",
        ]

    fields = [form.prompt, form.method, form.seed, form.is_random, form.quality]
    gallery.select(show, None, [*fields, *panel.outputs], queue=False, api_visibility="private")


def _build_compare(page: Any, desk: Desk) -> None:
    gr.Markdown("The same prompt and seed by two methods, side by side.")
    with gr.Row():
        prompt = gr.Textbox(label="What to make", max_length=1024, scale=3, elem_id="compare-prompt")
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED_ON_PAGE, min_width=100)
    with gr.Row():
        choices = list(METHODS)
        left = gr.Dropdown(choices, value="uni-instruct", label="First method", min_width=140)
        right = gr.Dropdown(choices, value="sds", label="Second method", min_width=140)
        quality = gr.Radio(list(reversed(PRESET_FILES)), value="draft", label="Quality", min_width=140)
    with gr.Row():
        start = gr.Button("Compare", variant="primary", elem_id="compare")
        cancel = gr.Button("Cancel both", variant="stop", interactive=False)
    notice = gr.HTML("", elem_id="compare-notice")
    with gr.Row(equal_height=False):
        panels = []
        for name in ("left", "right"):
            with gr.Column(min_width=280):
                panels.append(_build_panel(name))
    timer = gr.Timer(POLL_INTERVAL_S, active=False)
    outputs = [*panels[0].outputs, *panels[1].outputs, cancel, timer]
    inputs = [*panels[0].inputs, *panels[1].inputs]

    def followed(visitor: str, first: str, first_seen: str, second: str, second_seen: str) -> list[Any]:
        is_waiting = desk.is_waiting(first, visitor) or desk.is_waiting(second, visitor)
        return [
            *desk.panel(first, first_seen, visitor),
            *desk.panel(second, second_seen, visitor),
            gr.Button(interactive=is_waiting),
            gr.Timer(active=is_waiting),
        ]

    def submit(
        prompt: str, seed: float | None, left: str, right: str, quality: str, request: gr.Request
    ) -> list[Any]:
        visitor = desk.visitor(request)
        try:
            jobs = desk.order_two(visitor, prompt, seed, (left, right), quality)
        except Uni3DError as error:
            return [views.notice_html(str(error)), *[gr.skip()] * len(outputs)]
        return ["", *followed(visitor, jobs[0].id, "", jobs[1].id, "")]

    def progress(
        first: str, first_seen: str, second: str, second_seen: str, request: gr.Request
    ) -> list[Any]:
        return followed(desk.visitor(request), first, first_seen, second, second_seen)

    def cancel_both(
        first: str, first_seen: str, second: str, second_seen: str, request: gr.Request
    ) -> list[Any]:
        visitor = desk.visitor(request)
        for job_id in (first, second):
            desk.cancel(job_id, visitor)
        return followed(visitor, first, first_seen, second, second_seen)

    def opened(request: gr.Request) -> list[Any]:
        visitor = desk.visitor(request)
        latest = next((job for job in desk.store.jobs_of(visitor) if job.pair is not None), None)
        jobs = desk.store.pair_of(latest.pair, visitor) if latest is not None and latest.pair else []
        first, second = (jobs[0].id, jobs[1].id) if len(jobs) == 2 else ("", "")
        return followed(visitor, first, "", second, "")

    quiet: dict[str, Any] = {"queue": False, "show_progress": "hidden"}
    start.click(
        submit, [prompt, seed, left, right, quality], [notice, *outputs], queue=False, api_name="compare"
    )
    timer.tick(progress, inputs, outputs, api_name="progress_of_two", **quiet)
    cancel.click(cancel_both, inputs, outputs, api_name="cancel_both", **quiet)
    page.load(opened, None, outputs, api_visibility="private", **quiet)
