"""From file and catalogue names to words for captions: a cleaned full name and its head word (noun).

Cleaning is generic, so that any folder works; tables in `naming_tables/` add what is known about particular
collections: better names, parts to skip, and which way an asset faces.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import yaml

MAX_NAME_WORDS = 6

_WORD_BREAKS = re.compile(
    r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|(?<=[A-Za-z])(?=\d)|(?<=\d)(?=[A-Za-z])"
)
_NOISE_WORDS = frozenset(
    (
        "obj glb gltf ply mesh model asset final new copy export lod fbx blend textured lowpoly low poly "
        "high hd v"
    ).split()
)


@dataclass(frozen=True)
class NamedAsset:
    """What a naming table says about one file; `skip_reason` is empty for assets that are kept."""

    name: str
    noun: str
    yaw_deg: float = 0.0
    skip_reason: str = ""


@dataclass(frozen=True)
class NounTable:
    """Head words: `synonyms` of each noun, `head_of` every listed name, and word lists for captions."""

    synonyms: dict[str, tuple[str, ...]]
    head_of: dict[str, str]
    no_article: frozenset[str]
    wooden_when_brown: frozenset[str]
    has_front: frozenset[str]
    no_material: frozenset[str]
    keep_colours: frozenset[str]


@cache
def noun_table() -> NounTable:
    """The noun table shipped with the package."""
    raw = _load("nouns.yaml")
    head_of: dict[str, str] = {}
    for noun, entry in raw["nouns"].items():
        for included in entry.get("includes", []):
            head_of[included] = noun
    head_of.update({noun: noun for noun in raw["nouns"]})
    for noun, entry in raw["nouns"].items():
        for synonym in entry.get("synonyms", []):
            head_of.setdefault(synonym, noun)
    return NounTable(
        synonyms={noun: tuple(entry.get("synonyms", ())) for noun, entry in raw["nouns"].items()},
        head_of=head_of,
        no_article=frozenset(raw["no_article"]),
        wooden_when_brown=frozenset(raw["wooden_when_brown"]),
        has_front=frozenset(raw["has_front"]),
        no_material=frozenset(raw["no_material"]),
        keep_colours=frozenset(raw["keep_colours"]),
    )


@cache
def _load(file_name: str) -> dict[str, Any]:
    text = resources.files("uni3d.data").joinpath("naming_tables", file_name).read_text(encoding="utf-8")
    return yaml.safe_load(text)


def clean_name(text: str, *, drop_words: frozenset[str] = frozenset()) -> str:
    """Lower-case words of a file name: camel case and underscores split; numbers and noise dropped.

    >>> clean_name("WatchTower_FirstAge_Level1")
    'watch tower first age level'
    """
    spaced = _WORD_BREAKS.sub(" ", re.sub(r"[_\-.()\[\]+,;:/\\]+", " ", text))
    words = [re.sub(r"[^a-z']", "", word) for word in spaced.lower().split() if not word.isdigit()]
    kept = [
        w for w in words if w and w not in _NOISE_WORDS and w not in drop_words and (len(w) > 1 or w == "a")
    ]
    return " ".join(kept[:MAX_NAME_WORDS])


def noun_of(name: str) -> str:
    """Head word of a cleaned name: the longest known noun that ends it, else its last word.

    A known noun before "with", "of" or "in" counts as the end: "chair with cushion" is a chair.
    """
    heads = noun_table().head_of
    if name in heads:
        return heads[name]
    phrase = re.split(r" (?:with|of|in|on|for|under) ", name)[0] or name
    words = phrase.split()
    for start in range(len(words)):
        candidate = " ".join(words[start:])
        for form in (candidate, _singular(candidate)):
            if form in heads:
                return heads[form]
    return words[-1] if words else name


def _singular(phrase: str) -> str:
    if phrase.endswith("ies"):
        return phrase[:-3] + "y"
    if phrase.endswith(("shes", "ches", "xes", "sses")):
        return phrase[:-2]
    return phrase[:-1] if phrase.endswith("s") and not phrase.endswith("ss") else phrase


def name_file(stem: str, folder: str = "") -> NamedAsset:
    """Name the asset in `<folder>/<stem>.*`, by a collection's table when the folder is one of its packs."""
    table = _load("quaternius.yaml")
    if folder in table["packs"]:
        return _name_by_table(stem, folder, table)
    name = clean_name(stem)
    return NamedAsset(name, noun_of(name), skip_reason="" if name else "the file name holds no word")


def collection_of(folder: str) -> dict[str, str]:
    """Source, creator and licence when `folder` names a pack of a known collection, else empty."""
    table = _load("quaternius.yaml")
    if folder not in table["packs"]:
        return {}
    return {key: table[key] for key in ("source", "creator", "licence")}


def _name_by_table(stem: str, folder: str, table: dict[str, Any]) -> NamedAsset:
    for suffix in table["suffixes_to_cut"]:
        stem = stem.removesuffix(suffix)
    key = f"{folder}/{stem}"
    if any(re.search(pattern, key) for pattern in table["skip"]):
        return NamedAsset("", "", skip_reason="a part of a kit or an effect, by the naming table")
    yaw_deg = next((yaw for pattern, yaw in table["yaw_deg"] if re.search(pattern, key)), 0.0)
    name = next((name for pattern, name in table["packs"][folder] if re.search(pattern, stem)), "")
    name = name or clean_name(stem, drop_words=frozenset(table["drop_words"]))
    return NamedAsset(name, noun_of(name), float(yaw_deg), "" if name else "the file name holds no word")


def name_catalogue_entry(catalogue_name: str) -> NamedAsset:
    """Name an entry of a furniture catalogue (.sh3f)."""
    table = _load("sweethome3d.yaml")
    text = catalogue_name.lower().replace("°", "")
    if any(re.search(pattern, text) for pattern in table["skip"]):
        return NamedAsset("", "", skip_reason="a fitting, mark or part, by the naming table")
    if text not in table["names"]:
        text = re.sub(r"\b(seats|zones|panes?)\b|\d+", " ", text)
        text = re.sub(r"\s+", " ", text).strip()
    name = table["names"].get(text, text)
    return NamedAsset(name, noun_of(name), skip_reason="" if name else "the catalogue name holds no word")
