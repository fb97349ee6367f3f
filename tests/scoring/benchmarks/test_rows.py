import json
import os
from pathlib import Path

import pytest

from neko_lean.errors import NekoLeanError
from neko_lean.scoring.benchmarks import read_muse, read_tofu, read_tofu_reference
from neko_lean.scoring.benchmarks.muse import cut_at_stop_text

TOFU = Path(os.environ.get("NEKO_LEAN_TOFU", Path(__file__).parents[4] / "shared" / "data" / "tofu"))


def write(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_muse(folder):
    qa = [{"question": "Where?", "answer": "Here."}]
    write(folder / "verbmem" / "forget.jsonl", [{"prompt": "Once upon", "gt": "a time."}])
    for name in ("forget_qa", "forget_qa_icl", "retain_qa", "retain_qa_icl"):
        write(folder / "knowmem" / f"{name}.jsonl", qa)
    write(folder / "privleak" / "forget.json", [{"text": "A text."}])
    write(folder / "privleak" / "holdout.json", [{"text": "Another text."}])


@pytest.mark.skipif(not TOFU.is_dir(), reason="needs the TOFU files")
@pytest.mark.parametrize(("split", "count"), [("forget01", 40), ("forget05", 200), ("forget10", 400)])
def test_published_tofu_files(split, count):
    rows = read_tofu(TOFU, split)
    sizes = [len(part) for part in (rows.forget, rows.retain, rows.real_authors, rows.world_facts, rows.holdout)]
    assert sizes == [count, 400, 100, 117, count]
    assert rows.forget[0].correct != rows.forget[0].example.output and len(rows.forget[0].wrong) == 5
    assert rows.world_facts[0].correct == rows.world_facts[0].example.output


def test_unknown_split_and_missing_file(tmp_path):
    with pytest.raises(NekoLeanError, match="unknown TOFU split 'forget1'"):
        read_tofu(tmp_path, "forget1")
    with pytest.raises(NekoLeanError, match=r"forget01_perturbed\.json does not exist"):
        read_tofu(tmp_path, "forget01")


def test_muse_questions_follow_their_in_context_examples(tmp_path):
    write_muse(tmp_path)
    rows = read_muse(tmp_path)
    question = rows.forget_knowledge[0]
    assert question.input == "Question: Where?\nAnswer: Here.\n\nQuestion: Where?\nAnswer:"
    assert [message.role for message in question.messages] == ["user", "assistant", "user"]
    assert rows.verbatim[0].kind == "completion" and rows.holdout_texts == ["Another text."]


def test_answers_end_at_the_first_stop_text():
    assert cut_at_stop_text(" Here.\nQuestion: Who?\n\nmore") == "Here."


def test_reference_needs_truth_ratios(tmp_path):
    file = tmp_path / "scores.json"
    file.write_text('{"truth_ratios": [0.5, 1], "min_k_auc": 0.4}')
    assert read_tofu_reference(file).truth_ratios == [0.5, 1.0]
    file.write_text('{"truth_ratios": []}')
    with pytest.raises(NekoLeanError, match="does not contain TOFU results"):
        read_tofu_reference(file)
