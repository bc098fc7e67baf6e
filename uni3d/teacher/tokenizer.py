"""A CLIP tokenizer whose known words are single tokens and whose unknown words fall back to pieces and bytes.

Byte-pair merges are learnt on the list of known words until each of them is one token. Replaying merges in
the order in which they were learnt cuts those words the same way, so the property holds by construction, and
any other text is still representable because every byte is in the vocabulary.
"""

from __future__ import annotations

import heapq
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

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
    from tokenizers import pre_tokenizers

    if not words:
        raise ValueError("a tokenizer needs at least one known word")
    cutter = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    spelled = [cutter.pre_tokenize_str(word.lower())[0][0] for word in sorted(set(words))]
    merges = learn_merges([[*letters[:-1], letters[-1] + _WORD_END] for letters in spelled])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(symbol + _WORD_END for symbol in alphabet), *("".join(pair) for pair in merges)]
    distinct = dict.fromkeys([*tokens, START_TOKEN, END_TOKEN])
    vocabulary = {token: index for index, token in enumerate(distinct)}
    return build_tokenizer(vocabulary, merges, context_length=context_length)


def build_tokenizer(
    vocabulary: dict[str, int], merges: list[tuple[str, str]], *, context_length: int
) -> CLIPTokenizer:
    """The transformers class around ids by token and merges in the order they apply."""
    from transformers import CLIPTokenizer

    # The annotation wants strings; the tokenizers library takes pairs.
    pairs: Any = merges
    return CLIPTokenizer(vocab=vocabulary, merges=pairs, model_max_length=context_length)


def learn_merges(words: list[list[str]]) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent pair first, until each of `words` (lists of symbols) is one symbol.

    Ties go to the pair that comes first in the alphabet. The trainer of the tokenizers library breaks them
    differently from one process to the next, which would give equal runs different token ids.
    """
    words = [list(word) for word in words]
    counts: Counter[tuple[str, str]] = Counter()
    holders: dict[tuple[str, str], set[int]] = defaultdict(set)
    for index, word in enumerate(words):
        for pair in pairwise(word):
            counts[pair] += 1
            holders[pair].add(index)
    queue = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(queue)
    merges: list[tuple[str, str]] = []
    while queue:
        negative, pair = heapq.heappop(queue)
        if counts[pair] != -negative or not negative:
            continue  # an outdated entry: the pair was counted anew since
        merges.append(pair)
        touched: set[tuple[str, str]] = set()
        for index in sorted(holders.pop(pair)):
            before, after = words[index], _merged(words[index], pair)
            if len(after) == len(before):
                continue
            counts.subtract(pairwise(before))
            counts.update(pairwise(after))
            for changed in (*pairwise(before), *pairwise(after)):
                touched.add(changed)
                holders[changed].add(index)
            words[index] = after
        for changed in touched:
            if counts[changed] > 0:
                heapq.heappush(queue, (-counts[changed], changed))
    return merges


def _merged(word: list[str], pair: tuple[str, str]) -> list[str]:
    """`word` with every occurrence of `pair`, from left to right, joined into one symbol."""
    result: list[str] = []
    for symbol in word:
        if result and (result[-1], symbol) == pair:
            result[-1] += symbol
        else:
            result.append(symbol)
    return result


def token_ids(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> np.ndarray:
    """Token ids int16 [len(texts), L], cut and padded to the tokenizer's model_max_length L.

    Equal to calling the tokenizer, but each distinct piece between spaces is cut up only once: a few hundred
    thousand captions share a few thousand words.
    """
    if len(tokenizer) > np.iinfo(np.int16).max:
        raise ValueError(f"{len(tokenizer)} tokens do not fit 16-bit ids; use fewer known words")
    length = tokenizer.model_max_length
    pieces: dict[str, list[int]] = {}
    start, end, pad = special_ids(tokenizer)
    rows = np.full((len(texts), length), pad, dtype=np.int16)
    rows[:, 0] = start
    for row, text in zip(rows, texts, strict=True):
        ids: list[int] = []
        for piece in text.split():
            if piece not in pieces:
                pieces[piece] = tokenizer(piece, add_special_tokens=False)["input_ids"]
            ids += pieces[piece]
        ids = ids[: length - 2]
        row[1 : 1 + len(ids)] = ids
        row[1 + len(ids)] = end
    return rows


def special_ids(tokenizer: CLIPTokenizer) -> tuple[int, int, int]:
    """The ids of the start, end and padding token."""
    return tuple(tokenizer.convert_tokens_to_ids([START_TOKEN, END_TOKEN, str(tokenizer.pad_token)]))  # type: ignore[return-value]


def is_known(tokenizer: CLIPTokenizer, word: str) -> bool:
    """Whether `word` (a run of letters) is one token."""
    return len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1
