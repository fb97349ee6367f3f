"""A chat model from question/answer rows to a score: one chat template in the cache, the training and the score."""

import json

import pytest

from neko_lean import cache_teacher, score, unlearn
from neko_lean.errors import NekoLeanError
from neko_lean.options import CacheOptions, OutputOptions, RunOptions, ScoreSettings
from tests.helpers import make_chat_model

QUIET = {"device": "cpu", "quiet": True}


@pytest.fixture(scope="module")
def chat_model(model, tmp_path_factory):
    return make_chat_model(model, tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """TOFU's layout: JSON Lines in files called .json, without ids."""
    folder = tmp_path_factory.mktemp("rows")
    for name, people in (("forget", ("Foo", "Bar")), ("retain", ("Baz", "Qux"))):
        lines = [{"question": f"Where did {who} walk?", "answer": f"wood {who}"} for who in people]
        (folder / f"{name}.json").write_text("\n".join(map(json.dumps, lines)))
    return folder


def test_one_template_from_cache_to_score(chat_model, rows, tmp_path):
    manifest = cache_teacher(
        chat_model, tmp_path / "cache", retain=rows, cache=CacheOptions(dtype="float32"), run=OutputOptions(**QUIET)
    )
    assert manifest.format.startswith("auto:") and manifest.rows == 2

    options = {"recipe": "graddiff", "run": RunOptions(**QUIET)}
    steps = {"max_steps": 1, "dtype": "float32", "retain_objective": "kl"}
    unlearn(
        chat_model, tmp_path / "out", forget=rows, retain=rows, cache=tmp_path / "cache", overrides=steps, **options
    )
    with pytest.raises(NekoLeanError, match=r"was made in prompt format 'auto:.* this run uses 'plain'"):
        other = {**steps, "format": "plain"}
        unlearn(
            chat_model,
            tmp_path / "plain",
            forget=rows,
            retain=rows,
            cache=tmp_path / "cache",
            overrides=other,
            **options,
        )

    scores = score(
        tmp_path / "out",
        tmp_path / "scores",
        data=rows,
        settings=ScoreSettings(max_new_tokens=4),
        run=OutputOptions(**QUIET),
    )
    assert scores["format"] == manifest.format and scores["task_aggregate"] is None
    assert set(scores["cells"]) == {"forget.all.knowledge", "retain.all.knowledge"}
    assert [(group["split"], group["group"], group["kind"]) for group in scores["groups"]] == [
        ("forget", "all", "qa"),
        ("retain", "all", "qa"),
    ]
