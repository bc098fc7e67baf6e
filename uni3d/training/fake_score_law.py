"""How the fake score is trained, where recipes differ in it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FakeScoreLaw:
    """What the fake score sees in training; the defaults share the student's pass, which saves one.

    Attributes:
        weighting: of the denoising error, a name of `uni3d.losses.fake_score.WEIGHTINGS`.
        noise_range: its own noise levels, as fractions of the timesteps; None: those of the student.
        camera_dropout: how often the camera is hidden from a training sample.
        reads_view: whether its prompt names the view, as the teacher's does.
    """

    weighting: str = "v"
    noise_range: tuple[float, float] | None = None
    camera_dropout: float = 0.0
    reads_view: bool = True

    @property
    def is_shared(self) -> bool:
        """Whether one pass serves the student's gradient and the fake score's training."""
        return self.noise_range is None and self.camera_dropout == 0.0


SHARED_LAW = FakeScoreLaw()
