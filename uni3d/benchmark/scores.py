"""What one result is worth, judged when it is made; and what all results of a prompt are worth together.

A run that failed, or whose result cannot be seen, counts as the worst: lost in every retrieval, as similar to
its prompt as the worst result or a blank picture, blank views in the distances to the teacher, and a copy of
its neighbour in the diversity. Legend: V views, E features, G results, K teacher samples, T prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from uni3d.benchmark.backends import Backend, Product, write_views
from uni3d.evaluation.diversity import matched_diversity
from uni3d.evaluation.evaluator import Evaluator
from uni3d.evaluation.fidelity_metrics import kernel_distance, precision_recall
from uni3d.evaluation.mesh_quality import MeshItem, judge_mesh
from uni3d.evaluation.retrieval import JointEmbedding, retrieve
from uni3d.evaluation.settings import MeshQualitySettings
from uni3d.evaluation.t3bench import Reward, t3bench_quality
from uni3d.scene.camera import Cameras
from uni3d.training.checkpoint import atomic_write

EVALUATOR = "evaluator"
NUM_NEIGHBOURS = 3
_BLANK = 0.7


class EvaluatorEmbedding:
    """The evaluator as a `JointEmbedding`."""

    name = EVALUATOR

    def __init__(self, evaluator: Evaluator) -> None:
        self.evaluator = evaluator

    def image_embeddings(self, images: Tensor) -> Tensor:
        """As `JointEmbedding`."""
        return self.evaluator.encode(images).embedding

    def text_embeddings(self, texts: Sequence[str]) -> Tensor:
        """As `JointEmbedding`."""
        return self.evaluator.text_features(texts)


@dataclass(frozen=True)
class Judges:
    """Who judges, and from where.

    `embeddings` are those beside the evaluator's: CLIP, HPSv2. `reward` adds the quality of T3Bench.
    `shows_meshes` is False for the pictures of the 2-D mode, which can have no Janus.
    """

    evaluator: Evaluator
    embeddings: Sequence[JointEmbedding]
    cameras: Cameras
    settings: MeshQualitySettings
    shows_meshes: bool
    reward: Reward | None = None

    @property
    def all_embeddings(self) -> list[JointEmbedding]:
        """The evaluator's first."""
        return [EvaluatorEmbedding(self.evaluator), *self.embeddings]

    @property
    def view_size(self) -> int:
        """Side of the judged views in pixels."""
        return self.evaluator.network.config.image_size


def judge_product(
    product: Product, prompt: str, seed: int, judges: Judges, backend: Backend, folder: Path
) -> dict[str, Any]:
    """Look at one result: the verdicts for its record. Keeps views.npz and embeddings.npz in `folder`."""
    item = MeshItem(product.path, prompt, seed, fog=product.figures.get("fog"))
    judged = judge_mesh(
        item, judges.evaluator, judges.cameras, judges.view_size, judges.settings, backend.views
    )
    verdict = asdict(judged.score) | {"path": product.path.name}
    if not judges.shows_meshes:
        verdict |= {"is_janus": None, "front_quadrants": []}
    if judges.reward is not None and judges.shows_meshes:
        is_lost = judged.score.error is not None or judged.score.is_empty
        quality = None if is_lost else t3bench_quality(product.path, prompt, judges.reward)
        # 0 to 100 is its scale; what cannot be seen gets the worst rather than what a black picture gets.
        verdict["t3bench"] = {"best": 0.0, "mean": 0.0, "worst": 0.0} if quality is None else asdict(quality)
    if judged.rendered is not None:
        write_views(folder / "views.npz", judged.rendered.images)
    if judged.rendered is not None and judged.output is not None:
        embeddings = {EVALUATOR: judged.output.embedding.numpy()}
        for judge in judges.embeddings:
            embeddings[judge.name] = judge.image_embeddings(judged.rendered.images).numpy()
        atomic_write(
            folder / "embeddings.npz",
            lambda temporary: np.savez(temporary, **embeddings),  # pyright: ignore[reportArgumentType]
        )
    return verdict


def read_embeddings(folder: Path) -> dict[str, Tensor]:
    """By judge, float32 [V, E]; {} for a result that could not be seen."""
    file = folder / "embeddings.npz"
    if not file.is_file():
        return {}
    with np.load(file, allow_pickle=False) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


