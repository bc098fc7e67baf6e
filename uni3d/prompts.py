"""What a prompt may be, and the file name that is made of it."""

from __future__ import annotations

import hashlib
import re
import unicodedata

from uni3d.errors import UsageError

MAX_PROMPT_LENGTH = 1024
_MAX_SLUG_LENGTH = 48
_EXAMPLE = 'for example "a red wooden chair"'


def check_prompt(prompt: str, *, name: str = "prompt", may_be_empty: bool = False) -> str:
    """The prompt in Unicode normal form C without surrounding space.

    Raises UsageError if it is empty, longer than 1024 characters, or holds control characters, line breaks or
    halves of a surrogate pair (what a terminal hands over for bytes that are not UTF-8).
    """
    if len(prompt) > MAX_PROMPT_LENGTH:
        raise UsageError(
            f"the {name} has {len(prompt)} characters; shorten it to at most {MAX_PROMPT_LENGTH}"
        )
    for position, character in enumerate(prompt):
        if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp"):
            raise UsageError(
                f"the {name} holds the control character U+{ord(character):04X} at position {position + 1}; "
                f"remove it"
            )
    normal = unicodedata.normalize("NFC", prompt).strip()
    if not normal and not may_be_empty:
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
