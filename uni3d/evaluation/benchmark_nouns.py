"""The categories that measurements choose among, the colours, and which objects have a front.

A category is one everyday noun with its synonyms and sub-kinds merged, so that no two of the benchmark's
nouns are near-synonyms (an armchair is a chair, a bookcase is a shelf, a boulder is a rock). Which of the
candidate categories enter the benchmark is a function of the records alone: those with the most assets.
Things that are flat or featureless, so that many of their views show nothing (coins, keys, plates, clouds),
are no candidates.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from uni3d.errors import UsageError

# First match wins, so that "sofa bed" is a sofa and "swordfish" a fish. Patterns see the lower-case noun.
_RULES: tuple[tuple[str, str], ...] = (
    ("", r"\balien\b|\bspace (house|building|base)|^(dog|doll) house|hot dog|rocking horse|horse statue"),
    ("", r"\b(pool|football|ping pong|changing|dressing|table tennis) (table|bat)|table fan|abdominal bench"),
    ("", r"\b(wheelchair|toy car|workbench|armchair ottoman|fitness tower|spice tower|trapdoor|crossbow)\b"),
    (
        "",
        r"flower bed|number |seedling$|stump$|statue$|clothes horse|piano bench|towel",
    ),
    (
        "",
        r"rubik|puzzle|card game|matchbox|\bkit$|health pack|\bblock$|\bgift$|bread box|\brack$|key card",
    ),
    (
        "",
        r"(punching|sleeping) bag|parchment|scroll$|newspaper|calendar|lily pad|cactus flower|helmet|padlock",
    ),
    ("", r"induction|chest freezer|grenade|\bfork ?lift|\bbus$|sci-fi chest|\b(monitor|screen)$"),
    ("", r"gazebo|barracks|archery|\b(port|market|mine|dome|center)$|storage building"),
    ("vase", r"\b(vase|amphora|pottery|urn)\b(?!.*\blamp)"),
    ("fish", r"fish$|shark$|piranha|\btuna\b|\bkoi\b"),
    ("palm tree", r"\b(palm|coconut) trees?$"),
    ("tree", r"\btrees?$|\bwillow$|\bbirch$|\boak$|\bpine$"),
    ("rock", r"\b(rocks?|boulder|stone)$"),
    ("sofa", r"\b(sofa|couch|futon|settee|day bed)\b"),
    ("chair", r"\b(chair|armchair|rocker)\b"),
    ("stool", r"\bstool$"),
    ("bench", r"\bbench$"),
    ("cabinet", r"\b(cabinet|wardrobe|cupboard|dresser|drawers|nightstand|bedside table|sideboard|locker)\b"),
    ("table", r"\b(table|desk)$|\btable (on|with)\b"),
    ("shelf", r"shel(f|ves)$|bookcase"),
    ("bed", r"\b(bed|crib)$"),
    ("traffic light", r"traffic light"),
    ("street light", r"street (light|lamp)|lamppost|\b(park light|outdoor lamp)$"),
    ("lamp", r"lamp\b|\blight$|\bchandelier$|\blantern$|spotlight"),
    ("door", r"\bdoors?$"),
    ("potted plant", r"potted plant|houseplant|\b(ficus|yucca|lily|succulent|spider) plant|plant pot"),
    ("bush", r"\b(bush|hedge|shrub)$"),
    ("cactus", r"\bcactus$"),
    ("flower", r"(?<!cactus )\bflowers?$|tulips?$|orchids?$|\bwhite lily$|\brose$"),
    ("mushroom", r"\bmushroom$"),
    ("bottle", r"\bbottle$|flacon|\bpotion$"),
    ("horse", r"\b(horse|donkey|pony)$"),
    ("dog", r"\bdog$|bulldog|husky|\bwolf$"),
    ("dinosaur", r"dinosaur|saurus$"),
    ("house", r"\b(house|building|cottage|hut|inn|cabin)$"),
    ("tower", r"tower$"),
    ("windmill", r"windmill"),
    ("spaceship", r"spaceship|\brocket$"),
    ("robot", r"\brobot$|\bmech$"),
    ("car", r"\b(car|sedan|suv|taxi)$"),
    ("truck", r"\b(truck|lorry|van)$"),
    ("tank", r"\b(military tank|army tank)$|^tank$"),
    ("boat", r"boat$|\bship$"),
    ("motorbike", r"motorbike|motorcycle|\bscooter$"),
    ("sword", r"\b(sword|katana|claymore|dagger)$"),
    ("axe", r"\baxe$"),
    ("hammer", r"\bhammer$"),
    ("shield", r"\bshield$"),
    ("bow", r"\bbow$"),
    ("rifle", r"\b(rifle|shotgun|submachine gun)$"),
    ("pistol", r"\b(pistol|revolver|flare gun)$"),
    ("barrel", r"\bbarrel$"),
    ("crate", r"\b(crate|package)$|^(cardboard |wooden |open cardboard )?box$"),
    ("treasure chest", r"\btreasure chest$|^chest$|^trunk$"),
    ("book", r"\bbook$"),
    ("trash can", r"\b(trash can|dustbin|bin|garbage can)$"),
    ("sink", r"\b(sink|washbasin|basin)$"),
    ("toilet", r"\btoilet$"),
    ("bathtub", r"bathtub|jacuzzi"),
    ("bag", r"\b(bag|backpack|handbag|pouch|sack)$"),
    ("crystal", r"\b(crystal|gem|diamond)$"),
    ("planet", r"^planet$"),
    ("fence", r"\bfence$"),
    ("campfire", r"\b(campfire|bonfire)$"),
    ("computer", r"\b(computer|laptop)$"),
    ("television", r"\btelevision$|^tv$"),
    ("refrigerator", r"\b(refrigerator|fridge|freezer)$"),
    ("oven", r"\b(oven|stove|cooker)$"),
    ("washing machine", r"\b(washing|dryer) machine$"),
    ("ladder", r"\bladder$"),
    ("skull", r"^skull$"),
    ("fireplace", r"^fireplace$"),
    ("bicycle", r"\b(bicycle|bike)$"),
)
_COMPILED = tuple((category, re.compile(pattern)) for category, pattern in _RULES)
CATEGORIES: tuple[str, ...] = tuple(dict.fromkeys(category for category, _ in _RULES if category))

# Categories whose front a person can tell from the back and the sides.
HAS_FRONT = frozenset(
    "bed bench bicycle boat cabinet car chair computer dinosaur dog fireplace fish horse motorbike oven "
    "refrigerator robot shelf sink skull sofa spaceship tank television toilet truck windmill".split()
) | {"treasure chest", "washing machine", "traffic light"}

# The colour words that measurements choose among: no two of them are shades of each other.
BENCHMARK_COLOURS: tuple[str, ...] = (
    "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "grey",
)  # fmt: skip
_COLOUR_ALIASES = {"gray": "grey", "violet": "purple", "crimson": "red", "navy": "blue"}


def _match(text: str) -> str | None:
    """The category, "" for what is known to be none of them, None where no rule speaks."""
    for category, pattern in _COMPILED:
        if pattern.search(text):
            return category
    return None


def category_of(noun: str) -> str | None:
    """The category that `noun` belongs to ("bookcase" -> "shelf"), None if it is in none of them."""
    return _match(noun.lower().strip()) or None


class NamedRecord(Protocol):
    """What is read of a view record: asset id, full name ("leather armchair") and head noun ("armchair")."""

    @property
    def asset_id(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def noun(self) -> str: ...


def record_category(record: NamedRecord) -> str | None:
    """The category of a record: by its full name if a rule speaks of that, else by its head noun."""
    by_name = _match(record.name.lower().strip())
    return (by_name or None) if by_name is not None else category_of(record.noun)


def record_has_front(record: NamedRecord) -> bool | None:
    """Whether the object has a recognisable front; None where its category is not known."""
    category = record_category(record)
    return None if category is None else category in HAS_FRONT


def basic_colour(word: str) -> str | None:
    """The benchmark colour that a colour word is a shade of ("dark green" -> "green"), None for others."""
    last = word.lower().split()[-1] if word.strip() else ""
    last = _COLOUR_ALIASES.get(last, last)
    return last if last in BENCHMARK_COLOURS else None


@dataclass(frozen=True)
class BenchmarkNoun:
    """One of the benchmark's nouns: name, whether it has a front, number of assets, nouns merged into it."""

    name: str
    has_front: bool
    num_assets: int
    members: tuple[str, ...]


