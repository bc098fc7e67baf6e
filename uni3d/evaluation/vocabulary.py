"""Word-level tokens of the evaluator: its own vocabulary, which shares nothing with a teacher's tokenizer."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from uni3d.errors import UsageError

PADDING, UNKNOWN = 0, 1
_WORD = re.compile(r"[a-z0-9]+(?:[-'][a-z0-9]+)*")


def split_words(text: str) -> list[str]:
    """Lower-case words of `text`; punctuation is dropped, hyphens inside words stay."""
    return _WORD.findall(text.lower())


class Vocabulary:
    """Words in a fixed order; index 0 pads and index 1 stands for every word that is not known."""

    def __init__(self, words: Sequence[str]) -> None:
        self.words = list(words)
        self._index = {word: index + 2 for index, word in enumerate(self.words)}
        if len(self._index) != len(self.words):
            raise UsageError("the vocabulary lists a word twice; train the evaluator again")

    @classmethod
    def from_texts(cls, texts: Iterable[str]) -> Vocabulary:
        """All words of `texts`, most frequent first, ties in alphabetical order."""
        counts = Counter(word for text in texts for word in split_words(text))
        return cls(sorted(counts, key=lambda word: (-counts[word], word)))

    def __len__(self) -> int:
        return len(self.words) + 2

    def index(self, word: str) -> int:
        """Index of a word; a plural falls back to its singular, anything else unknown gives `UNKNOWN`."""
        for form in (
            word,
            word[:-1] if word.endswith("s") else word,
            word[:-2] if word.endswith("es") else word,
        ):
            if form in self._index:
                return self._index[form]
        return UNKNOWN

    def knows(self, text: str) -> bool:
        """Whether at least one word of `text` is known."""
        return any(self.index(word) != UNKNOWN for word in split_words(text))

    def encode(self, texts: Sequence[str], max_words: int) -> Tensor:
        """Token indices int64 [B, L], L the longest text but at most `max_words`, at least 1."""
        rows = [[self.index(word) for word in split_words(text)][:max_words] or [UNKNOWN] for text in texts]
        length = max(map(len, rows), default=1)
        return torch.tensor([row + [PADDING] * (length - len(row)) for row in rows], dtype=torch.long)

    def write(self, path: Path) -> None:
        """Save as a JSON list of words."""
        from uni3d.training.checkpoint import atomic_write_json

        atomic_write_json(path, self.words)

    @classmethod
    def read(cls, path: Path) -> Vocabulary:
        """Read what `write` saved; UsageError if it is missing or damaged."""
        try:
            words = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(f"cannot read the evaluator's vocabulary {path}: {error}") from None
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise UsageError(
                f"{path} is not a list of words; take the file that came with the evaluator's weights"
            )
        return cls(words)
