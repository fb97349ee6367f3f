"""Values of scores.json in words."""

from neko_lean.scoring.values import percent


def test_small_shares_are_not_rounded_to_zero():
    assert [percent(share) for share in (0.0, 0.004, 0.005, 0.42)] == ["0 %", *["less than 1 %"] * 2, "42 %"]
