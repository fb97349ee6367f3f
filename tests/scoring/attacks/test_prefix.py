"""The prefix attack on a model that has memorised the forget set."""

import pytest

from neko_lean.scoring.attacks.prefix import prefix


@pytest.mark.slow
def test_prefix_recovers_the_rest_of_an_answer(make_target):
    curve = prefix(make_target(loaded=True))
    assert [point["tokens"] for point in curve] == [0, 1, 2, 4, 8]
    assert curve[0]["knowledge"] == curve[0]["regurgitation"] == 0
    assert curve[1]["knowledge"] > 0.9 and curve[1]["regurgitation"] > 0.9
    assert curve[0]["knowledge_rows"] == 12 >= curve[1]["knowledge_rows"] >= curve[4]["knowledge_rows"]
    low, high = curve[1]["regurgitation_interval"]
    assert low <= curve[1]["regurgitation"] <= high
