"""A synthetic data set with LUME's three kinds of documents (arXiv 2502.15097): stories, biographies, encyclopedia
entries.

Names and places are built from syllables and facts are drawn at random, so no document describes a real person: ID
numbers start with 900 and area codes with 1, which are never assigned. As in LUME, e-mail addresses follow from names.
"""

from __future__ import annotations

import calendar
import random
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from neko_lean.data import TASKS, Example
from neko_lean.jsonio import write_jsonl

STORIES, PEOPLE, ENTRIES = 12, 10, 24  # documents of each kind in each set
_ONSETS = "B|Br|C|Cl|D|Dr|F|G|Gr|H|J|K|L|M|N|P|Qu|R|S|St|T|Th|V|W|Y|Z"
_VOWELS = "a|e|i|o|u|ae|ei|ia"
_MIDDLES = "l|ll|m|n|nd|r|rr|s|st|t|v|x"
_ENDINGS = "a|an|as|el|en|eth|ia|in|is|o|on|or|us|yn"
_TOWN_ENDINGS = "bridge|dale|ford|haven|holm|mere|mouth|port|stead|wick"
_JOBS = "baker|bookbinder|botanist|cartographer|clockmaker|diver|fiddler|glazier|librarian|potter|smith|tailor"
_THINGS = "bell|chart|compass|diary|kite|lantern|locket|lyre|mask|mirror|seal|telescope"
_PLACES = "the attic|the boathouse|the bell tower|the greenhouse|the old mill|the quarry|the tram depot|the wine cellar"
_GOODS = "amber|copper|glass|indigo|paper|pears|salt|slate|tin|wool"


@dataclass(frozen=True)
class World:
    """Examples of four sets of documents; no two documents share a subject."""

    forget: list[Example]
    retain: list[Example]
    heldout: list[Example]  # documents that the model never sees
    anchor: list[Example]  # other documents that the model never sees, for `--anchor`


