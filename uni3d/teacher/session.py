"""What the two phases of a teacher's training share: settings, device, views, the stop flag."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from uni3d.errors import UsageError
from uni3d.teacher.initial_weights import InitialTeacher, fit_weights
from uni3d.teacher.settings import TeacherConfig
from uni3d.teacher.trainable import Trainable
from uni3d.teacher.view_batches import ViewPool
from uni3d.training.processes import Processes
from uni3d.training.stop import StopFlag

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

Resume = Literal["no", "auto", "full", "compact"]
# Each stream of random numbers gets its own number, so that none repeats another.
STREAM_AUTOENCODER, STREAM_LATENTS, STREAM_POOL, STREAM_NOISE, STREAM_STATISTICS, STREAM_MEASURED = range(
    1, 7
)


@dataclass
class Session:
    """What the phases of one call share."""

    config: TeacherConfig
    output: Path
    device: torch.device
    deadline_s: float | None
    stop: StopFlag
    pool: ViewPool
    tokenizer: CLIPTokenizer
    vocabulary: dict[str, Any]
    processes: Processes = Processes()
    initial_teacher: InitialTeacher | None = None

    @property
    def compute_dtype(self) -> torch.dtype:
        # bf16 on a CPU is emulated and hundreds of times slower.
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def stop_if_asked(self, phase: str, step: int) -> None:
        """Call after saving: raises Interrupted when a signal arrived."""
        if self.stop.is_set:
            raise self.stop.interruption(
                f"stopped in the {phase} at step {step}, saved in {self.output}; go on by the same line with "
                "--resume full"
            )


def load_network(network: torch.nn.Module, weights: Mapping[str, Tensor], prefix: str) -> None:
    """Fill `network` with the tensors of `weights` whose name starts with `prefix`."""
    chosen = {name.removeprefix(prefix): t.float() for name, t in weights.items() if name.startswith(prefix)}
    try:
        network.load_state_dict(chosen)
    except RuntimeError as error:
        raise UsageError(
            f"checkpoint does not fit this configuration ({str(error).splitlines()[0]}); resume with the "
            "configuration it was trained with"
        ) from error


def start_from(session: Session, trainable: Trainable) -> None:
    """Fill `trainable` with what the session's initial teacher has for it."""
    assert session.initial_teacher is not None
    own = trainable.weights(averaged=False)
    trainable.load_weights(fit_weights(own, session.initial_teacher, session.tokenizer))
