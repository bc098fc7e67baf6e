"""A CLIP tokenizer whose known words are single tokens and whose unknown words fall back to pieces and bytes.

Byte-pair merges are learnt on the list of known words until each of them is one token. Replaying merges in
the order in which they were learnt cuts those words the same way, so the property holds by construction, and
any other text is still representable because every byte is in the vocabulary.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

START_TOKEN = "<|startoftext|>"
END_TOKEN = "<|endoftext|>"
_WORD_END = "</w>"
# CLIP cuts text into runs of letters and single digits before any merge: only letter runs can be one token.
_WORD = re.compile(r"[^\W\d_]+")


def words_of(texts: Iterable[str]) -> list[str]:
    """The distinct lower-case words (runs of letters) of `texts`, sorted."""
    found: set[str] = set()
    for text in texts:
        found.update(_WORD.findall(text.lower()))
    return sorted(found)


def train_tokenizer(words: Sequence[str], *, context_length: int = 32) -> CLIPTokenizer:
    """A CLIPTokenizer to which each of `words` (runs of letters) is one token.

    The start token is the last but one id and the end token, which also pads, the last id: CLIPTextModel
    takes its pooled output at the first end token. Raises ValueError when `words` is empty.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    if not words:
        raise ValueError("a tokenizer needs at least one known word")
    learner = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix=_WORD_END))
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner.train_from_iterator(
        [word.lower() for word in words],
        trainers.BpeTrainer(
            vocab_size=1_000_000,  # never reached: merging stops when every word is one token
            min_frequency=0,
            show_progress=False,
            initial_alphabet=alphabet,
            end_of_word_suffix=_WORD_END,
            continuing_subword_prefix="",
        ),
    )
    model = json.loads(learner.to_str())["model"]
    merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in model["merges"]]
    tokens = [*alphabet, *(symbol + _WORD_END for symbol in alphabet), *("".join(pair) for pair in merges)]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys([*tokens, START_TOKEN, END_TOKEN]))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=context_length)


def token_ids(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> np.ndarray:
    """Token ids int16 [len(texts), L], cut and padded to the tokenizer's model_max_length L.

    Equal to calling the tokenizer, but each distinct piece between spaces is cut up only once: a few hundred
    thousand captions share a few thousand words.
    """
    if len(tokenizer) > np.iinfo(np.int16).max:
        raise ValueError(f"{len(tokenizer)} tokens do not fit 16-bit ids; use fewer known words")
    length = tokenizer.model_max_length
    pieces: dict[str, list[int]] = {}
    rows = np.full((len(texts), length), tokenizer.pad_token_id, dtype=np.int16)
    rows[:, 0] = tokenizer.bos_token_id
    for row, text in zip(rows, texts, strict=True):
        ids: list[int] = []
        for piece in text.split():
            if piece not in pieces:
                pieces[piece] = tokenizer(piece, add_special_tokens=False)["input_ids"]
            ids += pieces[piece]
        ids = ids[: length - 2]
        row[1 : 1 + len(ids)] = ids
        row[1 + len(ids)] = tokenizer.eos_token_id
    return rows


def is_known(tokenizer: CLIPTokenizer, word: str) -> bool:
    """Whether `word` (a run of letters) is one token."""
    return len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1
