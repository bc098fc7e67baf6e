"""Captions of views: the one canonical wording, varied wordings for training, and what prompts may say.

Captions are lower case: "a red wooden chair, front view". The vocabulary that a trained teacher ships
(`vocabulary_from_records`) tells a user which words of a prompt it has never seen.
"""

from __future__ import annotations

import difflib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from uni3d.data.colours import COLOUR_SYNONYMS, COLOUR_WORDS
from uni3d.data.naming import noun_table
from uni3d.data.recolour import MIN_MAIN_LUMINANCE
from uni3d.data.view_shards import ViewRecord
from uni3d.errors import UsageError
from uni3d.scene.camera import view_word

__all__ = [
    "COLOUR_WORDS",
    "MATERIAL_WORDS",
    "canonical_caption",
    "known_nouns",
    "known_words",
    "may_recolour",
    "nearest_words",
    "read_vocabulary",
    "sample_caption",
    "unknown_in_prompt",
    "unknown_prompt_warning",
    "vocabulary_from_records",
]

MATERIAL_WORDS = (
    "wooden",
    "golden",
    "metal",
    "stone",
    "leather",
    "glass",
    "ceramic",
    "fabric",
    "plastic",
    "wicker",
)

DROP_COLOUR_SHARE = 0.2
VIEW_SHARE = 0.8
NOUN_SHARE = 0.55
SYNONYM_SHARE = 0.3
SECOND_COLOUR_SHARE = 0.6
MATERIAL_SHARE = 0.7
PREFIX_SHARE = 0.12
PATTERN_PHRASE_SHARE = 0.35

_PREFIXES = ("a photo of", "a picture of", "a 3d model of", "a render of", "a 3d render of")
_WOODS = frozenset({"wood", "oak", "teak", "pine", "log", "concrete"})
_PATTERNED = ("with artistic patterns", "with patterns", "with ornaments", "with decorations")
_REFINED = ("refined", "elegant", "decorated", "ornate")
_COMMON_WORDS = frozenset(
    "a an the of with and in on at from to for by its one single some very photo picture image 3d model "
    "render rendering object view front side back overhead top rear left right low poly style small big "
    "large little tall short long old new beautiful nice simple cute high quality detailed realistic "
    "patterns pattern artistic refined elegant decorated ornate ornaments decorations".split()
)


def canonical_caption(record: ViewRecord, colours: Sequence[str] | None = None) -> str:
    """The plain description of an asset: "a red wooden chair", "a white vase with blue stripes".

    `colours` replaces the record's colour words, for recoloured views; () leaves them out.
    """
    words = record.colours if colours is None else tuple(colours)
    return _describe(
        record, record.noun if not _is_patterned(record) else record.name, words, record.materials
    )


def sample_caption(
    record: ViewRecord,
    rng: np.random.Generator,
    *,
    colours: Sequence[str] | None = None,
    view: bool = True,
) -> str:
    """One wording for training: noun, full name or synonym; words left out at random; often ", front view".

    A fifth of the captions name no colour. `view=False` never names the view.
    """
    words = tuple(record.colours if colours is None else colours)
    if rng.random() < DROP_COLOUR_SHARE:
        words = ()
    elif len(words) > 1 and rng.random() >= SECOND_COLOUR_SHARE:
        words = words[:1]
    words = tuple(_synonym(word, COLOUR_SYNONYMS, rng, share=0.15) for word in words)
    materials = record.materials if rng.random() < MATERIAL_SHARE else ()
    thing = _sample_thing(record, rng)
    text = _describe(record, thing, words, materials)
    if "refined" in record.tags and rng.random() < PATTERN_PHRASE_SHARE:
        text = _with_adjective(text, str(rng.choice(_REFINED)))
    if rng.random() < PREFIX_SHARE:
        text = f"{rng.choice(_PREFIXES)} {text}"
    if view and rng.random() < VIEW_SHARE:
        text = f"{text}, {view_word(record.azimuth_deg, record.elevation_deg)} view"
    return text


def _sample_thing(record: ViewRecord, rng: np.random.Generator) -> str:
    if _is_patterned(record):
        choice = rng.random()
        if choice < PATTERN_PHRASE_SHARE:
            return f"{record.noun} {rng.choice(_PATTERNED)}"
        return record.noun if choice > 0.8 else record.name
    if rng.random() < NOUN_SHARE:
        synonyms = {noun: list(words) for noun, words in noun_table().synonyms.items()}
        return _synonym(record.noun, synonyms, rng, share=SYNONYM_SHARE)
    return record.name


def _synonym(word: str, table: dict[str, list[str]], rng: np.random.Generator, *, share: float) -> str:
    choices = table.get(word, [])
    return str(rng.choice(choices)) if choices and rng.random() < share else word


