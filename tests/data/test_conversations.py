"""Conversations: the last turn is the answer, and the prompt can be replaced."""

from neko_lean.data.conversations import prompt_text, with_prompt
from neko_lean.data.example_types import Example, Message

FIRST = (Message("system", "Be brief."), Message("user", "Who?"))


def test_another_prompt_replaces_the_last_turn_of_the_user():
    single = Example("a", "Who?", "Foo.", "all", kind="qa", messages=FIRST)
    assert with_prompt(single, "Which one?").messages == (FIRST[0], Message("user", "Which one?"))
    assert with_prompt(single, "Which one?").input == "Which one?"

    turns = (*FIRST, Message("assistant", "Foo."), Message("user", "And?"))
    changed = with_prompt(Example("a", prompt_text(turns), "Bar.", "all", kind="qa", messages=turns), "Who else?")
    assert changed.messages == (*turns[:-1], Message("user", "Who else?"))
    assert changed.input == "System: Be brief.\nUser: Who?\nAssistant: Foo.\nUser: Who else?"
    assert with_prompt(Example("a", "Who?", "Foo.", "all"), "Which?") == Example("a", "Which?", "Foo.", "all")
