"""`uni3d refine`: a mesh made elsewhere, its texture or geometry optimised towards a prompt.

    mesh -> read within limits -> repaired, moved into the scene -> stages -> texture baked -> moved back

The stages are those of `generate`; what they change is added to the colours and the shape that the mesh came
with. In texture mode every vertex stays where it was. The input file is only read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uni3d.config.loader import config_to_yaml, load_config
from uni3d.config.refine import RefineConfig
from uni3d.diffusion.latent_teacher import LatentDiffusionTeacher
from uni3d.errors import UsageError
from uni3d.mesh.export import write_mesh
from uni3d.mesh.glb_writer import write_glb
from uni3d.mesh.mesh_input import read_untrusted_mesh
from uni3d.mesh.renderable import RenderableMesh
from uni3d.mesh.repair import PreparedMesh, prepare_for_refine
from uni3d.mesh.report import mesh_report
from uni3d.mesh.textured_mesh import TexturedMesh
from uni3d.mesh.turntable import write_preview, write_turntable
from uni3d.outputs import check_output_file
from uni3d.prompts import check_prompt, prompt_slug
from uni3d.text_to_3d.pipeline import (
    GenerateResult,
    RunWatch,
    build_mesh,
    choose_device,
    interruption,
    load_run_teacher,
    provenance,
    run_in_memory,
    run_optimiser,
    timed,
)
from uni3d.text_to_3d.scene_optimiser import resolve_recipe
from uni3d.text_to_3d.stages import StagedOptimiser
from uni3d.training.checkpoint import atomic_write_json, atomic_write_text
from uni3d.training.run_log import RunDirectory
from uni3d.training.stop import StopFlag

logger = logging.getLogger(__name__)

# Unwrapping, painting and rasterising more in every step takes minutes on a CPU.
MAX_TEXTURED_TRIANGLES = 300_000
# What a shop allows is no limit here: the mesh is as large as the one that was given.
MAX_OUTPUT_BYTES = 256 * 2**20


def refine(config: RefineConfig, *, watch: RunWatch | None = None) -> GenerateResult:
    """Run `uni3d refine`: read, optimise, write back, and leave one run directory.

    Raises UsageError for bad input before anything is written, Interrupted after a signal once the state is
    saved, and what `watch` raises.
    """
    config = _checked(config)
    assert config.source is not None
    device, reason = choose_device(config.device)
    seconds: dict[str, float] = {}
    with timed(seconds, "read"):
        prepared = read_source(config)
    settings = config.run_settings()
    with timed(seconds, "load"):
        teacher, warning = load_run_teacher(settings, device)
    with _open_run(config) as run, StopFlag() as stop:
        logger.info("device: %s (%s)", device, reason)
        if warning:
            logger.warning("%s", warning)
        optimiser = StagedOptimiser(settings, teacher, prepared.mesh)
        try:
            run_optimiser(
                optimiser,
                run,
                seconds,
                stop,
                watch or RunWatch(),
                write_partial=lambda mesh: _write(config, _moved_back(prepared, mesh), run.path / "mesh.glb"),
            )
            mesh, figures, mesh_seconds = build_mesh(optimiser)
        finally:
            optimiser.close()
        seconds |= mesh_seconds
        mesh = _moved_back(prepared, mesh)
        if stop.is_set:
            _write(config, mesh, run.path / "mesh.glb")
            raise interruption(stop, run, optimiser.num_steps, optimiser.num_steps)
        return _write_results(config, prepared, mesh, run, figures, seconds)


@dataclass
class RefineResult:
    """What one mesh became.

    Attributes:
        mesh: textured, in the input's scale, position and orientation.
        config: the settings that reproduce it.
        report: figures about mesh and run, JSON-able.
        seconds: wall-clock time by stage.
    """

    mesh: TexturedMesh
    config: RefineConfig
    report: dict[str, Any]
    seconds: dict[str, float]

    def save(self, path: str | Path) -> Path:
        """Write the mesh; .glb, .obj, .ply, .stl or .usdz by the suffix. Returns the path."""
        return _write(self.config, self.mesh, Path(path))


def refine_mesh(
    source: str | Path | RenderableMesh | TexturedMesh,
    config: RefineConfig,
    teacher: LatentDiffusionTeacher,
    on_step: Callable[[int, Mapping[str, float]], object] | None = None,
) -> RefineResult:
    """Refine a file or a mesh in memory, without a run directory: `TextTo3DPipeline.refine`."""
    if isinstance(source, str | Path):
        config = dataclasses.replace(config, source=Path(source))
        prepared = read_source(config)
    else:
        renderable = source.as_renderable() if isinstance(source, TexturedMesh) else source
        prepared = prepare_for_refine(renderable)
    optimiser = StagedOptimiser(config.run_settings(), teacher, prepared.mesh)
    mesh, figures, seconds = run_in_memory(optimiser, on_step)
    return RefineResult(_moved_back(prepared, mesh), config, {"source": prepared.report, **figures}, seconds)


def read_source(config: RefineConfig) -> PreparedMesh:
    """The mesh of `config`, repaired and moved into the scene; UsageError, one sentence, if it is of no
    use."""
    assert config.source is not None
    prepared = prepare_for_refine(read_untrusted_mesh(config.source))
    num = len(prepared.mesh.faces)
    if config.part == "texture" and num > MAX_TEXTURED_TRIANGLES:
        raise UsageError(
            f"'{config.source}' has {num} triangles, more than the {MAX_TEXTURED_TRIANGLES} whose texture "
            f"can be optimised; simplify it, or pass --both, which makes a surface of its own"
        )
    return prepared


def _checked(config: RefineConfig) -> RefineConfig:
    """The settings, completed by those of a run to go on with; UsageError for what cannot work."""
    if config.resume is not None:
        run = RunDirectory.open(config.resume, command="refine")
        saved = load_config(run.config_path, RefineConfig())
        if config.output is None and saved.output is not None:
            config = dataclasses.replace(config, output=saved.output, overwrite=saved.overwrite)
    source = config.source
    if source is None:
        raise UsageError("no mesh was given; pass a .glb, .obj, .ply or .stl file to start from")
    config = dataclasses.replace(config, prompt=check_prompt(config.prompt))
    check_prompt(config.negative_prompt, name="negative prompt", may_be_empty=True)
    resolve_recipe(config.run_settings())
    if config.output is not None:
        check_refine_output(source, config.output, overwrite=config.overwrite)
    if config.resume is not None and _digest(source) != _digest_file(config.resume).read_text():
        raise UsageError(
            f"'{source}' is not the mesh that the run '{config.resume}' started from; put that one "
            f"back or start a new run"
        )
    return config


def check_refine_output(source: Path, output: Path, *, overwrite: bool) -> None:
    """UsageError if the result cannot be written to `output`, or would replace the mesh it started from."""
    if output.resolve() == source.resolve() or (output.exists() and output.samefile(source)):
        raise UsageError(f"output '{output}' is the input itself, which stays as it is; choose another name")
    check_output_file(output, overwrite=overwrite)


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UsageError(
            f"'{path}' cannot be read ({error.strerror}); put the mesh of this run back"
        ) from error


def _digest_file(run: Path) -> Path:
    return run / "source.sha256"


def _open_run(config: RefineConfig) -> RunDirectory:
    if config.resume is not None:
        return RunDirectory.open(config.resume, command="refine")
    assert config.source is not None
    digest = _digest(config.source)
    run = RunDirectory.create(
        config.runs_folder, f"{prompt_slug(config.prompt)}-{config.seed}", command="refine"
    )
    # The run may be resumed from another folder.
    run.write_config(config_to_yaml(dataclasses.replace(config, source=config.source.resolve())))
    atomic_write_text(_digest_file(run.path), digest)
    return run


def _moved_back(prepared: PreparedMesh, mesh: TexturedMesh) -> TexturedMesh:
    """`mesh` where the input stood, in the input's scale and orientation."""
    return dataclasses.replace(mesh, vertices=prepared.placement.out_of_scene(mesh.vertices))


