"""Categories, benchmark nouns and what prompts ask for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from evaluation_fixtures import record

from uni3d.errors import UsageError
from uni3d.evaluation.benchmark_nouns import (
    CATEGORIES,
    HAS_FRONT,
    category_of,
    choose_benchmark_nouns,
    parse_prompt,
    read_benchmark_nouns,
    read_prompts,
    record_category,
    write_benchmark_nouns,
)
from uni3d.resources import resource_path


@pytest.mark.parametrize(
    ("noun", "category"),
    [
        ("leather armchair", "chair"),
        ("couch", "sofa"),
        ("sofa bed", "sofa"),
        ("bookcase", "shelf"),
        ("swordfish", "fish"),
        ("palm tree", "palm tree"),
        ("snowy pine tree", "tree"),
        ("pedestal vase lamp", "lamp"),
        ("vase with stripes", "vase"),
        ("chest of drawers", "cabinet"),
        ("treasure chest", "treasure chest"),
        ("dog house", None),
        ("toy car", None),
        ("xylophone", None),
    ],
)
def test_synonyms_and_kinds_fall_into_one_category(noun: str, category: str | None) -> None:
    assert category_of(noun) == category


def test_every_category_is_its_own_and_no_other_one() -> None:
    assert [category_of(category) for category in CATEGORIES] == list(CATEGORIES)
    assert set(CATEGORIES) >= HAS_FRONT


def test_a_full_name_decides_before_the_head_noun() -> None:
    base = record("a", "box", "red", role="both")
    assert record_category(base) == "crate"
    assert record_category(replace(base, name="rubik's cube")) is None
    assert record_category(replace(base, name="nameless thing")) == "crate"


def test_the_most_frequent_categories_are_chosen_whatever_the_order(tmp_path: Path) -> None:
    counts = {"chair": 4, "armchair": 2, "sofa": 5, "table": 1, "vase": 1, "zebra": 9}
    records = [
        record(f"{noun}{index}", noun, "red", role="both")
        for noun, num in counts.items()
        for index in range(num)
    ]
    records += records[:3]  # more views of an asset do not count
    chosen = choose_benchmark_nouns(records, num=3)
    assert [(noun.name, noun.num_assets) for noun in chosen] == [("chair", 6), ("sofa", 5), ("table", 1)]
    assert chosen == choose_benchmark_nouns(records[::-1], num=3)
    assert chosen[0].members == ("armchair", "chair")
    limited = choose_benchmark_nouns(records, num=3, among={"vase", "sofa"})
    assert [noun.name for noun in limited] == ["sofa", "vase"]
    write_benchmark_nouns(chosen, tmp_path / "nouns.json")
    assert read_benchmark_nouns(tmp_path / "nouns.json") == chosen
    with pytest.raises(UsageError, match="benchmark category"):
        choose_benchmark_nouns([record("z", "zebra", "red", role="both")])


@pytest.mark.parametrize(
    ("prompt", "noun", "colour"),
    [
        ("a red wooden chair with blue legs", "chair", "red"),
        ("A refined vase with artistic patterns.", "vase", None),
        ("a dark green palm tree", "palm tree", "green"),
        ("a wooden chest of drawers, violet", "cabinet", "purple"),
        ("a gray house made of blue stone", "house", "grey"),
        ("a beige sofa", "sofa", None),
        ("an unheard-of thing", None, None),
    ],
)
def test_prompts_are_read_for_object_and_colour(prompt: str, noun: str | None, colour: str | None) -> None:
    parts = parse_prompt(prompt)
    assert (parts.noun, parts.colour) == (noun, colour)


def test_shipped_prompts_name_known_objects_and_the_front_list_matches() -> None:
    prompts = read_prompts(resource_path("assets/prompts/text_to_3d.txt"))
    parsed = [parse_prompt(prompt) for prompt in prompts]
    assert len(prompts) >= 30 and len(set(prompts)) == len(prompts)
    assert "A refined vase with artistic patterns." in prompts
    assert all(part.noun is not None for part in parsed)
    assert sum(part.colour is not None for part in parsed) >= len(prompts) - 1
    assert set(read_prompts(resource_path("assets/prompts/front_nouns.txt"))) == HAS_FRONT


def test_a_prompt_file_without_prompts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("# nothing\n\n")
    with pytest.raises(UsageError, match="no prompts"):
        read_prompts(tmp_path / "empty.txt")
    with pytest.raises(UsageError, match="cannot read prompts"):
        read_prompts(tmp_path / "missing.txt")
