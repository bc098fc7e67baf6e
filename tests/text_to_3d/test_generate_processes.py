"""Two processes over gloo make what one makes: the views of one prompt, and the scenes of many."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from uni3d.config.text_to_3d import (
    DiscriminatorConfig,
    FakeScoreConfig,
    FieldConfig,
    GuidanceConfig,
    MeshConfig,
    RendererConfig,
    TextTo3DConfig,
)
from uni3d.diffusion.latent_teacher import LatentDiffusionTeacher
from uni3d.errors import UsageError
from uni3d.random_streams import SharedStream, integers, normal, uniform
from uni3d.scene.camera import ring_cameras
from uni3d.text_to_3d import many_scenes
from uni3d.text_to_3d.scene_optimiser import SceneOptimiser
from uni3d.text_to_3d.scene_requests import ScenePlan, SceneRequest
from uni3d.training.checkpoint import CheckpointStore
from uni3d.training.processes import Processes

PROGRAM = """
import os, sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[3])
torch.set_num_threads(1)
import test_generate_processes as here
os.environ["MASTER_PORT"] = os.environ["PORTS"].split()[0]
here.make_views(sys.argv[2], Path(sys.argv[1]) / "views")
os.environ["MASTER_PORT"] = os.environ["PORTS"].split()[1]
here.make_scenes(sys.argv[2], Path(sys.argv[1]) / "scenes")
"""
REQUESTS = [SceneRequest("a red chair", 0), SceneRequest("a blue vase", 0), SceneRequest("a chair", 1)]


def config_of(teacher: str, folder: Path) -> TextTo3DConfig:
    """Forward KL, whose ratio is normalised by means over all views."""
    return TextTo3DConfig(
        prompt="a red chair", teacher=teacher, runs_folder=folder, device="cpu", quiet=True, steps=3,
        divergence="forward_kl",
        field=FieldConfig(resolutions=(8, 16)),
        guidance=GuidanceConfig(views_per_step=4),
        renderer=RendererConfig(resolution=((0.0, 16.0),), samples_per_ray=16, occupancy_interval=2),
        fake_score=FakeScoreConfig(lora_rank=2, warmup_steps=0),
        discriminator=DiscriminatorConfig(num_real_samples=4, sampling_steps=2),
        mesh=MeshConfig(resolution=24, max_triangles=400, texture_size=64, turntable_frames=0),
    )  # fmt: skip


def make_views(teacher: str, folder: Path) -> None:
    """One run up to its last state, as `generate` with torchrun makes it."""
    from uni3d.text_to_3d import shared_run

    shared_run.build_mesh = lambda optimiser: (None, {}, {})  # type: ignore[assignment]
    shared_run._write_results = lambda run, *_: None  # type: ignore[assignment]
    shared_run.generate_shared(config_of(teacher, folder))


def make_scenes(teacher: str, folder: Path) -> None:
    many_scenes.make_mesh = lambda config, path: "left out here"  # type: ignore[assignment]
    many_scenes._write_overview = lambda *_: None  # type: ignore[assignment]
    many_scenes.os.cpu_count = lambda: 1  # type: ignore[assignment]
    config = dataclasses.replace(config_of(teacher, folder), prompt="")
    many_scenes.generate_many(config, ScenePlan.of(REQUESTS, folder, 2))


def free_ports(num: int) -> list[int]:
    sockets = [socket.socket() for _ in range(num)]
    for opened in sockets:
        opened.bind(("127.0.0.1", 0))
    ports = [opened.getsockname()[1] for opened in sockets]
    for opened in sockets:
        opened.close()
    return ports


def start(rank: int, num: int, ports: list[int], words: list[str]) -> subprocess.Popen[str]:
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num), "OMP_NUM_THREADS": "1"}
    place |= {"MASTER_ADDR": "127.0.0.1", "PORTS": " ".join(map(str, ports))}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *words, str(Path(__file__).parent)],
        env=os.environ | place, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def last_state(run: Path) -> dict[str, Any]:
    checkpoint = CheckpointStore(run / "checkpoints").load_latest()
    assert checkpoint is not None and checkpoint.step == 3
    return checkpoint.state


def picture(teacher: str, state: dict[str, Any]) -> Tensor:
    """Not the voxels: where a gradient is nearly nothing, Adam makes whole steps of its rounding errors."""
    from uni3d.text_to_3d.scene_batch import FinishedScene

    scene = FinishedScene(config_of(teacher, Path()), state)
    with torch.no_grad():
        return scene.render(ring_cameras(3), 16, 0.5).image


@pytest.mark.slow
def test_two_processes_make_what_one_makes(tiny_teacher_folder: Path, tmp_path: Path) -> None:
    teacher, ports = str(tiny_teacher_folder), free_ports(2)
    both = [start(rank, 2, ports, [str(tmp_path / "two"), teacher]) for rank in range(2)]
    outputs = [process.communicate(timeout=250) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs[0][1] + outputs[1][1]
    one = start(0, 1, ports, [str(tmp_path / "one"), teacher])
    assert one.wait(timeout=250) == 0, one.communicate()
    runs = ["views/a-red-chair-0", "scenes/a-red-chair-0", "scenes/a-blue-vase-0", "scenes/a-chair-1"]
    for run in runs:
        alone, shared = last_state(tmp_path / "one" / run), last_state(tmp_path / "two" / run)
        torch.testing.assert_close(picture(teacher, shared), picture(teacher, alone), atol=2e-3, rtol=0)
        for part in ("fake_score", "discriminator", "normaliser", "real_latents"):
            for name, tensor in alone[part].items():
                error = (tensor - shared[part][name]).float().norm() / tensor.float().norm().clamp_min(1e-6)
                assert error < 0.02, (run, part, name)


def test_processes_draw_together_what_one_draws() -> None:
    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(5)

    shares = [SharedStream(generator(), rank, 2) for rank in range(2)]
    for draw in (normal, uniform):
        whole = draw((6, 3), generator())
        parts = [draw((3, 3), SharedStream(generator(), rank, 2)) for rank in range(2)]
        assert torch.equal(torch.cat(parts), whole)
    limits = [3, 9, 100, 7]
    alone = integers(limits, generator())
    parts = [integers(limits[2 * rank : 2 * rank + 2], shares[rank]) for rank in range(2)]
    assert parts[0] + parts[1] == alone
    assert torch.equal(shares[0].generator.get_state(), shares[1].generator.get_state())


def test_views_that_cannot_be_shared_out_are_refused(tiny_teacher_folder: Path) -> None:
    config = config_of(str(tiny_teacher_folder), Path())
    teacher = LatentDiffusionTeacher.from_pretrained(tiny_teacher_folder)
    with pytest.raises(UsageError, match="multiple of 3"):
        SceneOptimiser(config, teacher, processes=Processes(0, 3))