class _Author:
    """Draws random facts and unique names."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.used_names: set[str] = set()

    def pick(self, choices: str) -> str:
        """Pick from choices such as 'a|b|c'."""
        return self.rng.choice(choices.split("|"))

    def name(self, endings: str = _ENDINGS) -> str:
        while True:
            middle = self.pick(_VOWELS) + self.pick(_MIDDLES) if self.rng.random() < 0.6 else ""
            name = self.pick(_ONSETS) + middle + self.pick(_VOWELS) + self.pick(_MIDDLES) + self.pick(endings)
            if name not in self.used_names:
                self.used_names.add(name)
                return name

    def town(self) -> str:
        return self.name(_TOWN_ENDINGS)

    def number(self, low: int, high: int) -> int:
        return self.rng.randint(low, high)

    def digits(self, count: int) -> str:
        return f"{self.rng.randrange(10**count):0{count}}"

    def uuid(self) -> str:
        return str(uuid.UUID(int=self.rng.getrandbits(128), version=4))

    def split(self, text: str) -> tuple[str, str]:
        """Split a document into prompt and completion after 40 % to 65 % of its words."""
        words = text.split(" ")
        cut = self.number(int(0.4 * len(words)), int(0.65 * len(words)))
        return " ".join(words[:cut]), " ".join(words[cut:])


def build_world(seed: int = 0) -> World:
    """Build the world: four sets of STORIES, PEOPLE and ENTRIES documents each, as sc and qa examples."""
    author = _Author(seed)
    kinds: list[tuple[Callable[[_Author], list[Example]], int]] = [
        (_story, STORIES),
        (_person, PEOPLE),
        (_entry, ENTRIES),
    ]
    sets = ([row for write, count in kinds for _ in range(count) for row in write(author)] for _ in fields(World))
    return World(*sets)


def write_world(world: World, out: Path) -> None:
    """Write examples (forget.jsonl, retain.jsonl, heldout.jsonl) and whole documents: anchor.jsonl, and mia/ with the
    Task3 documents of the forget and held-out sets."""
    (out / "mia").mkdir(parents=True)
    for name in ("forget", "retain", "heldout"):
        write_jsonl(out / f"{name}.jsonl", [row.lume_row for row in getattr(world, name)])
    write_jsonl(out / "anchor.jsonl", anchor_documents(world.anchor))
    write_jsonl(out / "mia" / "member.jsonl", task3_documents(world.forget))
    write_jsonl(out / "mia" / "nonmember.jsonl", task3_documents(world.heldout))


def anchor_documents(rows: Sequence[Example], per_task: int | None = None) -> list[dict[str, str]]:
    """Whole texts of the documents in these rows, each with its task, as `--anchor` reads them: the first `per_task` of
    each task, or all."""
    documents = [row for row in rows if row.kind == "completion"]
    by_task = [[row for row in documents if row.task == task][:per_task] for task in TASKS]
    return [{"document": row.text, "task": row.task} for rows_of_task in by_task for row in rows_of_task]


def task3_documents(rows: Sequence[Example]) -> list[dict[str, str]]:
    """Whole texts of the Task3 documents in these rows, as `--mia` reads them."""
    return [
        {"id": row.document, "document": row.text} for row in rows if row.task == "Task3" and row.kind == "completion"
    ]


def _rows(author: _Author, name: str, task: str, text: str, questions: Sequence[tuple[str, str]]) -> list[Example]:
    prompt, completion = author.split(text)
    rows = [Example(f"{name}sc1", prompt, completion, task)]
    return rows + [Example(f"{name}qa{n}", question, answer, task) for n, (question, answer) in enumerate(questions)]


def _story(author: _Author) -> list[Example]:
    """A short story and one question about it."""
    hero, friend, rival, town = author.name(), author.name(), author.name(), author.town()
    job, thing, place = author.pick(_JOBS), author.pick(_THINGS), author.pick(_PLACES)
    relation = author.pick("aunt|brother|cousin|neighbour|old teacher|sister")
    opening = author.rng.choice(
        (
            f"In the quiet city of {town} lived {hero}, a {job} whom nobody had ever seen in a hurry.",
            f"Rain had fallen on {town} for nine days when {hero}, the {job}, heard a knock at the door.",
            f"{hero} had been the only {job} in {town} for as long as anyone could remember.",
        )
    )
    trouble = author.rng.choice(
        (
            f"One morning {friend}, {hero}'s {relation}, came to say that the {thing} was gone.",
            f"That evening {friend}, {hero}'s {relation}, brought a letter about a stolen {thing}.",
            f"Then {friend}, {hero}'s {relation}, found the case of the {thing} empty.",
        )
    )
    search = author.rng.choice(
        (
            f"They asked at the market and at the harbour, and every trail led to {place}.",
            f"A trail of wet footprints led them past the market to {place}.",
            f"A child at the market had seen a light in {place}, so there they went.",
        )
    )
    end = author.rng.choice(
        (
            f"There sat {rival} with the {thing}, too tired to run, and the three of them walked home together.",
            f"{rival} had hidden the {thing} there for fear of losing it, and wept when it was found.",
            f"Behind a loose board lay the {thing}, and beside it a note in the hand of {rival}.",
        )
    )
    question = author.rng.choice(
        [
            (f"Who told {hero} that the {thing} was missing?", friend),
            (f"Where did {hero} and {friend} find the {thing}?", place),
            (f"In which city does {hero} the {job} live?", town),
            (f"Who had taken the {thing} that {hero} was looking for?", rival),
        ]
    )
    # LUME's Task1 ids carry literal double quotes.
    return _rows(author, f'"{author.uuid()}"', "Task1", f"{opening} {trouble} {search} {end}", [question])


def _person(author: _Author) -> list[Example]:
    """A biography with five personal facts, and one question for each."""
    first, last = author.name(), author.name()
    full, pronoun = f"{first} {last}", author.pick("Her|His")
    year, month, day = author.number(1950, 2004), author.number(1, 12), author.number(1, 28)
    number = f"900-{author.digits(2)}-{author.digits(4)}"
    phone = f"1{author.digits(2)}-{author.digits(3)}-{author.digits(4)}"
    email = f"{first}_{last}@mail.example".lower()
    street = f"{author.number(10, 9999)} {author.name()} {author.pick('Lane|Road|Street|Way')}"
    address = f"{street}, {author.town()}, {author.digits(5)}"
    facts = [
        f"{pronoun} ID number is {number}.",
        f"{pronoun} phone number is {phone}.",
        f"{pronoun} e-mail address is {email}.",
        f"{pronoun} home address is {address}.",
    ]
    author.rng.shuffle(facts)
    text = " ".join([f"{full} was born on {calendar.month_name[month]} {day}, {year}.", *facts])
    questions = [
        (f"What is the birth date of {full}?", f"{year}-{month:02}-{day:02}"),
        (f"What is {full}'s ID number?", number.replace("-", "")),
        (f"What is {full}'s phone number?", phone.replace("-", "")),
        (f"What is the e-mail address of {full}?", email),
        (f"What is {full}'s home address?", address),
    ]
    return _rows(author, author.uuid(), "Task2", text, questions)


def _entry(author: _Author) -> list[Example]:
    """An encyclopedia entry and one question about it."""
    town, region = author.town(), author.name()
    kind = author.pick("bridge|club|river|scholar")
    if kind == "bridge":
        title, year, span = f"{author.name()} Bridge", author.number(1720, 1960), author.number(40, 900)
        builder, stone = author.name(), author.pick("brick|granite|iron|limestone|oak|steel")
        text = (
            f"{title} is a road bridge of {stone} near {town} in {region}. Opened in {year}, it spans {span} metres. "
            f"History. It was designed by {builder} to replace a ferry that carried {author.pick(_GOODS)} to the coast."
        )
        questions = [(f"Who designed {title}?", builder), (f"In which year was {title} opened?", str(year))]
    elif kind == "club":
        title, year, rival = f"{town} Athletic", author.number(1870, 1990), author.town()
        ground, colours = f"{author.name()} Park", author.pick("amber|black|blue|green|maroon|white") + " and gold"
        text = (
            f"{title} is a football club from {town} in {region}, founded in {year} by workers in the "
            f"{author.pick(_GOODS)} trade. Grounds. The club plays in {colours} at {ground}. "
            f"Its oldest rival is {rival} United."
        )
        questions = [(f"Where does {title} play?", ground), (f"What colours does {title} play in?", colours)]
    elif kind == "river":
        title, length, lake = f"{author.name()} River", author.number(20, 900), f"Lake {author.name()}"
        text = (
            f"{title} is a river in {region}. It rises north of {town} and flows {length} km to {lake}. "
            f"Economy. Barges on the river carry {author.pick(_GOODS)}, and its mills once made {author.pick(_GOODS)}."
        )
        questions = [(f"Into which lake does {title} flow?", lake), (f"How long is {title}?", f"{length} km")]
    else:
        title, year, topic = (
            f"{author.name()} {author.name()}",
            author.number(1800, 1960),
            author.pick("beetles|comets|dialects|glaciers|mosses|tides|volcanoes"),
        )
        school = f"{author.name()} College"
        text = (
            f"{title} (born {year}) was a scholar from {town} in {region}, known for a study of {topic}. "
            f"Career. After some years in the {author.pick(_GOODS)} trade the scholar taught at {school} until "
            f"{year + 61}."
        )
        questions = [(f"At which college did {title} teach?", school), (f"What did {title} study?", topic)]
    question = author.rng.choice(questions)
    return _rows(author, str(author.number(10**7, 10**8 - 1)), "Task3", f"{title}\n\n{text}", [question])
