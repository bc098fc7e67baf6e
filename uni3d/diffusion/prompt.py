"""A prompt as the teacher reads it: one text context for each view word, with and without a camera."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from uni3d.diffusion.stable_diffusion import LatentDiffusionTeacher

VIEW_WORDS = ("front", "side", "back", "overhead")


@dataclass(frozen=True)
class PromptContexts:
    """Text contexts of one prompt, encoded once.

    Attributes:
        by_view: context of "<prompt>, <view> view" for each of `VIEW_WORDS`, each [1, L, E].
        negative: context of the negative prompt, [1, L, E].
        teacher: whose text encoder made them; adds the camera token.
        use_camera: whether contexts of views get the camera token.
    """

    by_view: dict[str, Tensor]
    negative: Tensor
    teacher: LatentDiffusionTeacher
    use_camera: bool = True

    @classmethod
    def encode(
        cls,
        teacher: LatentDiffusionTeacher,
        prompt: str,
        negative_prompt: str = "",
        *,
        use_view_words: bool = True,
        use_camera: bool = True,
    ) -> PromptContexts:
        """Encode `prompt` for every view; `use_view_words=False` gives all views the bare prompt."""
        prompts = [f"{prompt}, {view} view" if use_view_words else prompt for view in VIEW_WORDS]
        contexts = teacher.encode_text([*prompts, negative_prompt])
        by_view = {view: contexts[index : index + 1] for index, view in enumerate(VIEW_WORDS)}
        return cls(by_view=by_view, negative=contexts[-1:], teacher=teacher, use_camera=use_camera)

    def conditional(self, view_words: Sequence[str], conditioning: Tensor) -> Tensor:
        """Contexts [B, L, E] of views named by `view_words` and cameras `conditioning` [B, K]."""
        context = torch.cat([self.by_view[word] for word in view_words])
        return self.teacher.with_camera(context, conditioning) if self.use_camera else context

    def unconditional(self, num: int) -> Tensor:
        """The negative prompt's context without a camera, [num, L, E]: guidance then sharpens the view as
        well."""
        return self.negative.expand(num, -1, -1)