def _is_patterned(record: ViewRecord) -> bool:
    return "patterned" in record.tags


def _describe(record: ViewRecord, thing: str, colours: Sequence[str], materials: Sequence[str]) -> str:
    """Article, colours, material and thing; of a patterned thing the second colour is that of its pattern."""
    colours, thing = list(colours), thing.lower()
    head, separator, pattern = thing.partition(" with ")
    if _is_patterned(record) and separator and len(colours) > 1:
        thing = f"{head} with {colours.pop()} {pattern}"
    spoken = thing.split()
    material = [] if record.noun in noun_table().no_material else _unsaid(materials, spoken)
    kept_colours = [word for word in colours if word not in spoken]
    phrase = " ".join([*([" and ".join(kept_colours)] if kept_colours else []), *material, thing])
    no_article = noun_table().no_article
    return phrase if thing in no_article or thing.split()[-1] in no_article else _with_article(phrase)


def _unsaid(materials: Sequence[str], spoken: list[str]) -> list[str]:
    """Materials that the name does not already hold: no "wooden oak table", no "stone stone lantern"."""
    says_wood = not _WOODS.isdisjoint(spoken)
    return [word for word in materials if word not in spoken and not (word == "wooden" and says_wood)]


def _with_article(phrase: str) -> str:
    return f"an {phrase}" if phrase[0] in "aeiou" and not phrase.startswith("one") else f"a {phrase}"


def _with_adjective(text: str, adjective: str) -> str:
    article, _, rest = text.partition(" ")
    return _with_article(f"{adjective} {rest}") if article in ("a", "an") else f"{adjective} {text}"


def may_recolour(record: ViewRecord) -> bool:
    """Whether training may give this asset another main colour: not people, not colours too dark to shade."""
    red, green, blue = record.main_colour
    is_bright = 0.299 * red + 0.587 * green + 0.114 * blue >= MIN_MAIN_LUMINANCE
    return is_bright and record.noun not in noun_table().keep_colours


# ---------------------------------------------------------------- vocabulary


def known_nouns() -> list[str]:
    """The head words of the noun table, without synonyms."""
    return list(noun_table().synonyms)


def vocabulary_from_records(records: Iterable[ViewRecord]) -> dict[str, Any]:
    """What a model trained on `records` has seen: nouns, names, colours, materials with counts of assets.

    JSON-ready: {"nouns": {noun: {"count", "synonyms"}}, "names": {name: count}, "colours": {word: count},
    "materials": {word: count}}. Synonyms count as known since training captions use them.
    """
    assets = {record.asset_id: record for record in records}.values()
    nouns = Counter(record.noun for record in assets)
    synonyms = noun_table().synonyms
    return {
        "nouns": {n: {"count": c, "synonyms": list(synonyms.get(n, ()))} for n, c in nouns.most_common()},
        "names": dict(Counter(record.name for record in assets).most_common()),
        "colours": {w: sum(w in r.colours for r in assets) for w in COLOUR_WORDS},
        "materials": dict(Counter(w for r in assets for w in r.materials).most_common()),
    }


def read_vocabulary(path: str | Path) -> dict[str, Any]:
    """Read a vocabulary file. Raises UsageError if it is missing or not one."""
    try:
        vocabulary = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(vocabulary["nouns"], dict):
            raise TypeError("'nouns' is not a table")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"the vocabulary file '{path}' cannot be read ({error})") from error
    return vocabulary


def default_vocabulary() -> dict[str, Any]:
    """A vocabulary without counts, from the noun table: what to use before a teacher has been trained."""
    return {
        "nouns": {n: {"count": 0, "synonyms": list(s)} for n, s in noun_table().synonyms.items()},
        "names": {name: 0 for name in noun_table().head_of},
        "colours": dict.fromkeys(COLOUR_WORDS, 0),
        "materials": dict.fromkeys(MATERIAL_WORDS, 0),
    }


def _phrases(vocabulary: dict[str, Any]) -> dict[str, str]:
    """Every phrase that names a thing -> the noun it stands for."""
    phrases: dict[str, str] = {}
    for name in vocabulary.get("names", {}):
        phrases[name] = name
    for noun, entry in vocabulary["nouns"].items():
        phrases[noun] = noun
        # A bare count is accepted too: a table written by hand.
        for synonym in entry.get("synonyms", []) if isinstance(entry, dict) else []:
            phrases.setdefault(synonym.lower(), noun)
    return phrases


def _words_of(text: str) -> list[str]:
    return re.findall(r"[a-z0-9'-]+", text.lower())