def choose_benchmark_nouns(
    records: Iterable[NamedRecord], *, num: int = 50, among: Collection[str] | None = None
) -> list[BenchmarkNoun]:
    """Choose the `num` categories with the most assets, ties by name; sorted by name.

    Several records of one asset count once; `among` limits the choice. Raises UsageError if the records
    hold no known category at all; fewer than `num` categories are returned when the data has fewer.
    """
    assets = {record.asset_id: record for record in records}
    counts: Counter[str] = Counter()
    members: dict[str, set[str]] = {}
    for record in assets.values():
        category = record_category(record)
        if category is not None and (among is None or category in among):
            counts[category] += 1
            members.setdefault(category, set()).add(record.noun)
    if not counts:
        raise UsageError(
            "none of the records' nouns is a benchmark category; expected objects such as chair or tree"
        )
    ranked = sorted(counts, key=lambda category: (-counts[category], category))[:num]
    return [
        BenchmarkNoun(name, name in HAS_FRONT, counts[name], tuple(sorted(members[name])))
        for name in sorted(ranked)
    ]


def write_benchmark_nouns(nouns: Sequence[BenchmarkNoun], path: Path) -> None:
    """Save the list as JSON, one entry per noun."""
    from uni3d.training.checkpoint import atomic_write_text

    text = json.dumps([asdict(noun) for noun in nouns], indent=1)
    atomic_write_text(path, text + "\n")


