"""Batched greedy generation equals generating one row at a time, and stopping early does not change a score."""

# ruff: noqa: RUF001

import json
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from neko_lean.data import encode_prompts
from neko_lean.data.examples import Example, read_rows
from neko_lean.data.scripts import bare
from neko_lean.models.causal_lm import as_causal_lm
from neko_lean.models.loading import load_model, load_tokenizer
from neko_lean.scoring import generation, limits
from neko_lean.scoring.generation import WINDOW, generate, generation_warnings, is_settled, to_generation
from neko_lean.scoring.limits import fit_prompt
from neko_lean.scoring.sampling import random_stream, sample_key, sampled_tokens
from neko_lean.scoring.task import example_score, unicode_score
from tests.helpers import LUME, make_rows, random_model, templated


def one_at_a_time(lm, tokenizer, rows, most, sample_keys=None):
    """The naive reference: without batches, cache, or `generate`."""
    texts = []
    for n, row in enumerate(rows):
        ids = tokenizer(row.input)["input_ids"]
        new = []
        stream = None if sample_keys is None else random_stream(sample_keys[n])
        while len(new) < most:
            with torch.no_grad():
                logits = lm.model(input_ids=torch.tensor([ids + new])).logits[:, -1]
            token = logits[0].argmax().item() if stream is None else sampled_tokens(logits, [stream], "a token")[0]
            new.append(token)
            if token == tokenizer.eos_token_id:
                break
        texts.append(cleaned_up(tokenizer.decode(new, skip_special_tokens=True)))
    return texts


def cleaned_up(text):
    """Clean up spaces as transformers 4 did, with which the shared task was scored."""
    for spaced in (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're"):
        text = text.replace(spaced, spaced.strip())
    return text


def sample_rows():
    rows = make_rows("Foo", 6)
    if LUME.is_dir():
        rows += read_rows(LUME, "forget", "validation")[::16]
    return rows


def in_order(lm, tokenizer, rows, **options):
    generations = dict(pair for batch in generate(lm, tokenizer, rows, **options) for pair in batch)
    assert sorted(generations) == list(range(len(rows)))
    return [generations[i] for i in range(len(rows))]


def sometimes_ending(world, folder):
    """A model that generates EOS instead of a likely token, so that the rows of a batch end at different steps."""
    lm = load_model(random_model(world, folder, seed=3, scale=5.0), torch.float32, torch.device("cpu"))
    tokenizer = load_tokenizer(folder)
    prompt = torch.tensor([tokenizer(sample_rows()[0].input)["input_ids"]])
    said = lm.model.generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, -1]
    with torch.no_grad():
        lm.head[tokenizer.eos_token_id] = lm.head[said] * 1.001
    return lm, tokenizer


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_batches_equal_single_rows(world, tmp_path, batch_size):
    lm, tokenizer = sometimes_ending(world, tmp_path / "m")
    rows = sample_rows()
    wanted = one_at_a_time(lm, tokenizer, rows, 12)
    got = in_order(lm, tokenizer, rows, batch_size=batch_size, max_new_tokens=12)
    assert [one.text for one in got] == [one.window for one in got] == wanted
    assert {one.ended for one in got} == {"eos", "limit"}


def test_generation_config_of_the_checkpoint_is_ignored(world, tmp_path):
    from transformers import GenerationConfig

    folder = random_model(world, tmp_path / "m", seed=3, scale=5.0)
    GenerationConfig(
        do_sample=True, temperature=9.0, repetition_penalty=3.0, max_length=5, num_beams=4
    ).save_pretrained(folder)
    lm = load_model(folder, torch.float32, torch.device("cpu"))
    tokenizer = load_tokenizer(folder)
    rows = sample_rows()[:6]
    got = in_order(lm, tokenizer, rows, batch_size=4, max_new_tokens=10)
    assert [one.text for one in got] == one_at_a_time(lm, tokenizer, rows, 10)


