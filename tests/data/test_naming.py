"""Names: generic cleaning, head words, and the tables of known collections."""

from __future__ import annotations

import pytest

from uni3d.data.naming import clean_name, name_catalogue_entry, name_file, noun_of, noun_table


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("WatchTower_FirstAge_Level1", "watch tower first age level"),
        ("old-wooden.chair_03_final", "old wooden chair"),
        ("SM_TVStand2", "sm tv stand"),
        ("12345", ""),
        ("model_v2_LOD1", ""),
    ],
)
def test_file_names_become_words(text: str, expected: str) -> None:
    assert clean_name(text) == expected


@pytest.mark.parametrize(
    ("name", "noun"),
    [
        ("shiba inu dog", "dog"),
        ("snowy dead birch tree", "tree"),
        ("snowy pine tree", "pine tree"),
        ("chair with cushion", "chair"),
        ("bag of coins", "bag"),
        ("leather couch", "sofa"),
        ("red apples", "apple"),
        ("flux capacitor", "capacitor"),
        ("vase with zigzag patterns", "vase"),
    ],
)
def test_head_words(name: str, noun: str) -> None:
    assert noun_of(name) == noun


def test_a_known_pack_uses_its_table_and_a_stranger_does_not() -> None:
    assert name_file("ShibaInu", "animals_pack").name == "shiba inu dog"
    assert name_file("Floor_Modular", "modular_dungeon_1").skip_reason
    assert name_file("Tank2", "tank_pack").yaw_deg == 90
    stranger = name_file("Floor_Modular", "my_models")
    assert stranger.name == "floor modular"
    assert not stranger.skip_reason


def test_catalogue_names() -> None:
    assert name_catalogue_entry("Sofa 3 seats").name == "sofa"
    assert name_catalogue_entry("TV 16:9").name == "television"
    assert name_catalogue_entry("Square type G plug").skip_reason


def test_noun_table_is_consistent() -> None:
    table = noun_table()
    nouns = set(table.synonyms)
    assert 150 <= len(nouns) <= 300
    assert set(table.head_of.values()) <= nouns
    assert table.has_front <= nouns
    assert table.wooden_when_brown <= nouns
    assert table.no_material <= nouns
    assert table.keep_colours <= nouns
    assert all(noun == noun.lower() for noun in nouns)
