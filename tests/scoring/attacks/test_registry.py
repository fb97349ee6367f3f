"""The registry of attacks: unknown names and options of other attacks are refused."""

from dataclasses import fields

import pytest

from neko_lean.errors import NekoLeanError
from neko_lean.options import ScoreSettings
from neko_lean.scoring.attacks import ATTACKS, check_attacks


def test_registered_attacks():
    assert list(ATTACKS) == ["prefix", "paraphrase", "sample", "quantize", "relearn"]
    assert [name for name, attack in ATTACKS.items() if attack.reloads_model] == ["quantize", "relearn"]
    assert [name for name, attack in ATTACKS.items() if attack.needs_paraphrases] == ["paraphrase"]


def test_help_lists_every_attack():
    (help_text,) = [field.metadata["help"] for field in fields(ScoreSettings) if field.name == "attacks"]
    assert all(name in help_text for name in ATTACKS)


def test_unknown_attack_suggests_the_nearest_one():
    with pytest.raises(NekoLeanError, match=r"unknown attack 'quantise'; did you mean 'quantize'\?"):
        check_attacks(ScoreSettings(attacks=("prefix", "quantise")))


@pytest.mark.parametrize(
    ("option", "attacks"), [({"relearn_lr": 1e-4}, ("relearn",)), ({"seed": 0}, ("sample", "relearn"))]
)
def test_option_of_an_attack_that_was_not_requested_is_refused(option, attacks):
    for name in attacks:
        check_attacks(ScoreSettings(attacks=(name,), **option))
    with pytest.raises(NekoLeanError, match=f"has no effect without --attack {' or '.join(attacks)}"):
        check_attacks(ScoreSettings(attacks=("prefix",), **option))
