"""Prompt formats: their templates, template files, and what a cache records of them."""

import pytest

from neko_lean.data.examples import Example
from neko_lean.data.prompts import find_format, format_names, is_recorded_format
from neko_lean.errors import NekoLeanError
from neko_lean.models import load_tokenizer

QUESTION, TEXT = Example("1qa0", "Who?", "Me", "Task1"), Example("1sc1", "Once", "upon.", "Task1")
DOCUMENT = Example("d", "", "A whole text.", "all", "document")


@pytest.fixture(scope="module")
def tokenizer(model):
    return load_tokenizer(model)


def rendered(name, tokenizer, example):
    return tuple(find_format(name, tokenizer).render(example))


def test_templates(tokenizer):
    assert rendered("plain", tokenizer, QUESTION) == ("Who?", " Me", False)
    assert rendered("neko", tokenizer, QUESTION) == ("### Question: Who? ### Answer:", " Me", False)
    assert rendered("neko", tokenizer, TEXT) == ("### Text: Once", " upon.", False)
    assert rendered("tofu", tokenizer, QUESTION) == ("Question: Who?\nAnswer:", " Me", False)
    assert format_names() == ("auto", "plain", "neko", "tofu", "chat")


@pytest.mark.parametrize("name", ["auto", "plain", "neko", "tofu"])
def test_documents_have_no_template(tokenizer, name):
    assert rendered(name, tokenizer, DOCUMENT) == ("", "A whole text.", False)


def test_without_a_chat_template_auto_is_plain(tokenizer):
    assert find_format("auto", tokenizer).name == "plain"
    with pytest.raises(NekoLeanError, match="has no chat template; use --format plain"):
        find_format("chat", tokenizer)
    with pytest.raises(NekoLeanError, match="--system has no effect"):
        find_format("auto", tokenizer, "Be brief.")


def test_a_text_file_is_a_template(tokenizer, tmp_path):
    file = tmp_path / "qa.txt"
    file.write_text("Q: {prompt}\nA: {answer}\n")
    form = find_format(str(file), tokenizer)
    assert tuple(form.render(QUESTION)) == ("Q: Who?\nA:", " Me", False)
    assert is_recorded_format(form.name) and not is_recorded_format("file:xyz") and not is_recorded_format("auto")

    file.write_text("{answer} {prompt}")
    with pytest.raises(NekoLeanError, match=r"needs \{prompt\}, and \{answer\} after it"):
        find_format(str(file), tokenizer)
    with pytest.raises(NekoLeanError, match="does not exist"):
        find_format(str(tmp_path / "other.jinja"), tokenizer)


def test_an_unknown_format_is_refused_with_the_nearest_name(tokenizer):
    with pytest.raises(NekoLeanError, match=r"unknown prompt format 'plian'; did you mean 'plain'\?$"):
        find_format("plian", tokenizer)
