import pytest

from neko_lean.errors import NekoLeanError
from neko_lean.scoring.benchmarks import read_muse, read_tofu
from tests.helpers import TOFU
from tests.scoring.benchmarks.folders import write_muse


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
    assert rows.verbatim[0].kind == "completion" and rows.holdout_texts[0] == "Foo7 was born in a river and sang."
