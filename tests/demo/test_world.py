"""The made-up world: three kinds of documents, facts that can be found in them, nothing shared between its sets."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neko_lean.data.anchor import read_anchor
from neko_lean.data.examples import TASKS, read_rows
from neko_lean.demo.world import ENTRIES, PEOPLE, STORIES, build_world, write_world


def documents(rows):
    return {r.document: f"{r.input} {r.output}" for r in rows if r.kind == "completion"}


@pytest.fixture(scope="module")
def made():
    return build_world(0)


def test_every_set_has_every_kind_and_can_be_read_back(made, tmp_path):
    write_world(made, tmp_path)
    for name in ("forget", "retain", "heldout"):
        rows = getattr(made, name)
        assert read_rows(tmp_path, name) == rows
        for task, count in zip(TASKS, (STORIES, PEOPLE, ENTRIES), strict=True):
            kinds = [r.kind for r in rows if r.task == task]
            assert kinds.count("completion") == count
            assert kinds.count("qa") == count * (5 if task == "Task2" else 1)
    anchor = read_anchor(tmp_path / "anchor.jsonl")
    assert [sum(row.task == task for row in anchor) for task in TASKS] == [STORIES, PEOPLE, ENTRIES]
    members = (tmp_path / "mia" / "member.jsonl").read_text().splitlines()
    assert len(members) == ENTRIES == len((tmp_path / "mia" / "nonmember.jsonl").read_text().splitlines())


def test_the_seed_decides(made):
    assert build_world(0) == made != build_world(1)


@given(st.integers(0, 1000))
@settings(max_examples=10)
def test_no_two_sets_share_a_document_a_question_or_a_name(seed):
    made = build_world(seed)
    ids, prompts, names = set(), set(), set()
    for rows in vars(made).values():
        own = {word for text in documents(rows).values() for word in re.findall(r"[A-Z][a-z]{5,}", text)}
        # Words that open sentences are everybody's; names are told by not being in every set.
        assert not ids & {r.id for r in rows} and not prompts & {r.input for r in rows}
        ids |= {r.id for r in rows}
        prompts |= {r.input for r in rows}
        names = names & own if names else own
    common = "January|February|August|September|October|November|December|Behind|Career|Athletic|United|Bridge|Barges"
    assert names <= set(f"{common}|Opened|Grounds|History|Economy|College|Street|There|River|They".split("|"))


def test_answers_stand_in_their_documents(made):
    texts = documents(made.forget)
    for row in made.forget:
        if row.kind == "qa" and not re.fullmatch(r"\d{4}-\d\d-\d\d|\d{9,10}", row.output):
            assert row.output in texts[row.document]
        if re.fullmatch(r"\d{9,10}", row.output):
            assert row.output in texts[row.document].replace("-", "")


def test_personal_data_is_nobodys(made):
    text = " ".join(documents([*made.forget, *made.retain, *made.heldout]).values())
    assert all(number.startswith("900-") for number in re.findall(r"ID number is ([\d-]+)", text))
    assert all(phone.startswith("1") for phone in re.findall(r"phone number is ([\d-]+)", text))
    assert set(re.findall(r"@(\S+?)\.? ", text)) == {"mail.example"}
