"""An interrupted score resumes from its generations, and only with the same plan."""

import json

import pytest

from neko_lean.errors import NekoLeanError
from neko_lean.outputs.place import claim_folder
from neko_lean.scoring.generation import Generation
from neko_lean.scoring.score_folder import GENERATIONS, PLAN, add_generations, open_score_folder, read_generations

PLANNED = {"model": "abc", "rows": ["forget 1", "retain 2"], "max_new_tokens": 8}
ONE, TWO = Generation("it ünd\n so", "it", "eos"), Generation("", "", "limit")


def open_folder(out, plan=PLANNED, *, resume=False, overwrite=False):
    output = claim_folder(out, "partial", [], overwrite=overwrite, resume=resume)
    return open_score_folder(output, plan, resume=resume, quiet=True)


def interrupt(out, *batches):
    with pytest.raises(KeyboardInterrupt), open_folder(out) as stage:
        for batch in batches:
            add_generations(stage, batch)
        raise KeyboardInterrupt
    return out.parent / f".{out.name}.partial"


def test_generations_are_kept_and_read_again(tmp_path):
    stage = interrupt(tmp_path / "out", [(1, ONE)], [(0, TWO)])
    assert stage.is_dir() and not (tmp_path / "out").exists()
    (stage / "relearn").mkdir()  # left by an attack of a killed process
    with open_folder(tmp_path / "out", resume=True) as again:
        assert again == stage and read_generations(stage) == {1: ONE, 0: TWO}
    assert not stage.exists() and sorted(p.name for p in (tmp_path / "out").iterdir()) == [GENERATIONS]


def test_incomplete_last_line_is_dropped(tmp_path):
    stage = interrupt(tmp_path / "out", [(1, ONE)], [(0, TWO)])
    whole = (stage / GENERATIONS).read_bytes()
    first = whole.index(b"\n") + 1
    for end in range(len(whole) + 1):
        (stage / GENERATIONS).write_bytes(whole[:end])
        found = read_generations(stage)
        assert found == ({} if end < first else {1: ONE} if end < len(whole) else {1: ONE, 0: TWO})
        assert (stage / GENERATIONS).stat().st_size == (0 if end < first else first if end < len(whole) else end)
        add_generations(stage, [(2, TWO)])
        assert read_generations(stage)[2] == TWO


def test_other_plan_is_refused_by_name(tmp_path):
    stage = interrupt(tmp_path / "out", [(1, ONE)])
    with (
        pytest.raises(NekoLeanError, match=r"another max_new_tokens, model: "),
        open_folder(tmp_path / "out", {**PLANNED, "model": "x", "max_new_tokens": 9}, resume=True),
    ):
        pass
    assert read_generations(stage) == {1: ONE}
    with (
        pytest.raises(NekoLeanError, match=r"--resume"),
        open_folder(tmp_path / "out"),
    ):
        pass
    with open_folder(tmp_path / "out", overwrite=True) as fresh:
        assert read_generations(fresh) == {}


def test_folder_without_generations_is_removed(tmp_path):
    assert not interrupt(tmp_path / "out").exists()
    assert list(tmp_path.iterdir()) == []


def test_interrupted_while_writing_the_plan(tmp_path):
    stage = tmp_path / ".out.partial"
    stage.mkdir()
    (stage / f".{PLAN}.123.tmp").write_text('{"model": ')
    with open_folder(tmp_path / "out", resume=True) as again:
        assert json.loads((again / PLAN).read_text()) == PLANNED
        assert [path.name for path in again.iterdir()] == [PLAN]


@pytest.mark.parametrize("plan", [None, b'{"model": ', b"[]", b"\xff"])
def test_generations_without_a_readable_plan_are_refused_and_kept(tmp_path, plan):
    stage = interrupt(tmp_path / "out", [(1, ONE)])
    (stage / PLAN).unlink() if plan is None else (stage / PLAN).write_bytes(plan)
    with pytest.raises(NekoLeanError, match="start anew with --overwrite"), open_folder(tmp_path / "out", resume=True):
        pass
    assert read_generations(stage) == {1: ONE}
