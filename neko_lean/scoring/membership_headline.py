"""The headline of membership inference: the strongest of all attacks, with an interval that allows for their number.

Each attack is tested in both directions (AUC) and on both sides of unseen documents at once (two-sided AUC). With eight
tests, one of the 95 % intervals excludes 0.5 by chance for about every fifth model that never saw the documents.
Therefore the intervals are widened as in Bonferroni's correction. Scores may lack any key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from neko_lean.scoring.membership_attacks import MEMBERSHIP_ATTACKS
from neko_lean.scoring.values import Interval, interval, number, value_at

ERROR_RATE = 0.05  # of all tests of a model together
STATISTICS = ("auc", "two_sided_auc")


@dataclass(frozen=True)
class MembershipTest:
    """One statistic of one attack.

    Attributes:
        attack: the attack's key in scores.json.
        is_two_sided: whether the value is the two-sided AUC.
        value: the AUC.
        interval: its interval, widened for the number of tests; None if it was not measured.
    """

    attack: str
    is_two_sided: bool
    value: float
    interval: Interval | None

    @property
    def is_conspicuous(self) -> bool:
        """Whether members can be identified: the interval excludes 0.5; for the two-sided AUC, it is above."""
        if self.interval is None:
            return False
        low, high = self.interval
        return low > 0.5 or (high < 0.5 and not self.is_two_sided)

    @property
    def strength(self) -> float:
        """Distance from 0.5; negative if a two-sided AUC is below, which identifies no members."""
        return self.value - 0.5 if self.is_two_sided else abs(self.value - 0.5)

    @property
    def key(self) -> str:
        """Dotted key of the value in scores.json."""
        return f"membership.attacks.all.{self.attack}.{'two_sided_auc' if self.is_two_sided else 'auc'}"

    @property
    def label(self) -> str:
        """The attack in words."""
        attack = MEMBERSHIP_ATTACKS.get(self.attack)
        name = self.attack.replace("_", " ") if attack is None else attack.label
        return f"{name}, two-sided" if self.is_two_sided else name


def membership_tests(scores: Any) -> list[MembershipTest]:
    """All tests on all documents, with intervals that together contain every true value 95 times out of 100."""
    table = value_at(scores, "membership", "attacks", "all")
    if isinstance(table, Mapping) and table:
        measured = [(str(name), value_at(table, name)) for name in table]
    else:
        measured = [("loss", value_at(scores, "membership"))]  # older scores

    found = [
        (name, key, value, interval(attack, f"{key}_interval"))
        for name, attack in measured
        for key in STATISTICS
        if (value := number(attack, key)) is not None
    ]
    return [
        MembershipTest(name, key == "two_sided_auc", value, None if ends is None else _widened(value, ends, len(found)))
        for name, key, value, ends in found
    ]


def _widened(value: float, ends: Interval, num_tests: int) -> Interval:
    """A 95 % interval of an AUC, widened for the number of tests."""
    normal = NormalDist()
    factor = normal.inv_cdf(1 - ERROR_RATE / num_tests / 2) / normal.inv_cdf(1 - ERROR_RATE / 2)
    low, high = (value + factor * (end - value) for end in ends)
    return max(0.0, min(low, value)), min(1.0, max(high, value))


def strongest_attack(scores: Any) -> MembershipTest | None:
    """The test that identifies members best; None if none was measured.

    Conspicuous tests come first, and among them those of an AUC: a two-sided AUC then only repeats what they show.
    """

    def order(test: MembershipTest) -> tuple[bool, bool, float]:
        return test.is_conspicuous, test.is_conspicuous and not test.is_two_sided, test.strength

    return max(membership_tests(scores), key=order, default=None)


def num_attacks(scores: Any) -> int:
    """Number of attacks that were run."""
    return len({test.attack for test in membership_tests(scores)})