def read_benchmark_nouns(path: Path) -> list[BenchmarkNoun]:
    """Read what `write_benchmark_nouns` wrote; UsageError if the file is missing or damaged."""
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))
        return [
            BenchmarkNoun(
                name=str(entry["name"]),
                has_front=bool(entry["has_front"]),
                num_assets=int(entry["num_assets"]),
                members=tuple(entry["members"]),
            )
            for entry in entries
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"cannot read the benchmark nouns from {path} ({error}); train the evaluator again"
        ) from None


@dataclass(frozen=True)
class PromptParts:
    """What a prompt asks for, as far as the evaluator can check it: a category and a benchmark colour."""

    noun: str | None
    colour: str | None


def parse_prompt(prompt: str) -> PromptParts:
    """Find the category and the colour a prompt asks for, each None if there is none.

    Both are looked for before the first "with", "of", "on", "in" or "made": "a red chair with blue legs" is a
    red chair. The noun is the longest phrase that ends last, the colour is the first colour word.
    """
    text = prompt.lower().replace("chest of drawers", "dresser")
    words = re.findall(r"[a-z0-9]+(?:[-'][a-z0-9]+)*", text)
    stops = [index for index, word in enumerate(words) if word in {"with", "of", "on", "made", "in"}]
    head = words[: stops[0]] if stops and stops[0] > 0 else words
    phrases = [" ".join(head[start:stop]) for stop in range(len(head), 0, -1) for start in range(stop)]
    noun = next((category for phrase in phrases if (category := category_of(phrase))), None)
    colours = [colour for colour in map(basic_colour, head) if colour is not None]
    return PromptParts(noun, colours[0] if colours else None)


def read_prompts(path: Path) -> list[str]:
    """Prompts of a text file, one a line; empty lines and lines that start with # are left out."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"cannot read prompts from {path} ({error}); pass a UTF-8 text file, one prompt a line"
        ) from None
    prompts = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not prompts:
        raise UsageError(f"{path} holds no prompts; write one a line")
    return prompts