def known_words(vocabulary: dict[str, Any] | None = None) -> set[str]:
    """Every single word that the captions may hold, for the tokenizer and for checks of prompts."""
    vocabulary = default_vocabulary() if vocabulary is None else vocabulary
    phrases = [*_phrases(vocabulary), *vocabulary.get("colours", ()), *vocabulary.get("materials", ())]
    phrases += [s for words in COLOUR_SYNONYMS.values() for s in words]
    words = {word for phrase in phrases for word in _words_of(phrase)}
    return words | set(_COMMON_WORDS)


# A few everyday words that spelling cannot lead from to a known noun.
_RELATED_WORDS: dict[str, tuple[str, ...]] = {
    "corgi": ("dog",),
    "poodle": ("dog",),
    "labrador": ("dog",),
    "puppy": ("dog",),
    "elephant": ("cow", "horse"),
    "lion": ("cat", "wolf"),
    "tiger": ("cat", "fox"),
    "bear": ("wolf", "doll"),
    "sheep": ("alpaca", "cow"),
    "pig": ("cow",),
    "eagle": ("bird",),
    "owl": ("bird",),
    "duck": ("bird",),
    "dragon": ("dinosaur", "monster"),
    "castle": ("tower", "house"),
    "helicopter": ("airplane",),
    "jet": ("airplane", "spaceship"),
    "ufo": ("spaceship",),
    "banana": ("fruit",),
    "strawberry": ("fruit",),
    "pineapple": ("fruit",),
    "person": ("man", "woman"),
    "soldier": ("man", "knight"),
    "warrior": ("knight", "man"),
    "wizard": ("man", "woman"),
    "violin": ("guitar",),
    "telescope": ("camera",),
    "skyscraper": ("building",),
    "church": ("temple", "building"),
    "throne": ("armchair", "chair"),
    "pizza": ("burger", "cake"),
    "donut": ("cake",),
    "boot": ("shoe",),
}


def nearest_words(prompt: str, vocabulary: dict[str, Any] | None = None, *, num: int = 5) -> list[str]:
    """Known nouns or names nearest to the unknown words of `prompt`: by meaning, then by spelling."""
    vocabulary = default_vocabulary() if vocabulary is None else vocabulary
    phrases = _phrases(vocabulary)
    known = known_words(vocabulary)
    found: list[str] = []
    for word in reversed(_words_of(prompt)):
        if word in known:
            continue
        found += [noun for noun in _RELATED_WORDS.get(word, ()) if noun in vocabulary["nouns"]]
        found += [phrases[p] for p in difflib.get_close_matches(word, phrases, n=num, cutoff=0.6)]
        found += [p for p in phrases if len(word) > 3 and word in p.split()]
    return list(dict.fromkeys(found))[:num]


def nouns_in_prompt(prompt: str, vocabulary: dict[str, Any] | None = None) -> list[str]:
    """Known things named in `prompt`, longest phrases first, plural forms included."""
    vocabulary = default_vocabulary() if vocabulary is None else vocabulary
    text = " " + " ".join(_words_of(prompt)) + " "
    found: list[str] = []
    phrases = _phrases(vocabulary)
    for phrase in sorted(phrases, key=lambda p: (-len(p), p)):
        for form in (phrase, phrase + "s", phrase + "es"):
            if f" {form} " in text:
                found.append(phrases[phrase])
                text = text.replace(f" {form} ", " | ")
    return list(dict.fromkeys(found))


def unknown_prompt_warning(prompt: str, vocabulary: dict[str, Any] | None = None) -> str | None:
    """What `unknown_in_prompt` says, with where to look for more."""
    unknown = unknown_in_prompt(prompt, vocabulary)
    if unknown is None:
        return None
    return (
        f"{unknown} 'uni3d teacher vocabulary' lists what a teacher knows; a Stable Diffusion teacher knows "
        "far more: --teacher ID_OR_FOLDER."
    )


def unknown_in_prompt(prompt: str, vocabulary: dict[str, Any] | None = None) -> str | None:
    """A sentence if `prompt` names nothing the teacher knows, else if words are unknown, else None."""
    vocabulary = default_vocabulary() if vocabulary is None else vocabulary
    known = known_words(vocabulary)
    words = _words_of(prompt)
    unknown = [w for w in words if w not in known and w.rstrip("s") not in known and not w.isdigit()]
    nearest = nearest_words(prompt, vocabulary)
    hint = f" Nearest known: {', '.join(nearest)}." if nearest else ""
    if not nouns_in_prompt(prompt, vocabulary):
        return f"the teacher knows no object named in '{prompt}'.{hint}"
    if unknown:
        shown = ", ".join(f"'{word}'" for word in dict.fromkeys(unknown))
        return f"the teacher was not trained on {shown} and will mostly ignore it.{hint}"
    return None
