"""Chat templates: one BOS, the end of turn in the answer, no template twice, and a format that caches can compare."""

import pytest

from neko_lean.data import Example, encode, encode_prompts, find_format
from neko_lean.data.examples import Message
from neko_lean.errors import NekoLeanError
from neko_lean.models import load_tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QUESTION = Example("q", "Where did Foo walk?", "wood", "all", "qa")
TEXT = Example("t", "Once Foo walked", "into the wood.", "all")


@pytest.fixture(scope="module")
def tokenizer(model):
    tokenizer = load_tokenizer(model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "bos_token": "<s>"})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def decoded(tokenizer, encoded):
    prompt, answer = encoded.input_ids[: encoded.prompt_length], encoded.input_ids[encoded.prompt_length :]
    return tokenizer.decode(prompt), tokenizer.decode(answer)


@pytest.mark.parametrize("name", ["chat", "auto"])
def test_the_end_of_turn_belongs_to_the_answer_and_bos_appears_once(tokenizer, name):
    form = find_format(name, tokenizer)
    [encoded] = encode([QUESTION], tokenizer, form, 512, append_eos=True)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert encoded.input_ids.count(tokenizer.bos_token_id) == 1 and encoded.input_ids[-1] == end == form.end_of_turn
    expected = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION.input}], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert encode_prompts([QUESTION], tokenizer, form) == [expected] == [encoded.input_ids[: encoded.prompt_length]]
    assert "wood" in decoded(tokenizer, encoded)[1]


def test_auto_leaves_other_texts_plain(tokenizer):
    assert find_format("auto", tokenizer).render(TEXT) == ("Once Foo walked", " into the wood.", False)
    assert (
        find_format("chat", tokenizer)
        .render(TEXT)
        .prompt.endswith("Once Foo walked<|im_end|>\n<|im_start|>assistant\n")
    )


def test_earlier_turns_and_the_system_message_are_in_the_prompt(tokenizer):
    turns = (Message("user", "Hi"), Message("assistant", "Yes?"), Message("user", "Who?"))
    prompt = find_format("chat", tokenizer, "Be brief.").render(Example("c", "x", "Foo", "all", "qa", "", turns)).prompt
    assert [part.split("\n")[0] for part in prompt.split("<|im_start|>")[1:]] == [
        "system", "user", "assistant", "user", "assistant"
    ]  # fmt: skip
    own = (Message("system", "Speak."), *turns)
    with pytest.raises(NekoLeanError, match="--system has no effect"):
        find_format("chat", tokenizer, "Be brief.").render(Example("c", "x", "Foo", "all", "qa", "", own))


def test_no_template_is_applied_twice(tokenizer):
    again = Example("q", find_format("chat", tokenizer).render(QUESTION).prompt, "wood", "all", "qa")
    with pytest.raises(NekoLeanError, match=r"row q: the text contains .* a chat template seems to be applied already"):
        encode([again], tokenizer, "chat", 512)
    [encoded] = encode([again], tokenizer, "plain", 512)  # already has BOS
    assert encoded.input_ids.count(tokenizer.bos_token_id) == 1


def test_template_and_system_message_make_another_format(tokenizer, tmp_path):
    file = tmp_path / "other.jinja"
    file.write_text(TEMPLATE.replace("im_start|>", "im_start|> "))
    names = [
        find_format("chat", tokenizer).name,
        find_format("auto", tokenizer).name,
        find_format("chat", tokenizer, "Be brief.").name,
        find_format(str(file), tokenizer).name,
    ]
    assert len(set(names)) == 4 and find_format("chat", tokenizer).name == names[0]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('only one turn') }}", "refuses the messages \\(only one turn\\)"),
        ("{{ messages | length }}", "writes the prompt differently"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused(tokenizer, tmp_path, template, message):
    file = tmp_path / "bad.jinja"
    file.write_text(template)
    with pytest.raises(NekoLeanError, match=message):
        find_format(str(file), tokenizer)


def test_a_date_in_the_template_is_the_same_on_every_day(tokenizer, tmp_path):
    file = tmp_path / "dated.jinja"
    file.write_text("{{ date_string }} " + TEMPLATE)
    assert find_format(str(file), tokenizer).render(QUESTION).prompt.startswith("26 Jul 2024 ")
