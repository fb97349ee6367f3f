"""Reading a damaged score either raises a one-sentence error, or everything computed from it works."""

import copy
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

import neko_lean
from neko_lean.data.examples import read_rows
from neko_lean.errors import NekoLeanError
from neko_lean.options import OutputOptions, ScoreInputs, ScoreSettings
from neko_lean.reporting.page import report
from neko_lean.scoring import job
from neko_lean.scoring.results import difference
from neko_lean.scoring.stored import read_score
from neko_lean.scoring.table import score_table
from neko_lean.scoring.verdict import verdict

REMOVED = object()
REPLACEMENTS = st.sampled_from(
    [REMOVED, None, True, 0, 1, -1, 0.5, 10**400, 1e300, float("nan"), float("inf"), "", "0.5", "x\x1b[/]", "\ud800",
     [], [[]], {}, {"a": [None]}, [0.1, "b"], "forget", "other", 2**63]
)  # fmt: skip


@pytest.fixture(scope="module")
def scored(world, model, tmp_path_factory):
    """A complete score: its folder, its rows, its scores and its lines."""
    out = tmp_path_factory.mktemp("scored") / "out"
    scores = neko_lean.score(
        model,
        out,
        data=world,
        inputs=ScoreInputs(mia=world / "mia"),
        settings=ScoreSettings(attacks=("prefix",), max_new_tokens=2),
        run=OutputOptions(quiet=True),
    )
    rows = [(split, row) for split in ("forget", "retain") for row in read_rows(world, split)]
    return out, rows, scores, read_score(out, rows)["lines"]


def places(value, path=()):
    """The path of every value in nested objects and lists."""
    yield path
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in pairs:
        yield from places(item, (*path, key))


def changed(value, path, other):
    """`value` with the item at `path` replaced or removed."""
    if not path:
        return None if other is REMOVED else other
    value = copy.copy(value)
    if len(path) > 1:
        value[path[0]] = changed(value[path[0]], path[1:], other)
    elif other is REMOVED:
        del value[path[0]]
    else:
        value[path[0]] = other
    return value


@pytest.mark.slow
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_change_is_refused_or_can_be_used(scored, tmp_path, data):
    out, rows, scores, lines = scored
    folder = tmp_path / "changed"
    folder.mkdir(exist_ok=True)
    spoilt, other = {"scores": scores, "lines": lines[:]}, data.draw(REPLACEMENTS)
    if data.draw(st.booleans()):
        spoilt["scores"] = changed(scores, data.draw(st.sampled_from(list(places(scores)))), other)
    else:
        number = data.draw(st.integers(0, len(lines) - 1))
        spoilt["lines"][number] = changed(lines[number], data.draw(st.sampled_from(list(places(lines[number])))), other)
    (folder / "scores.json").write_text(json.dumps(spoilt["scores"]))
    (folder / "generations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in spoilt["lines"]))
    try:
        before = read_score(folder, rows)
        changes = difference(scores, lines, before)
        assert all(isinstance(one, str) for one in verdict({**scores, "difference": changes}))
        json.dumps(changes, allow_nan=False)
        Console(quiet=True).print(score_table({"score": before}))
    except NekoLeanError as error:
        assert str(error).count("\n") == 0
    for given_ in ([out], [folder]):
        try:
            report([folder], tmp_path / "r.html", before=given_[0], overwrite=True)
        except NekoLeanError as error:
            assert str(error)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("scores.json", b"", "cannot be read as JSON"),
        ("scores.json", b"\xff\xfe", "UTF-16"),
        ("scores.json", b"\x80", "not UTF-8"),
        ("scores.json", b"[" * 10**5, "cannot be read as JSON"),
        ("scores.json", b'{"a":' * 900 + b"1" + b"}" * 900, "key model|cannot be read"),
        ("scores.json", b"[]", "not a JSON object"),
        ("scores.json", b'{"model": "x", "cells": {}, "x": NaN}', "finite"),
        ("scores.json", b'{"model": "x", "cells": {}, "x": 1e999}', "finite"),
        ("scores.json", b'{"model": "x", "cells": {}, "x": ' + b"9" * 5000 + b"}", "cannot be read"),
        ("scores.json", b'{"model": null, "cells": {}}', "key model: expected a text"),
        ("scores.json", b'{"model": "x", "cells": {"forget.Task1.knowledge": "1"}}', "key cells"),
        ("scores.json", b'{"model": "x", "cells": {}, "held_nll": "3"}', "key held_nll"),
        ("generations.jsonl", b"", "no rows"),
        ("generations.jsonl", b"{}", "older neko-lean"),
        ("generations.jsonl", b"[]\n", "JSON object"),
        ("generations.jsonl", b'{"id": "\xff"}', "UTF-8"),
        ("generations.jsonl", b'{"a":' * 5000, "nested too deep"),
    ],
)
def test_files_that_are_not_a_score(scored, tmp_path, name, content, words, monkeypatch, world, model):
    out, rows, _, _ = scored
    for other in ("scores.json", "generations.jsonl"):
        (tmp_path / other).write_bytes((out / other).read_bytes())
    (tmp_path / name).write_bytes(content)
    with pytest.raises(NekoLeanError, match=words):
        read_score(tmp_path, rows)
    monkeypatch.setattr(job, "load_model", lambda *args: pytest.fail("the model was loaded"))
    with pytest.raises(NekoLeanError, match=words):
        neko_lean.score(
            model, tmp_path / "new", data=world, inputs=ScoreInputs(before=tmp_path), run=OutputOptions(quiet=True)
        )


@pytest.mark.parametrize("change", ["twice", "text", "task", "fewer", "kind"])
def test_score_of_other_rows_is_refused(scored, tmp_path, change):
    out, rows, _, lines = scored
    first = dict(lines[0])
    changed_lines = {
        "twice": [first, *lines], "text": [{**first, "output": "another"}, *lines[1:]], "fewer": lines[1:],
        "task": [{**first, "task": "Task3"}, *lines[1:]], "kind": [{**first, "kind": "knowledge"}, *lines[1:]],
    }[change]  # fmt: skip
    (tmp_path / "scores.json").write_bytes((out / "scores.json").read_bytes())
    (tmp_path / "generations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in changed_lines))
    with pytest.raises(NekoLeanError, match=r"a duplicate row|other rows|key kind"):
        read_score(tmp_path, rows)
