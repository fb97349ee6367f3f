"""Texts in other scripts: their normal form and their words."""

# ruff: noqa: RUF001

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score import tokenizers

from neko_lean.data.scripts import UnicodeTokenizer, bare, fold, normal, units, visible_share, words


@given(st.text(alphabet=st.characters(max_codepoint=127)))
def test_words_of_plain_english_are_those_of_rouge(text):
    assert UnicodeTokenizer().tokenize(text) == tokenizers.DefaultTokenizer(use_stemmer=True).tokenize(text)
    assert units(text) == text.split()


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Она родилась, в 1984-м", "она родилась в 1984 м"),
        ("Τρία πουλιά", "τρια πουλια"),
        ("東京タワーは高い。", "東 京 タ ワ ー は 高 い"),
        ("が", "が"),  # a letter with a combining mark, composed or decomposed
        ("iPhone12を買う", "iphone12 を 買 う"),
        ("สวัสดี", "ส วั ส ดี"),
        ("हिन्दी में", "हिन्दी में"),
        ("안녕 세계", "안녕 세계"),
        ("سلام دنیا", "سلام دنیا"),
        ("café-bar", "cafe bar"),
    ],
)
def test_words(text, wanted):
    import unicodedata

    found = [unicodedata.normalize("NFC", word) for word in words(fold(text))]
    without = lambda word: "".join(c for c in unicodedata.normalize("NFD", word) if c not in "\u0301")  # noqa: E731
    assert [unicodedata.normalize("NFC", without(word)) for word in found] == wanted.split()


@pytest.mark.parametrize(
    ("one", "two"),
    [("ISPARTA", "ısparta"), ("İstanbul", "istanbul"), ("Straße", "STRASSE"), ("１２３", "123"), ("١٢٣", "۱۲۳"),
     ("é", "e\u0301"), ("ﬁn", "fin"), ("می\u200cخواهم", "میخواهم"), ("ΟΔΟΣ", "οδος"), ("Ｔｏｋｙｏ", "tokyo"),
     ("Quoi ?", "Quoi?"), ("東京 都", "東京都"), ("a\u00a0b", "a  b"), ("do n't", "don't")],
)  # fmt: skip
def test_equal_answers(one, two):
    assert normal(one) == normal(two) and bare(one) == bare(two)


def test_different_answers():
    for one, two in (("a b", "ab"), ("Москва", "Минск"), ("कि", "का"), ("no", "no."), ("1984", "1985")):
        assert normal(one) != normal(two)
    assert words(fold("कि")) != words(fold("का"))


@given(st.text(max_size=30), st.text(max_size=30))
def test_bare_form_of_a_prefix_is_a_prefix_of_the_bare_form(begin, rest):
    assert bare(begin + rest).startswith(bare(begin))


@given(st.text(max_size=30))
def test_bare_form_of_the_normal_form_is_the_same(text):
    assert bare(normal(text)) == bare(text)


def test_share_of_words_that_the_official_rouge_sees():
    assert visible_share("born in 1984") == 1 and visible_share("родилась в 1984") == pytest.approx(1 / 3)
    assert visible_share("東京") == 0 and visible_share("...") == 0
