"""What a prompt may be, and the file name that is made of it."""

from __future__ import annotations

import hashlib
import re
import unicodedata

from uni3d.errors import UsageError

MAX_PROMPT_LENGTH = 1024
_MAX_SLUG_LENGTH = 48
# Invisible, but part of words in some scripts and of emoji.
_JOINERS = "\u200c\u200d"
_SELECTORS = "\ufe0e\ufe0f"
_EXAMPLE = 'for example "a red wooden chair"'


def check_prompt(prompt: str, *, name: str = "prompt", may_be_empty: bool = False) -> str:
    """The prompt in Unicode normal form C without surrounding space.

    Raises UsageError if it is empty, longer than 1024 characters, is not UTF-8, or holds control characters,
    line breaks or invisible characters (those that turn the writing direction among them).
    """
    if len(prompt) > MAX_PROMPT_LENGTH:
        raise UsageError(
            f"the {name} has {len(prompt)} characters; shorten it to at most {MAX_PROMPT_LENGTH}"
        )
    for position, character in enumerate(prompt):
        category = unicodedata.category(character)
        where = f"U+{ord(character):04X} at position {position + 1}"
        if category == "Cs":  # how Python hands over bytes that are not UTF-8
            raise UsageError(f"the {name} is not UTF-8 text ({where}); type it in a UTF-8 terminal")
        if category in ("Cc", "Zl", "Zp"):
            raise UsageError(f"the {name} holds the control character {where}; remove it")
        if category == "Cf" and character not in _JOINERS:
            raise UsageError(f"the {name} holds the invisible character {where}; remove it")
    normal = unicodedata.normalize("NFC", prompt).strip()
    if not normal.strip(_JOINERS + _SELECTORS) and not may_be_empty:
        raise UsageError(f"the {name} is empty; say what to make, {_EXAMPLE}")
    if len(normal) > MAX_PROMPT_LENGTH:
        raise UsageError(
            f"the {name} has {len(normal)} characters; shorten it to at most {MAX_PROMPT_LENGTH}"
        )
    return normal


def prompt_slug(prompt: str) -> str:
    """A folder name for the prompt: small ASCII letters, digits and hyphens, at most 48 of them.

    Where the letters alone do not tell two prompts apart (cut or not ASCII), a hash of the prompt is added.
    """
    ascii_text = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode().lower()
    words = re.sub(r"[^a-z0-9]+", "-", ascii_text).strip("-")
    is_lossy = not words or len(words) > _MAX_SLUG_LENGTH or any(ord(letter) > 127 for letter in prompt)
    if not is_lossy:
        return words
    digest = hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return "-".join(part for part in (words[: _MAX_SLUG_LENGTH - 9].strip("-"), digest) if part)
