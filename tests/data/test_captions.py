"""Captions, colour words and the vocabulary of prompts."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from uni3d.data.captions import (
    canonical_caption,
    known_nouns,
    known_words,
    may_recolour,
    nearest_words,
    nouns_in_prompt,
    read_vocabulary,
    sample_caption,
    unknown_in_prompt,
    unknown_prompt_warning,
    vocabulary_from_records,
)
from uni3d.data.colours import COLOUR_WORDS, dominant_colours, nearest_colour_word, sample_colour
from uni3d.data.view_shards import ViewRecord
from uni3d.errors import UsageError
from uni3d.resources import weights_folder

CHAIR = ViewRecord(
    asset_id="x/chair",
    name="deck chair",
    noun="chair",
    category="furniture",
    colours=("red", "white"),
    materials=("wooden",),
    tags=(),
    main_colour=(0.8, 0.1, 0.1),
    role="teacher",
    source="test",
    creator="nobody",
    licence="CC0-1.0",
    azimuth_deg=10.0,
    elevation_deg=15.0,
    radius=2.4,
    fov_y_deg=40.0,
)
VASE = replace(
    CHAIR,
    asset_id="x/vase",
    name="vase with stripes",
    noun="vase",
    colours=("white", "blue"),
    materials=(),
    tags=("patterned", "refined"),
)


def captions(record: ViewRecord, num: int = 400) -> list[str]:
    rng = np.random.default_rng(0)
    return [sample_caption(record, rng) for _ in range(num)]


def test_canonical_captions() -> None:
    assert canonical_caption(CHAIR) == "a red and white wooden chair"
    assert canonical_caption(CHAIR, ("orange",)) == "an orange wooden chair"
    assert canonical_caption(CHAIR, ()) == "a wooden chair"
    assert canonical_caption(VASE) == "a white vase with blue stripes"
    assert canonical_caption(VASE, ("green",)) == "a green vase with stripes"
    grass = replace(CHAIR, name="grass", noun="grass", colours=("green",), materials=())
    assert canonical_caption(grass) == "green grass"


def test_no_word_is_said_twice() -> None:
    table = replace(CHAIR, name="wooden table", noun="table")
    assert all(text.split().count("wooden") <= 1 for text in captions(table))


def test_material_is_left_out_where_it_goes_without_saying() -> None:
    oak = replace(CHAIR, name="oak table", noun="table", colours=("brown",))
    assert all("wooden oak" not in text for text in captions(oak, 100))
    pine = replace(CHAIR, name="snowy pine tree", noun="pine tree", colours=("white",))
    assert canonical_caption(pine) == "a white pine tree"
    trees = replace(CHAIR, name="pine trees", noun="pine tree", colours=("green",))
    assert not any("a green pine trees" in text for text in captions(trees, 100))


def test_people_and_black_things_keep_their_colours() -> None:
    assert may_recolour(CHAIR)
    assert not may_recolour(replace(CHAIR, noun="woman"))
    assert not may_recolour(replace(CHAIR, main_colour=(0.04, 0.04, 0.04)))


def test_sampled_captions_vary_as_promised() -> None:
    texts = captions(CHAIR)
    share = Counter()
    for text in texts:
        share["view"] += text.endswith(", front view")
        share["red"] += "red" in text.split()
        share["name"] += "deck chair" in text
        share["synonym"] += "seat" in text
        assert text == text.lower()
    assert 0.72 < share["view"] / len(texts) < 0.88
    assert 0.72 < share["red"] / len(texts) < 0.88
    assert share["name"] > 60
    assert share["synonym"] > 20
    assert len(set(texts)) > 60


def test_view_word_follows_the_camera_and_can_be_left_out() -> None:
    rng = np.random.default_rng(1)
    above = replace(CHAIR, elevation_deg=75.0)
    assert any(t.endswith("overhead view") for t in captions(above, 20))
    assert not any("view" in sample_caption(above, rng, view=False) for _ in range(50))


def test_given_colours_replace_the_recorded_ones() -> None:
    rng = np.random.default_rng(2)
    texts = [sample_caption(CHAIR, rng, colours=("purple",)) for _ in range(100)]
    assert not any("red" in text.split() or "white" in text.split() for text in texts)
    assert any("purple" in text or "violet" in text for text in texts)


def test_painted_vases_are_called_refined_with_artistic_patterns() -> None:
    texts = captions(VASE)
    assert any("refined" in text for text in texts)
    assert any("with artistic patterns" in text for text in texts) or any(
        "with blue artistic patterns" in text for text in texts
    )
    assert any("white vase with blue stripes" in text for text in texts)


def test_every_caption_word_is_known() -> None:
    vocabulary = vocabulary_from_records([CHAIR, VASE])
    known = known_words(vocabulary)
    for text in captions(CHAIR) + captions(VASE):
        assert set(text.replace(",", "").split()) <= known


def test_vocabulary_round_trip_and_counts(tmp_path: Path) -> None:
    vocabulary = vocabulary_from_records([CHAIR, replace(CHAIR, azimuth_deg=90.0), VASE])
    assert vocabulary["nouns"]["chair"]["count"] == 1
    assert vocabulary["colours"]["white"] == 2
    path = tmp_path / "vocabulary.json"
    path.write_text(json.dumps(vocabulary))
    assert read_vocabulary(path) == vocabulary
    path.write_text("[]")
    with pytest.raises(UsageError):
        read_vocabulary(path)


def test_prompts_with_known_nouns_give_no_warning() -> None:
    for prompt in (
        "a red wooden chair",
        "a refined vase with artistic patterns",
        "blue sofas, front view",
    ):
        assert unknown_prompt_warning(prompt) is None
    assert nouns_in_prompt("a street light next to a palm tree") == ["street light", "palm tree"]


def test_the_shipped_vocabulary_knows_its_own_examples() -> None:
    vocabulary = read_vocabulary(weights_folder("teacher") / "vocabulary.json")
    assert unknown_prompt_warning("A refined vase with artistic patterns.", vocabulary) is None
    assert unknown_prompt_warning("a red wooden chair", vocabulary) is None
    warning = unknown_prompt_warning("a corgi", vocabulary)
    assert warning is not None and "Nearest known: dog" in warning
    assert "uni3d teacher" in warning and "uni3d teacher" not in (unknown_in_prompt("a corgi") or "")


def test_unknown_prompts_name_the_nearest_words() -> None:
    warning = unknown_prompt_warning("a corgi")
    assert warning is not None
    assert "dog" in warning
    assert "--teacher" in warning
    assert "table" in nearest_words("a tabel")
    assert unknown_prompt_warning("a quantum chair") is not None
    vocabulary = vocabulary_from_records([CHAIR])
    assert unknown_prompt_warning("a blue vase", vocabulary) is not None
    assert unknown_prompt_warning("a red chair", vocabulary) is None


def test_hand_written_vocabularies_with_bare_counts_are_understood() -> None:
    assert unknown_prompt_warning("a red chair", {"nouns": {"chair": 2}, "colours": {"red": 1}}) is None


def test_colour_words_are_nearest_to_their_own_prototypes() -> None:
    for word, prototypes in COLOUR_WORDS.items():
        assert all(nearest_colour_word(rgb) == word for rgb in prototypes), word
    rng = np.random.default_rng(0)
    for word in COLOUR_WORDS:
        assert all(nearest_colour_word(sample_colour(word, rng)) == word for _ in range(20)), word


def test_dominant_colours_see_through_shades_of_one_colour() -> None:
    rng = np.random.default_rng(0)
    wood = np.array([0.5, 0.3, 0.15]) * rng.uniform(0.8, 1.2, size=(700, 1))
    paint = np.array([0.1, 0.2, 0.8]) + rng.normal(0, 0.01, size=(300, 3))
    samples = np.concatenate([wood, paint]).clip(0, 1)
    colours = dominant_colours(samples)
    assert colours.words() == ("brown", "blue")
    np.testing.assert_allclose(colours.shares[0], 0.7, atol=0.02)
    is_main = colours.is_main(samples)
    assert is_main[:700].mean() > 0.98
    assert is_main[700:].mean() < 0.02


def test_known_nouns_hold_the_everyday_ones() -> None:
    assert {"chair", "table", "car", "dog", "vase", "tree"} <= set(known_nouns())