def _write(config: RefineConfig, mesh: TexturedMesh, path: Path) -> Path:
    """Write `mesh` as it stands, with how it was made."""
    settings = config.run_settings()
    refined = {
        "refined": config.source.name if config.source is not None else "a mesh in memory",
        "part": config.part,
        "strength": config.strength,
        "steps": settings.stages.geometry.steps + settings.stages.texture.steps,
    }
    extras = provenance(settings) | refined
    if path.suffix.lower() == ".glb":
        return write_glb(mesh, path, extras, unit_box=False, max_bytes=MAX_OUTPUT_BYTES)
    return write_mesh(mesh, path, extras, unit_box=False)


def _write_results(
    config: RefineConfig,
    prepared: PreparedMesh,
    mesh: TexturedMesh,
    run: RunDirectory,
    figures: dict[str, Any],
    seconds: dict[str, float],
) -> GenerateResult:
    with timed(seconds, "export"):
        output = _write(config, mesh, run.path / "mesh.glb")
        write_preview(mesh, run.path / "preview.png")
        if config.turntable_frames > 0:
            write_turntable(mesh, run.path / "turntable.mp4", frames=config.turntable_frames)
        if config.output is not None:
            assert config.source is not None
            check_refine_output(config.source, config.output, overwrite=config.overwrite)
            output = _write(config, mesh, config.output)
    report = {
        "prompt": config.prompt,
        "seed": config.seed,
        "method": config.method,
        "part": config.part,
        "strength": config.strength,
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "source": prepared.report,
        "mesh": mesh_report(run.path / "mesh.glb"),
        **figures,
    }
    report = json.loads(json.dumps(report, default=float))
    atomic_write_json(run.path / "metrics.json", report)
    return GenerateResult(output, run.path, report)
