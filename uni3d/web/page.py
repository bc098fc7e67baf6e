"""The page: order a mesh, watch it grow, take it away; earlier jobs; two methods side by side.

The server keeps nothing about an open page. Which job is shown stands in a hidden text field of the page, and
a timer asks the store how that job is; so a reload, a lost connection or a restarted server changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import gradio as gr

from uni3d.config.presets import PRESET_FILES
from uni3d.config.text_to_3d import TextTo3DConfig
from uni3d.config.values import DIVERGENCE_NAMES
from uni3d.errors import Uni3DError, UsageError
from uni3d.prompts import MAX_PROMPT_LENGTH
from uni3d.web import views
from uni3d.web.desk import EXAMPLE, OWN_DIVERGENCE, Desk, read_order, seed_of, text_of
from uni3d.web.examples import EXAMPLE_PROMPTS, Example
from uni3d.web.first_screen import PURPOSE
from uni3d.web.job_queue import JobQueue
from uni3d.web.jobs import JobStore
from uni3d.web.orders import MAX_SEED_ON_PAGE, METHODS, METHODS_WITH_DIVERGENCE, Order
from uni3d.web.settings import WebSettings

POLL_INTERVAL_S = 1.0
ESTIMATE_INTERVAL_S = 10.0
QUALITY_NAMES = {"draft": "Draft (coarse, fast)", "default": "Default (finer, slower)"}
QUALITY_CHOICES = [(QUALITY_NAMES.get(name, name), name) for name in reversed(PRESET_FILES)]
SHOW_IN_ADDRESS = "(id) => { history.replaceState(null, '', id ? '?job=' + encodeURIComponent(id) : '.') }"
GREETING = f"""# uni3d
{PURPOSE} Jobs run one after the other on this machine; you may close the page and come back."""
KNOWN = "One object. The teacher that comes with uni3d knows 286 kinds: furniture, plants, cars, vases ..."
# The second click of a double click, and a key that is held down, order nothing.
ONE_CLICK = """<script>
document.addEventListener("click", (event) => {
  if (event.detail > 1 && event.target.closest("#generate, #compare")) event.stopImmediatePropagation();
}, true);
document.addEventListener("keydown", (event) => {
  if (event.repeat && event.key === "Enter") { event.preventDefault(); event.stopImmediatePropagation(); }
}, true);
</script>"""


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


def build_page(store: JobStore, queue: JobQueue, examples: list[Example]) -> Any:
    """The Gradio page over a store and its queue."""
    desk = Desk(store, queue)
    with gr.Blocks(title="uni3d", analytics_enabled=False) as page:
        gr.Markdown(GREETING)
        with gr.Tabs():
            with gr.Tab("Create"):
                _build_create(page, desk, examples)
            with gr.Tab("Compare"):
                _build_compare(page, desk)
            with gr.Tab("Your jobs") as tab:
                gallery = gr.HTML(views.gallery_html([]), padding=False)

                def show_gallery(request: gr.Request) -> str:
                    return views.gallery_html(desk.store.jobs_of(desk.visitor(request)))

                tab.select(show_gallery, None, gallery, queue=False, api_name="gallery")
    return page


def theme() -> Any:
    """Gradio's look with the fonts of the reader's own system, so that nothing is fetched elsewhere, and
    with more contrast."""
    look = gr.themes.Soft(  # pyright: ignore[reportPrivateImportUsage]
        primary_hue="indigo",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    return look.set(
        background_fill_primary="*neutral_50",
        block_title_text_color="*primary_800",
        block_label_text_color="*primary_800",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        input_border_width="1px",
        input_border_color="*neutral_400",
        input_border_color_dark="*neutral_500",
        checkbox_border_color="*neutral_500",
        checkbox_border_color_dark="*neutral_400",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_600",
    )


def _build_panel(name: str) -> Panel:
    status = gr.HTML(views.status_html(None), elem_id=f"{name}-status", padding=False)
    preview = gr.HTML("", elem_id=f"{name}-preview", padding=False)
    model = gr.Model3D(
        label="Mesh (drag to turn)",
        display_mode="solid",
        clear_color=(0.93, 0.93, 0.93, 1.0),
        interactive=False,
        height=380,
        elem_classes="u3-model",
        elem_id=f"{name}-model",
    )
    result = gr.HTML("", elem_id=f"{name}-result", padding=False)
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
        label="What to make",
        info=KNOWN if "embedded" in teachers else None,
        placeholder="a red wooden chair",
        max_length=MAX_PROMPT_LENGTH,
        lines=1,  # so that Enter starts
        max_lines=4,
        autofocus=True,
    )
    quality = gr.Radio(QUALITY_CHOICES, value="draft", label="Quality")
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
        negative = gr.Textbox(label="What it should not look like", max_length=MAX_PROMPT_LENGTH)
    method.change(
        lambda name: gr.Dropdown(interactive=name in METHODS_WITH_DIVERGENCE),
        method,
        divergence,
        queue=False,
        show_progress="hidden",
        api_visibility="private",
    )
    return OrderForm(prompt, negative, method, divergence, teacher, seed, is_random, quality)


def _build_create(page: Any, desk: Desk, examples: list[Example]) -> None:
    with gr.Row(equal_height=False):
        with gr.Column(scale=4, min_width=300, elem_classes="u3-left"):
            form = _build_form(desk)
            estimate = gr.Markdown(elem_classes="u3-small")
            with gr.Row():
                start = gr.Button("Generate", variant="primary", elem_id="generate")
                cancel = gr.Button("Cancel", variant="stop", interactive=False, elem_id="cancel")
            notice = gr.HTML("", elem_id="notice", padding=False)
            place = gr.Column(elem_classes="u3-examples")
        with gr.Column(scale=6, min_width=300, elem_classes="u3-shown"):
            panel = _build_panel("create")
    timer = gr.Timer(POLL_INTERVAL_S, active=False)
    with place:
        _build_examples(desk, form, panel, examples, [cancel, timer])
    patience = gr.Timer(ESTIMATE_INTERVAL_S)

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
            order = read_order(prompt, negative, method, divergence, teacher, seed, is_random, quality)
            job = desk.order(request, order)
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
            *estimated(quality, method),
            *filled,
            *followed(visitor, wanted, ""),
        ]

    def estimated(quality: str, method: str) -> list[Any]:
        """The words, and whether to ask again."""
        try:
            seconds = desk.estimates.seconds(text_of(quality), text_of(method))
        except Uni3DError:
            seconds = None
        return [views.estimate_text(seconds), gr.Timer(active=seconds is None)]

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
        [notice, estimate, patience, *form.fields, *followers],
        api_name="opened",
        **quiet,
    )
    gr.on(
        [form.quality.change, form.method.change, panel.result.change, patience.tick],
        estimated,
        [form.quality, form.method],
        [estimate, patience],
        api_visibility="private",
        **quiet,
    )


def _build_examples(
    desk: Desk, form: OrderForm, panel: Panel, examples: list[Example], following: list[Any]
) -> None:
    """Finished results at a click, or prompts where this installation has no results.

    `following` are the cancel button and the timer: an example leaves the job that was shown to itself.
    """
    if not examples:
        prompts = [[prompt] for prompt in EXAMPLE_PROMPTS]
        gr.Examples(prompts, form.prompt, label="For example", examples_per_page=len(prompts))
        return
    gr.Markdown("**Finished examples**")
    outputs = [*form.fields, *panel.outputs, *following]
    with gr.Row(elem_classes="u3-examples-grid"):
        for example in examples:
            button = gr.Button(
                example.order.prompt,
                icon=str(example.folder / "front.jpg"),
                min_width=0,
                elem_classes="u3-example",
            )
            button.click(
                partial(_example_values, example, desk.store.settings),
                None,
                outputs,
                queue=False,
                show_progress="hidden",
                api_visibility="private",
            ).success(None, panel.job_id, None, js=SHOW_IN_ADDRESS)


def _example_values(example: Example, settings: WebSettings) -> list[Any]:
    """What a click on an example puts into the form, the panel, the cancel button and the timer."""
    order = example.order
    status, sheet, result = views.example_html(example, settings)
    return [
        *(order.prompt, order.negative_prompt, order.method, order.divergence or OWN_DIVERGENCE),
        *(order.teacher if order.teacher in settings.teachers else gr.skip(), order.seed),
        *(False, order.quality),
        *("", EXAMPLE, status, sheet, str(example.folder / "mesh.glb"), result),
        gr.Button(interactive=False),
        gr.Timer(active=False),
    ]


def _build_compare(page: Any, desk: Desk) -> None:
    gr.Markdown("The same prompt and seed by two methods, side by side.")
    with gr.Row():
        prompt = gr.Textbox(
            label="What to make",
            placeholder="a red wooden chair",
            max_length=MAX_PROMPT_LENGTH,
            scale=3,
            elem_id="compare-prompt",
        )
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED_ON_PAGE, min_width=100)
    with gr.Row():
        choices = list(METHODS)
        left = gr.Dropdown(choices, value="uni-instruct", label="First method", min_width=140)
        right = gr.Dropdown(choices, value="sds", label="Second method", min_width=140)
        quality = gr.Radio(QUALITY_CHOICES, value="draft", label="Quality", min_width=140)
    with gr.Row():
        start = gr.Button("Compare", variant="primary", elem_id="compare")
        cancel = gr.Button("Cancel both", variant="stop", interactive=False)
    notice = gr.HTML("", elem_id="compare-notice", padding=False)
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
            if left == right:
                raise UsageError("both methods are the same; choose two")
            teacher = next(iter(desk.store.settings.teachers))
            rest: dict[str, Any] = {"seed": seed_of(seed), "quality": text_of(quality), "teacher": teacher}
            orders = [
                Order(prompt=text_of(prompt), method=text_of(method), **rest) for method in (left, right)
            ]
            jobs = desk.order_all(request, orders)
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
