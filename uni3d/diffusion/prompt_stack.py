"""Several prompts for one batch: view b of a batch of B belongs to prompt b S // B.

Takes the place of `PromptContexts` where the views of several scenes pass the teacher together.
Legend: S prompts, B views scene by scene, L tokens, E context channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from uni3d.diffusion.prompt import VIEW_WORDS, PromptContexts


class PromptStack:
    """Contexts of S prompts that one teacher encoded, with one rule for camera tokens."""

    def __init__(self, contexts: Sequence[PromptContexts]) -> None:
        self.contexts = list(contexts)
        self.teacher = contexts[0].teacher
        self.use_camera = contexts[0].use_camera
        by_view = [torch.cat([one.by_view[word] for word in VIEW_WORDS]) for one in contexts]
        self._by_view = torch.cat(by_view)  # [S x view words, L, E]
        self._negative = torch.cat([one.negative for one in contexts])

    def conditional(self, view_words: Sequence[str], conditioning: Tensor) -> Tensor:
        """Contexts [B, L, E] of views named by `view_words`, seen by cameras `conditioning` [B, K]."""
        views_per_scene = len(view_words) // len(self.contexts)
        row = [
            position // views_per_scene * len(VIEW_WORDS) + VIEW_WORDS.index(word)
            for position, word in enumerate(view_words)
        ]
        context = self._by_view[torch.tensor(row).to(self._by_view.device)]
        return self.teacher.with_camera(context, conditioning) if self.use_camera else context

    def unconditional(self, num: int) -> Tensor:
        """The negative prompts' contexts, [num, L, E]."""
        return self._negative.repeat_interleave(num // len(self.contexts), dim=0)
