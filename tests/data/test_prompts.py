"""Prompt formats: their templates, and the message about an unknown one."""

import pytest

from neko_lean.data.examples import Example
from neko_lean.data.prompts import FORMATS, prompt_and_answer
from neko_lean.errors import NekoLeanError


def test_templates():
    question, text = Example("1qa0", "Who?", "Me", "Task1"), Example("1sc1", "Once", "upon.", "Task1")
    assert prompt_and_answer(question, "plain") == ("Who?", " Me")
    assert prompt_and_answer(question, "neko") == ("### Question: Who? ### Answer:", " Me")
    assert prompt_and_answer(text, "neko") == ("### Text: Once", " upon.")
    assert FORMATS == ("plain", "neko")


def test_an_unknown_format_is_refused_with_the_nearest_name():
    example = Example("1sc1", "Once", "upon.", "Task1")
    with pytest.raises(NekoLeanError, match=r"unknown prompt format 'chat'; choose from plain, neko\.$"):
        prompt_and_answer(example, "chat")
    with pytest.raises(NekoLeanError, match=r"; did you mean 'plain'\?$"):
        prompt_and_answer(example, "plian")
