"""A prompt as the teacher reads it: one text context for each view word, with and without a camera."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from uni3d.diffusion.latent_teacher import LatentDiffusionTeacher, Repelled

VIEW_WORDS = ("front", "side", "back", "overhead")
# What a view keeps away from: the front most of all, since teachers draw it everywhere.
VIEWS_TO_AVOID = {
    "front": (("back", 1.0), ("side", 0.5)),
    "side": (("front", 1.0), ("back", 0.5)),
    "back": (("front", 1.0), ("side", 0.5)),
    "overhead": (("front", 0.5), ("back", 0.25)),
}


@dataclass(frozen=True)
class PromptContexts:
    """Text contexts of one prompt, encoded once.

    Attributes:
        by_view: context of "<prompt>, <view> view" for each of `VIEW_WORDS`, each [1, L, E].
        negative: context of the negative prompt, [1, L, E].
        plain: context of the prompt without a view word, [1, L, E].
        teacher: whose text encoder made them; adds the camera token.
        use_camera: whether contexts of views get the camera token.
    """

    by_view: dict[str, Tensor]
    negative: Tensor
    plain: Tensor
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
        contexts = teacher.encode_text([*prompts, prompt, negative_prompt])
        by_view = {view: contexts[index : index + 1] for index, view in enumerate(VIEW_WORDS)}
        return cls(
            by_view=by_view,
            negative=contexts[-1:],
            plain=contexts[-2:-1],
            teacher=teacher,
            use_camera=use_camera,
        )

    def conditional(self, view_words: Sequence[str], conditioning: Tensor) -> Tensor:
        """Contexts [B, L, E] of views named by `view_words` and cameras `conditioning` [B, K]."""
        context = torch.cat([self.by_view[word] for word in view_words])
        return self.teacher.with_camera(context, conditioning) if self.use_camera else context

    def without_view(self, conditioning: Tensor) -> Tensor:
        """Contexts [B, L, E] of the prompt without a view word, for cameras `conditioning` [B, K]."""
        context = self.plain.expand(conditioning.shape[0], -1, -1)
        return self.teacher.with_camera(context, conditioning) if self.use_camera else context

    def repelled(self, view_words: Sequence[str], strength: float) -> list[Repelled]:
        """What Perp-Neg keeps each view away from: the other views of the prompt, `strength` times the
        weights of `VIEWS_TO_AVOID`. As many for every view, so that shapes stay as they are."""
        pairs = [VIEWS_TO_AVOID[word] for word in view_words]
        device = self.negative.device
        return [
            Repelled(
                torch.cat([self.by_view[avoided] for avoided, _ in slot]),
                torch.cat([torch.full((1,), strength * weight, device=device) for _, weight in slot]),
            )
            for slot in zip(*pairs, strict=True)
        ]

    def unconditional(self, num: int) -> Tensor:
        """The negative prompt's context without a camera, [num, L, E]: guidance then sharpens the view as
        well."""
        return self.negative.expand(num, -1, -1)