@pytest.mark.parametrize("shape", ["id", "list", "config.json"])
def test_generation_ends_where_that_of_transformers_ends(world, tmp_path, shape):
    """At an EOS token of the checkpoint that the tokenizer does not have."""
    folder = random_model(world, tmp_path / "m", seed=3, scale=5.0)
    lm, tokenizer = load_model(folder, torch.float32, torch.device("cpu")), load_tokenizer(folder)
    rows = sample_rows()[:6]
    prompt = torch.tensor([tokenizer(rows[0].input)["input_ids"]])
    end = int(lm.model.generate(prompt, max_new_tokens=6, do_sample=False)[0, -1])
    assert end != tokenizer.eos_token_id
    name = "config.json" if shape == "config.json" else "generation_config.json"
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / name).read_text()) if shape == "config.json" else {"do_sample": False}
    ends = end if shape == "id" else [tokenizer.eos_token_id, end]
    (folder / name).write_text(json.dumps({**config, "eos_token_id": ends}))

    lm = load_model(folder, torch.float32, torch.device("cpu"))
    got = in_order(lm, tokenizer, rows, batch_size=4, max_new_tokens=10, stop_early=False)
    for row, said in zip(rows, got, strict=True):
        prompt = torch.tensor([tokenizer(row.input)["input_ids"]])
        ids = lm.model.generate(prompt, max_new_tokens=10)[0, prompt.shape[1] :].tolist()
        assert said.text == cleaned_up(tokenizer.decode(ids, skip_special_tokens=True))
        assert said.ended == ("eos" if ids[-1] in (end, tokenizer.eos_token_id) else "limit")
    assert got[0].ended == "eos"


def few_positions(tokenizer, positions):
    """A GPT-2 with too few learned positions for some rows."""
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=positions, eos_token_id=None
    )
    lm = as_causal_lm(GPT2LMHeadModel(config).eval())
    with torch.no_grad():
        lm.head.mul_(20)
    return lm


