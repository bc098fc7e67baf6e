"""PROGRAM 1: a prompt becomes a textured mesh.

    pipe = TextTo3DPipeline.from_pretrained("embedded")
    pipe("a red wooden chair", seed=0).save("chair.glb")

`generate` is the same as one command with everything around it: a run directory, progress, checkpoints,
signals,
resume. The rooms are composed here from left to right, and only here.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shlex
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import uni3d
from uni3d.config.loader import config_to_dict, config_to_yaml, load_config
from uni3d.config.presets import quality_preset
from uni3d.config.refine import Part, RefineConfig
from uni3d.config.stages import TextureConfig
from uni3d.config.text_to_3d import TextTo3DConfig
from uni3d.data.captions import read_vocabulary, unknown_prompt_warning
from uni3d.diffusion.latent_teacher import LatentDiffusionTeacher
from uni3d.errors import Interrupted, Uni3DError, UsageError
from uni3d.mesh.export import write_mesh
from uni3d.mesh.renderable import RenderableMesh
from uni3d.mesh.report import compare_with_field, mesh_report
from uni3d.mesh.texture import bake_surface_colours
from uni3d.mesh.textured_mesh import TexturedMesh
from uni3d.mesh.turntable import render_mesh, write_preview, write_turntable
from uni3d.outputs import check_output_file
from uni3d.prompts import check_prompt, prompt_slug
from uni3d.resources import weights_folder
from uni3d.scene.camera import ring_cameras
from uni3d.scene.regularisers import fog_fraction
from uni3d.scene.renderer import RenderOutput
from uni3d.text_to_3d.memory import RUNGS, fitted
from uni3d.text_to_3d.network_setup import EMBEDDED, load_fake_base, load_teacher
from uni3d.text_to_3d.scene_optimiser import choose_backends, resolve_recipe, stage_recipe
from uni3d.text_to_3d.stages import make_optimiser
from uni3d.text_to_3d.step_loop import MemoryStore, RunOptimiser, take_steps
from uni3d.training.checkpoint import CheckpointStore, atomic_write, atomic_write_json
from uni3d.training.run_log import Progress, RunDirectory
from uni3d.training.stop import StopFlag

if TYPE_CHECKING:
    from uni3d.text_to_3d.refine import RefineResult

logger = logging.getLogger(__name__)

COMPARISON_SIZE = 128
# Settings that may differ between the runs that share checkpoints.
_HOW_IT_IS_COMPUTED = (
    ("renderer", "backend"),
    ("renderer", "max_samples"),
    ("field", "encoding_backend"),
    ("networks", "compile"),
)
COMPARISON_VIEWS = 8
NEUTRAL_GREY = 0.5


@dataclass
class TextTo3DResult:
    """What one prompt became.

    Attributes:
        mesh: textured, Y up, in scene coordinates; `save` fits it into the unit box.
        config: the settings that reproduce it.
        report: figures about mesh and run, JSON-able.
        seconds: wall-clock time by stage.
    """

    mesh: TexturedMesh
    config: TextTo3DConfig
    report: dict[str, Any]
    seconds: dict[str, float] = field(default_factory=dict)

    def save(self, path: str | Path) -> Path:
        """Write the mesh; .glb, .obj, .ply, .stl or .usdz by the suffix. Returns the path."""
        return write_mesh(self.mesh, Path(path), extras=provenance(self.config))


@dataclass(frozen=True)
class GenerateResult:
    """Where `generate` put things; `as_dict` is what `--json` prints."""

    output: Path
    run_directory: Path
    report: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {"output": str(self.output), "run_directory": str(self.run_directory), **self.report}


class TextTo3DPipeline:
    """Text to textured mesh by score distillation, with the call conventions of diffusers."""

    def __init__(self, teacher: LatentDiffusionTeacher) -> None:
        self.teacher = teacher

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path = EMBEDDED,
        *,
        device: str = "auto",
        torch_dtype: torch.dtype = torch.float32,
    ) -> TextTo3DPipeline:
        """Load a teacher: "embedded", a hub id, or a directory in the diffusers layout; see
        `LatentDiffusionTeacher`."""
        source = weights_folder("teacher") if str(name_or_path) == EMBEDDED else name_or_path
        chosen, _ = choose_device(device)
        return cls(LatentDiffusionTeacher.from_pretrained(source, device=chosen, dtype=torch_dtype))

    def __call__(
        self,
        prompt: str,
        *,
        negative_prompt: str = "",
        seed: int = 0,
        num_steps: int | None = None,
        method: str | None = None,
        config: TextTo3DConfig | None = None,
        callback_on_step_end: Callable[[int, Mapping[str, float]], object] | None = None,
    ) -> TextTo3DResult:
        """Make a mesh of `prompt`.

        Args:
            config: settings to start from; the defaults otherwise. The other arguments win over it.
            callback_on_step_end: called with the step's index and its numbers; returning False stops early.

        Steps whose gradients are not finite are skipped; after three in a row the run goes back to the last
        state that was kept. Raises TrainingDiverged if that does not help.
        """
        changes: dict[str, Any] = {
            "prompt": check_prompt(prompt),
            "negative_prompt": negative_prompt,
            "seed": seed,
        }
        if num_steps is not None:
            changes["steps"] = num_steps
        if method is not None:
            changes["method"] = method
        settings = dataclasses.replace(config or quality_preset("default"), **changes)
        mesh, figures, seconds = run_in_memory(make_optimiser(settings, self.teacher), callback_on_step_end)
        return TextTo3DResult(mesh, settings, figures, seconds)

    def refine(
        self,
        mesh: str | Path | RenderableMesh | TexturedMesh,
        prompt: str,
        *,
        part: Part = "texture",
        strength: float = 1.0,
        seed: int = 0,
        config: RefineConfig | None = None,
        callback_on_step_end: Callable[[int, Mapping[str, float]], object] | None = None,
    ) -> RefineResult:
        """Change the texture, the geometry or both of `mesh`, a file or a mesh in memory, towards `prompt`.

        strength: how far from the input, 0 to 1. config: settings to start from; the other arguments win over
        it. The result stands where the input stood. Raises UsageError for a mesh that is of no use.
        """
        from uni3d.text_to_3d.refine import refine_mesh

        settings = dataclasses.replace(
            config or RefineConfig(), prompt=check_prompt(prompt), part=part, strength=strength, seed=seed
        )
        return refine_mesh(mesh, settings, self.teacher, callback_on_step_end)


def run_in_memory(
    optimiser: RunOptimiser, on_step: Callable[[int, Mapping[str, float]], object] | None
) -> tuple[TexturedMesh, dict[str, Any], dict[str, float]]:
    """A whole run without a directory: (mesh, figures, seconds by stage). Closes the optimiser."""
    seconds: dict[str, float] = {}
    try:
        with timed(seconds, "prepare"):
            optimiser.prepare()
        with timed(seconds, "optimise"):
            store = MemoryStore()
            store.save(0, optimiser.state_dict())
            take_steps(optimiser, store, on_step=on_step)
        mesh, figures, mesh_seconds = build_mesh(optimiser)
    finally:
        optimiser.close()
    return mesh, figures, seconds | mesh_seconds


def choose_device(name: str) -> tuple[str, str]:
    """Resolve "auto" and check the rest: (device, reason). Raises UsageError for a device that is not
    here."""
    if name == "auto":
        if torch.cuda.is_available():
            return "cuda", f"auto: {torch.cuda.get_device_name()}"
        return "cpu", f"auto: no CUDA device; {torch.get_num_threads()} threads"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"device '{name}' is not a device; use auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
        raise UsageError(f"device '{name}' is not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"device '{name}' is not on this machine, which has {torch.cuda.device_count()} CUDA devices; "
            "use --device cpu"
        )
    return name, "chosen"


def provenance(config: TextTo3DConfig) -> dict[str, Any]:
    """What is stored in the mesh file: how to make it again."""
    return {
        "generator": f"uni3d {uni3d.__version__}",
        "prompt": config.prompt,
        "negative_prompt": config.negative_prompt,
        "seed": config.seed,
        "method": config.method,
        "divergence": resolve_recipe(config).divergence.name,
        "steps": config.steps,
        "teacher": config.teacher if config.teacher == EMBEDDED else Path(config.teacher).name,
        "torch": torch.__version__,
    }


def with_material(mesh: TexturedMesh, settings: TextureConfig) -> TexturedMesh:
    """`mesh` with the constants of its material, if its texture was made without light."""
    if not (settings.steps and settings.lit):
        return mesh  # the colours hold the light already, so the material stays unlit
    constants = np.rint(255 * np.array([settings.roughness, settings.metalness])).astype(np.uint8)
    maps = np.broadcast_to(constants, (*mesh.texture.shape[:2], 2)).copy()
    return dataclasses.replace(mesh, roughness_metalness=maps)


# ---------------------------------------------------------------------- field to mesh


def build_mesh(optimiser: RunOptimiser) -> tuple[TexturedMesh, dict[str, Any], dict[str, float]]:
    """Extract, unwrap, paint and check the mesh of a run: (mesh, figures, seconds by stage)."""
    settings = optimiser.config.mesh
    seconds: dict[str, float] = {}
    with timed(seconds, "surface"):
        surface = optimiser.surface()
    cameras = ring_cameras(COMPARISON_VIEWS)
    with torch.no_grad():
        rendered = optimiser.render(cameras, COMPARISON_SIZE, NEUTRAL_GREY)
    with timed(seconds, "texture"):
        mesh = bake_surface_colours(
            surface, optimiser.surface_colour, settings.texture_size, device=optimiser.device
        )
    with timed(seconds, "check"):
        mesh_images, mesh_alpha = render_mesh(mesh, cameras, COMPARISON_SIZE, background=NEUTRAL_GREY)
        comparison = compare_with_field(
            mesh_images,
            rendered.image.permute(0, 2, 3, 1).cpu().numpy(),
            mesh_alpha,
            rendered.opacity[:, 0].cpu().numpy(),
        )
    if comparison["verdict"] != "match":
        logger.warning("the mesh differs from what was optimised: %s", comparison["explanation"])
    figures: dict[str, Any] = {"surface": surface.report, "field_match": comparison}
    if isinstance(rendered, RenderOutput):  # of a surface, half-transparent pixels are its smooth outline
        figures["fog"] = fog_fraction(rendered.opacity)
    return with_material(mesh, optimiser.config.stages.texture), figures, seconds


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Any:
    started = time.monotonic()
    try:
        yield
    finally:
        seconds[name] = seconds.get(name, 0.0) + time.monotonic() - started


# ---------------------------------------------------------------------- the command


class RunWatch:
    """Follows a run from outside, as a web page does; whatever a method raises ends the run at once."""

    def before_denoising(self) -> None:
        """Called before every denoising step of the teacher samples that some methods start with."""

    def after_step(self, optimiser: RunOptimiser, values: Mapping[str, float]) -> None:
        """Called after every step with its numbers; may render the field but not change it."""


def generate(config: TextTo3DConfig, *, watch: RunWatch | None = None) -> GenerateResult:
    """Run `uni3d generate`: optimise, export, and leave one run directory.

    Raises UsageError for bad input before anything is written, Interrupted after a signal once the state
    is saved, and what `watch` raises.
    """
    if config.particles > 1:
        from uni3d.text_to_3d.particles import generate_particles

        return generate_particles(config, watch=watch)
    config = _checked(config)
    device, reason = choose_device(config.device)
    renderer, encoding = choose_backends(config, torch.device(device))
    seconds: dict[str, float] = {}
    with timed(seconds, "load"):
        teacher, warning = load_run_teacher(config, device)
        fake_base = load_fake_base(config, device)
    with _open_run(config) as run, StopFlag() as stop:
        logger.info("device: %s (%s), %s, %s", device, reason, renderer, encoding)
        if warning:
            logger.warning("%s", warning)
        optimiser = make_optimiser(config, teacher, fake_base)
        try:
            run_optimiser(optimiser, run, seconds, stop, watch or RunWatch())
            mesh, figures, mesh_seconds = build_mesh(optimiser)
        finally:
            optimiser.close()
        if stop.is_set:
            _write_interrupted_mesh(mesh, config, run)
            raise interruption(stop, run, optimiser.num_steps, optimiser.num_steps)
        return _write_results(run, config, mesh, figures, seconds | mesh_seconds)


def _checked(config: TextTo3DConfig) -> TextTo3DConfig:
    """The settings, completed by those of a run to go on with; UsageError for what cannot work."""
    if config.resume is not None:
        saved = load_config(RunDirectory.open(config.resume).config_path, TextTo3DConfig())
        if config.output is None and saved.output is not None:
            config = dataclasses.replace(config, output=saved.output, overwrite=saved.overwrite)
    config = dataclasses.replace(config, prompt=check_prompt(config.prompt))
    config = fitted(config)
    for progress in (0.0, 1.0):
        stage_recipe(config, progress)
    if config.output is not None:
        check_output_file(config.output, overwrite=config.overwrite)
    return config


def _open_run(config: TextTo3DConfig) -> RunDirectory:
    """The run to go on with, or a new one: the first thing that is written, after everything that may be
    refused."""
    if config.resume is not None:
        return RunDirectory.open(config.resume)
    run = RunDirectory.create(config.runs_folder, f"{prompt_slug(config.prompt)}-{config.seed}")
    run.write_config(config_to_yaml(config))
    return run


def load_run_teacher(config: TextTo3DConfig, device: str) -> tuple[LatentDiffusionTeacher, str | None]:
    """The teacher, and what to say about a prompt with words that it does not know."""
    teacher = load_teacher(config, device)
    source = teacher.name
    file = Path(source) / "vocabulary.json"
    if not file.is_file():  # Stable Diffusion, which knows most things
        return teacher, None
    return teacher, unknown_prompt_warning(config.prompt, read_vocabulary(file))


def run_optimiser(
    optimiser: RunOptimiser,
    run: RunDirectory,
    seconds: dict[str, float],
    stop: StopFlag,
    watch: RunWatch,
    *,
    write_partial: Callable[[TexturedMesh], object] | None = None,
) -> None:
    """Run the steps that are left, saving every so often; leaves by Interrupted when a signal asks, with the
    mesh as it stands handed to `write_partial` (none: it is written as `generate` does)."""
    config = optimiser.config
    store = CheckpointStore(
        run.checkpoints_path, keep=config.checkpoints.keep, fingerprint=_fingerprint(config)
    )
    checkpoint = None if config.resume is None else store.load_latest()
    if checkpoint is not None:
        optimiser.load_state_dict(checkpoint.state)
        run.truncate_metrics(optimiser.step_index)
    else:

        def before_denoising() -> None:
            _leave_if_asked(stop, run)
            watch.before_denoising()

        with timed(seconds, "prepare"):
            optimiser.prepare(before_step=before_denoising)
        store.save(0, optimiser.state_dict())
    with timed(seconds, "optimise"):
        _loop(optimiser, run, store, stop, watch, write_partial)


def _leave_if_asked(stop: StopFlag, run: RunDirectory) -> None:
    if stop.is_set:
        raise stop.interruption(
            f"stopped before the first step; nothing had been made yet. Start again with: {resume_line(run)}"
        )


def _loop(
    optimiser: RunOptimiser,
    run: RunDirectory,
    store: CheckpointStore,
    stop: StopFlag,
    watch: RunWatch,
    write_partial: Callable[[TexturedMesh], object] | None,
) -> None:
    config = optimiser.config
    num_steps = optimiser.num_steps
    with Progress(num_steps, start=optimiser.step_index, label="optimise", quiet=config.quiet) as progress:
        started = time.monotonic()

        def on_step(step: int, values: Mapping[str, float]) -> bool:
            nonlocal started
            spent = {"seconds": round(time.monotonic() - started, 4)}
            run.log_metrics(step, {"stage": optimiser.stage, **values, **spent})
            progress.update(stage=optimiser.stage, loss=values.get("student_loss", 0.0))
            watch.after_step(optimiser, values)
            started = time.monotonic()
            return not stop.is_set

        def on_rollback(step: int) -> None:
            run.truncate_metrics(step)
            progress.update(step - progress.done)

        if not stop.is_set:
            take_steps(optimiser, store, on_step=on_step, on_rollback=on_rollback)
    if optimiser.step_index < num_steps:
        store.save(optimiser.step_index, optimiser.state_dict())
        try:
            mesh, _, _ = build_mesh(optimiser)
            if write_partial is not None:
                write_partial(mesh)
            else:
                _write_interrupted_mesh(mesh, config, run)
        except Uni3DError as error:  # a field without a surface
            logger.warning("no mesh yet: %s", error)
        raise interruption(stop, run, optimiser.step_index, num_steps)
    store.save(optimiser.step_index, optimiser.state_dict())


def _write_interrupted_mesh(mesh: TexturedMesh, config: TextTo3DConfig, run: RunDirectory) -> None:
    """The mesh as it stands, so that a stopped run is not empty-handed."""
    write_mesh(mesh, run.path / "mesh.glb", extras=provenance(config))
    write_preview(mesh, run.path / "preview.png")


def interruption(stop: StopFlag, run: RunDirectory, step: int, num_steps: int) -> Interrupted:
    return stop.interruption(
        f"stopped after step {step} of {num_steps}; everything is saved. Go on with: {resume_line(run)}"
    )


def resume_line(run: RunDirectory) -> str:
    return f"uni3d {run.command} --resume {shlex.quote(str(run.path))}"


def _write_results(
    run: RunDirectory,
    config: TextTo3DConfig,
    mesh: TexturedMesh,
    figures: dict[str, Any],
    seconds: dict[str, float],
) -> GenerateResult:
    with timed(seconds, "export"):
        extras = provenance(config)
        written = [
            write_mesh(mesh, run.path / f"mesh.{suffix}", extras=extras) for suffix in config.mesh.formats
        ]
        write_preview(mesh, run.path / "preview.png")
        if config.mesh.turntable_frames > 0:
            write_turntable(mesh, run.path / "turntable.mp4", frames=config.mesh.turntable_frames)
    output = written[0]
    if config.output is not None:
        output = _deliver(run, config, mesh, extras)
    report = {
        "prompt": config.prompt,
        "seed": config.seed,
        "method": config.method,
        "divergence": resolve_recipe(config).divergence.name,
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "mesh": mesh_report(run.path / f"mesh.{config.mesh.formats[0]}"),
        **figures,
    }
    atomic_write_json(run.path / "metrics.json", json.loads(json.dumps(report, default=float)))
    return GenerateResult(output, run.path, report)


def _deliver(run: RunDirectory, config: TextTo3DConfig, mesh: TexturedMesh, extras: dict[str, Any]) -> Path:
    """Put the mesh where the user asked. The result in the run directory is kept whatever happens here."""
    assert config.output is not None
    target = config.output
    check_output_file(target, overwrite=config.overwrite)
    same = run.path / f"mesh{target.suffix.lower()}"
    if target.suffix.lower() != ".obj" and same.is_file():
        return atomic_write(target, lambda temporary: shutil.copyfile(same, temporary))
    return write_mesh(mesh, target, extras=extras)


def _fingerprint(config: TextTo3DConfig) -> dict[str, Any]:
    """What must not change between the runs that share checkpoints; who computes it may, and within what
    memory: settings count as the smallest bounds leave them."""
    ignored = (
        "output",
        "runs_folder",
        "resume",
        "overwrite",
        "quiet",
        "json",
        "device",
        "vram",
        "checkpoints",
        "mesh",
    )
    smallest = config_to_dict(RUNGS[-1].bounded(config))
    kept = {key: value for key, value in smallest.items() if key not in ignored}
    for group, key in _HOW_IT_IS_COMPUTED:
        kept[group] = {name: value for name, value in kept[group].items() if name != key}
    return kept
