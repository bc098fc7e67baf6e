"""Several prompts for one batch: view b of a batch of B belongs to prompt b S // B.

Takes the place of `PromptContexts` where the views of several scenes pass the teacher together.
Legend: S prompts, B views scene by scene, L tokens, E context channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from uni3d.device_draws import to_device
from uni3d.diffusion.latent_teacher import Repelled
from uni3d.diffusion.prompt import VIEW_WORDS, PromptContexts


class PromptStack:
    """Contexts of S prompts that one teacher encoded, with one rule for camera tokens."""

    def __init__(self, contexts: Sequence[PromptContexts]) -> None:
        self.contexts = list(contexts)
        self.teacher = contexts[0].teacher
        self.use_camera = contexts[0].use_camera
        by_view = [torch.cat([one.by_view[word] for word in VIEW_WORDS]) for one in contexts]
        self._by_view = torch.cat(by_view)  # [S x view words, L, E]
        self._plain = torch.cat([one.plain for one in contexts])
        self._negative = torch.cat([one.negative for one in contexts])

    def conditional(self, view_words: Sequence[str], conditioning: Tensor) -> Tensor:
        """Contexts [B, L, E] of views named by `view_words`, seen by cameras `conditioning` [B, K]."""
        views_per_scene = len(view_words) // len(self.contexts)
        row = [
            position // views_per_scene * len(VIEW_WORDS) + VIEW_WORDS.index(word)
            for position, word in enumerate(view_words)
        ]
        context = self._by_view[to_device(torch.tensor(row), self._by_view.device)]
        return self.teacher.with_camera(context, conditioning) if self.use_camera else context

    def without_view(self, conditioning: Tensor) -> Tensor:
        """Contexts [B, L, E] of the prompts without a view word, for cameras `conditioning` [B, K]."""
        context = self._plain.repeat_interleave(conditioning.shape[0] // len(self.contexts), dim=0)
        return self.teacher.with_camera(context, conditioning) if self.use_camera else context

    def repelled(self, view_words: Sequence[str], strength: float) -> list[Repelled]:
        """As `PromptContexts.repelled`, each view kept away from other views of its own prompt."""
        num = len(view_words) // len(self.contexts)
        each = [
            one.repelled(view_words[scene * num : (scene + 1) * num], strength)
            for scene, one in enumerate(self.contexts)
        ]
        return [
            Repelled(*(torch.cat(parts) for parts in zip(*slot, strict=True)))
            for slot in zip(*each, strict=True)
        ]

    def unconditional(self, num: int) -> Tensor:
        """The negative prompts' contexts, [num, L, E]."""
        return self._negative.repeat_interleave(num // len(self.contexts), dim=0)
