"""The paraphrase attack on a model that has memorised the forget set."""

import pytest

from neko_lean.errors import NekoLeanError
from neko_lean.scoring.attacks.paraphrase import paraphrase
from neko_lean.scoring.paraphrases import Paraphrase


@pytest.mark.slow
def test_paraphrased_prompt_expects_the_same_answer(make_target, examples):
    question = next(example for example in examples if example.kind == "qa")
    paraphrases = [
        Paraphrase(question.id, question.input, None, ()),
        Paraphrase(question.id, "What is a fish?", None, ()),
    ]
    curve = paraphrase(make_target(paraphrases=paraphrases, loaded=True))
    assert [point["knowledge"] for point in curve] == [0.0, 0.5] and curve[1]["knowledge_rows"] == 2
    with pytest.raises(NekoLeanError, match="--paraphrases"):
        paraphrase(make_target(paraphrases=[Paraphrase(question.id, None, "x", ("y",))], loaded=True))
