"""Errors: suggestions for unknown names, and first lines of messages."""

import pytest

from neko_lean.errors import Interrupted, did_you_mean, first_line


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("lrr", "; did you mean 'lr'?"),
        ("max_step", "; did you mean 'max_steps'?"),
        ("zebra", "; choose from lr, max_steps, seed."),
    ],
)
def test_a_similar_name_is_suggested(name, hint):
    assert did_you_mean(name, ["lr", "max_steps", "seed"]) == hint


def test_the_first_line_of_an_error_without_a_message_is_its_type():
    assert first_line(ValueError("one\ntwo")) == "one" and first_line(ValueError()) == "ValueError"


def test_interrupted_names_its_signal():
    assert str(Interrupted(15, "after step 3 of 10")) == "stopped by SIGTERM after step 3 of 10"