@dataclass(frozen=True)
class Space:
    """One judge's view of the benchmark: the prompts [T, E] and a blank picture [E]."""

    name: str
    prompts: Tensor
    blank: Tensor

    @staticmethod
    def of(judge: JointEmbedding, prompts: Sequence[str], size: int) -> Space:
        """The prompts and the blank picture as `judge` embeds them."""
        blank = judge.image_embeddings(torch.full((1, 3, size, size), _BLANK))[0]
        return Space(judge.name, judge.text_embeddings(prompts), blank)

    def similarities(self, embedding: Tensor, asked: int) -> dict[str, float]:
        """Retrieval of a result's views [V, E] by its prompt."""
        found = retrieve(embedding @ self.prompts.T, asked)
        return {
            "alignment": found.mean_similarity,
            "worst_view": found.worst_similarity,
            "r_precision": float(found.is_first),
            "views_first": found.views_first,
        }


def group_figures(views: Sequence[Tensor | None], teacher: Tensor | None, blank: Tensor) -> dict[str, float]:
    """Diversity of the results of one prompt, and their distance to the teacher's samples of it.

    `views` [V, E] of each result, None where it failed; `teacher` [K, V, E] or None. The kernel distance is
    taken of embeddings scaled to the length sqrt(E), so that its kernel is (cosine + 1)^3.
    """
    figures: dict[str, float] = {}
    seen = [view for view in views if view is not None]
    if len(views) > 1:
        stand_in = seen[0] if seen else None
        members = [view if view is not None else stand_in for view in views]
        diversity = matched_diversity(torch.stack([m for m in members if m is not None])) if seen else None
        figures["vendi"] = diversity.vendi if diversity else 1.0
        figures["pair_distance"] = diversity.distance if diversity else 0.0
    if teacher is not None:
        num_views = teacher.shape[1]
        made = torch.cat([blank.expand(num_views, -1) if view is None else view for view in views])
        figures |= distances(made, teacher.flatten(0, 1))
    return figures


def distances(made: Tensor, teacher: Tensor) -> dict[str, float]:
    """Kernel distance, precision and recall of embeddings [N, E] against the teacher's [M, E]."""
    figures: dict[str, float] = {}
    scale = made.shape[1] ** 0.5
    if min(len(made), len(teacher)) >= 2:
        figures["kernel_distance"] = kernel_distance(scale * made, scale * teacher, num_subsets=1).mean
    if min(len(made), len(teacher)) > NUM_NEIGHBOURS:
        covered = precision_recall(teacher, made, num_neighbours=NUM_NEIGHBOURS)
        figures |= {"precision": covered.precision, "recall": covered.recall}
    return figures


def run_figures(record: Mapping[str, Any], *, shows_meshes: bool) -> dict[str, float]:
    """The evaluator's verdicts, the soundness of the mesh and the costs of one run, as far as they apply."""
    figures = {"failed": float(record["error"] is not None)}
    verdict = record["verdict"]
    for name, key in _VERDICTS.items():
        if verdict[key] is not None:
            figures[name] = float(verdict[key])
    for name, value in verdict.get("t3bench", {}).items():
        figures[f"t3bench_{name}"] = value
    if shows_meshes:
        mesh, match = record["figures"].get("mesh"), record["figures"].get("field_match")
        figures["closed"] = float(mesh is not None and mesh["closed"] and mesh["outward"])
        figures["one_piece"] = float(mesh is not None and mesh["components"] == 1)
        figures["as_field"] = float(match is not None and match["verdict"] == "match")
        if match is not None:
            figures["psnr_db"] = match["psnr_db"]
        if mesh is not None:
            figures["triangles"] = float(mesh["triangles"])
    if record["costs"]:
        costs = record["costs"]
        figures |= {
            "steps": float(costs["steps"]),
            "passes": float(costs["passes"]["total"]),
            "seconds": float(costs["guidance_seconds"]),
            "peak_gib": costs["peak_memory_bytes"] / 2**30,
        }
        for name, stage in costs.get("stages", {}).items():
            figures |= {
                f"{name}_seconds": stage["seconds"],
                f"{name}_gib": stage["peak_memory_bytes"] / 2**30,
            }
    return figures


_VERDICTS = {
    "right_object": "noun_right",
    "worst_view_object": "noun_worst_view_probability",
    "right_colour": "colour_right",
    "right_view": "view_right",
    "janus": "is_janus",
    "foggy": "is_foggy",
}