def test_prompts_and_generations_fit_the_positions_of_the_model(world, model):
    tokenizer = load_tokenizer(model)
    lm, rows = few_positions(tokenizer, 16), make_rows("Foo", 6)
    lengths = [len(tokenizer(row.input)["input_ids"]) for row in rows]
    assert min(lengths) < 10 and max(lengths) > 16
    got = in_order(lm, tokenizer, rows, batch_size=5, max_new_tokens=10, stop_early=False)
    for row, said in zip(rows, got, strict=True):
        ids = tokenizer(row.input)["input_ids"][-8:]  # half of the positions are for new tokens
        new = []
        while len(new) < min(10, 16 - len(ids)) and tokenizer.eos_token_id not in new:
            with torch.no_grad():
                new.append(int(lm.model(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax()))
        assert said.text == cleaned_up(tokenizer.decode(new, skip_special_tokens=True)) and said.ended == "limit"

    prompts = encode_prompts(rows, tokenizer, "plain")
    (warning,) = generation_warnings(lm, prompts, 10)
    capped, cut = sum(length > 6 for length in lengths), sum(length > 8 for length in lengths)
    assert warning == (
        f"warning: {capped} of {len(rows)} rows have fewer than 10 new tokens (the minimum is 8), and {cut} rows lose "
        "the beginning of their prompt: the model has 16 positions."
    )
    assert generation_warnings(few_positions(tokenizer, 512), prompts, 10) == []


@pytest.mark.parametrize(
    ("length", "most", "limit", "wanted"),
    [(100, 50, 1024, (100, 50)), (1000, 256, 1024, (992, 32)), (990, 256, 1024, (990, 34)), (2000, 8, 1024, (1016, 8)),
     (30, 9, 4, (2, 2)), (3, 9, 2, (1, 1)), (9000, 7, 10**9, (2048, 7)),
     (9000, 7, 2050, (2043, 7)), (7, 10**6, 64, (7, 57))],
)  # fmt: skip
def test_prompt_keeps_its_end_and_leaves_room_for_new_tokens(monkeypatch, length, most, limit, wanted):
    monkeypatch.setattr(limits, "position_limit", lambda lm, longest: min(longest, limit))
    prompt, room = fit_prompt(None, list(range(length)), most)
    assert (len(prompt), room) == wanted and prompt == list(range(length))[-len(prompt) :]


def test_spaces_are_cleaned_up_and_special_tokens_dropped(world, model):
    tokenizer = load_tokenizer(model)
    said = tokenizer("It is n't here , is it ? " + tokenizer.eos_token)["input_ids"]
    got = to_generation(tokenizer, said, 3, "eos")
    assert got.text == "It isn't here, is it? " and got.ended == "eos"
    assert got.window == cleaned_up(tokenizer.decode(said[:3]))


@pytest.mark.parametrize("family", ["GPT2", "Bloom", "OPT", "Mistral", "Mamba"])
def test_batches_equal_single_rows_in_every_kind_of_model(world, model, family):
    """Learned positions, ALiBi, a sliding window, and a model with a recurrent state."""
    tokenizer = load_tokenizer(model)
    config, family_model = small(family, len(tokenizer))
    torch.manual_seed(1)
    lm = as_causal_lm(family_model(config).eval())
    with torch.no_grad():
        lm.head.mul_(20)
    rows = sample_rows()[:12]
    got = in_order(lm, tokenizer, rows, batch_size=5, max_new_tokens=14)
    assert [one.text for one in got] == one_at_a_time(lm, tokenizer, rows, 14)


@pytest.mark.parametrize(("family", "scale"), [("Llama", 10), ("GPT2", 10), ("Mistral", 10), ("Mamba", 1)])
def test_samples_do_not_depend_on_the_batches(world, model, family, scale):
    """Padded batches and a recurrent model give each row the samples that it gets when it is decoded alone."""
    tokenizer = load_tokenizer(model)
    config, family_model = small(family, len(tokenizer))
    torch.manual_seed(1)
    lm = as_causal_lm(family_model(config).eval())
    with torch.no_grad():
        lm.head.mul_(scale)
    rows = [row for row in sample_rows()[:6] for _ in range(3)]
    keys = [sample_key(5, row.id, sample) for row, sample in zip(rows, [0, 1, 2] * 6, strict=True)]

    options = {"max_new_tokens": 10, "sample_keys": keys}
    one, three, many = (in_order(lm, tokenizer, rows, batch_size=size, **options) for size in (1, 3, 32))
    assert one == three == many
    assert [said.text for said in many] == one_at_a_time(lm, tokenizer, rows, 10, keys)
    assert len({said.text for said in many}) > len(rows) - 3  # some begin with an EOS token


def small(family, vocabulary):
    """Config and class of a two-layer model of a family."""
    import transformers

    sizes = {"vocab_size": vocabulary, "hidden_size": 32, "num_hidden_layers": 2}
    if family in ("OPT", "Llama", "Mistral", "Bloom", "GPT2"):
        sizes |= {"num_attention_heads": 4}
    more = {
        "Llama": {"intermediate_size": 64, "eos_token_id": None},
        "Mistral": {"intermediate_size": 64, "num_key_value_heads": 2, "sliding_window": 8},
        "OPT": {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 1024},
        "Mamba": {"state_size": 8},
    }.get(family, {})
    name = f"{family}LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    return getattr(transformers, f"{family}Config")(**sizes, **more), getattr(transformers, name)


def test_prompts_have_no_appended_eos(model):
    lm, plain = load_model(model, torch.float32, torch.device("cpu")), load_tokenizer(model)
    ending, _, _ = templated(model, [], ["</s>"])
    lm.model.resize_token_embeddings(len(ending))
    lm, rows = as_causal_lm(lm.model), sample_rows()[:6]
    got = in_order(lm, ending, rows, batch_size=4, max_new_tokens=12)
    assert [one.text for one in got] == one_at_a_time(lm, plain, rows, 12)


def test_prompts_as_tokens(world, tmp_path):
    lm, tokenizer = sometimes_ending(world, tmp_path / "m")
    rows = sample_rows()[:4]
    longer = [tokenizer(f"{row.input} and so")["input_ids"] for row in rows]
    got = in_order(lm, tokenizer, rows, batch_size=3, max_new_tokens=8, prompts=longer)
    asked = [Example(row.id, f"{row.input} and so", row.output, row.task) for row in rows]
    assert [one.text for one in got] == one_at_a_time(lm, tokenizer, asked, 8)


def test_stopping_early_preserves_scores_and_windows(world, tmp_path, monkeypatch):
    monkeypatch.setattr(generation, "WINDOW", 4)
    monkeypatch.setattr(generation, "STRIDE", 3)
    lm, tokenizer = sometimes_ending(world, tmp_path / "m")
    said = one_at_a_time(lm, tokenizer, sample_rows(), 40)
    rows = []
    for number, (row, text) in enumerate(zip(sample_rows(), said, strict=True)):
        # Answers that the model gives in full, begins to give, or does not know.
        words = text.split()
        known = [row.output, " ".join(words[:3]) or "x", text.strip() or "x"][number % 3]
        rows.append(Example(row.id, row.input, known, row.task))
    options = {"batch_size": 8, "max_new_tokens": 40}
    full = in_order(lm, tokenizer, rows, **options, stop_early=False)
    short = in_order(lm, tokenizer, rows, **options)
    for row, one, two in zip(rows, full, short, strict=True):
        assert example_score(row, one.text) == example_score(row, two.text)
        assert unicode_score(row, one.text) == unicode_score(row, two.text)
        assert one.window == two.window
        assert one.text == two.text or (two.ended == "settled" and one.text.startswith(two.text[:-3]))
    assert sum(len(one.text) for one in short) < sum(len(one.text) for one in full)
    assert {one.ended for one in short} >= {"settled"} and all(one.ended != "settled" for one in full)
    assert WINDOW == 64


PIECES = ["don", "do", "n't", " n't", " ", "'", "s", " 's", ".", "A", "a", "Σ", "ς", "é", "12", "-", "walk", "ing"]
PIECES += [
    "Моск",
    "ва",
    "東",
    "京",
    "İ",
    "i",
    "\u0307",
    "\u0301",
    "ß",
    "ss",
    "１",
    "ı",
    "🎉",
    "ΐ",
    "\u200d",
    "ส",
    "วั",
    "।",
]


@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=8), st.lists(st.sampled_from(PIECES), max_size=8))
def test_settled_scores_stay_the_same(said, more):
    """For any answer, text and continuation: once settled, the longer text has the score of the shorter one."""
    short, longer = cleaned_up("".join(said)), cleaned_up("".join([*said, *more]))
    for output in (longer.strip(), short.strip(), "do", "a walk", "".join(more).strip(), "12"):
        for row in (Example("1qa0", "q", output, "Task1"), Example("1sc1", "q", output, "Task1")):
            if output and is_settled(row, short):
                assert example_score(row, longer) == example_score(row, short), (row, short, longer)
                assert unicode_score(row, longer) == unicode_score(row, short), (row, short, longer)
    assert not is_settled(Example("1qa0", "q", "walking", "Task1"), "wal") and is_settled(
        Example("1qa0", "q", "walking", "T"), "run"
    )


def test_bare_forms_are_equal_if_lower_case_is():
    """is_settled compares bare forms and the score lower case, so equal lower-case texts must have equal bare forms."""
    for code in range(sys.maxunicode + 1):
        one = chr(code)
        assert bare(one.lower()) == bare(one), hex(code)
