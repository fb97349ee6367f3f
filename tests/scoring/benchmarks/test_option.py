"""`score --benchmark`: end to end on a random model, with a retain-only model, resuming, and refusals."""

import json
import shutil

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from neko_lean.cli import app
from neko_lean.data import encode, encode_prompts, find_format
from neko_lean.errors import NekoLeanError
from neko_lean.models.loading import load_model, load_tokenizer
from neko_lean.options import ScoreInputs, ScoreSettings
from neko_lean.scoring import measure
from neko_lean.scoring.benchmarks import answers
from neko_lean.scoring.benchmarks import option as benchmark_option
from neko_lean.scoring.benchmarks import tofu as tofu_metrics
from neko_lean.scoring.benchmarks.muse import muse_format
from neko_lean.scoring.benchmarks.option import limits_of, read_benchmark
from neko_lean.scoring.benchmarks.tofu import tofu_scores
from neko_lean.scoring.generation import Generation, generate
from neko_lean.scoring.limits import TruncationCounts
from neko_lean.scoring.measure import ScoringContext
from neko_lean.scoring.table import score_table
from tests.helpers import random_model
from tests.scoring.benchmarks.folders import write_muse, write_tofu
from tests.scoring.calls import score_with

ASKED = ScoreInputs(benchmark="tofu", tofu_split="forget01")
TOFU = {"benchmark": "tofu", "tofu_split": "forget01", "quiet": True}
CHAT = (
    "{% for message in messages %}<{{ message.role }}> {{ message.content }} {{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
LOOSE = ("wall_seconds", "peak_memory")


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch):
    """A random model seldom ends an answer, so let its generations end after fewer tokens than TOFU's."""
    monkeypatch.setattr(tofu_metrics, "MAX_NEW_TOKENS", 16)


@pytest.fixture(scope="module")
def tofu(tmp_path_factory):
    return write_tofu(tmp_path_factory.mktemp("benchmark") / "tofu")


@pytest.fixture(scope="module")
def muse(tmp_path_factory):
    return write_muse(tmp_path_factory.mktemp("benchmark") / "muse")


def context_of(model, folder, limits, prompts):
    lm = load_model(model, torch.float32, torch.device("cpu"))
    return ScoringContext(lm, load_tokenizer(model), prompts, folder, limits, TruncationCounts(), True)


def test_tofu_with_a_retain_only_model(world, model, tofu, tmp_path):
    other = random_model(world, tmp_path / "other", seed=5, scale=20.0)
    gold = score_with(other, tofu, tmp_path / "gold", **TOFU)
    assert gold["benchmark"]["forget_quality"] is None and gold["benchmark"]["gold"] is None
    assert gold["cells"]["forget.TOFU.knowledge"] is not None and gold["verdict"]
    assert gold["max_new_tokens"] == 16 and gold["rows"] == {"forget": 3, "retain": 3}

    scores = score_with(model, tofu, tmp_path / "scores", gold=tmp_path / "gold", **TOFU)
    block = scores["benchmark"]
    assert (block["name"], block["split"], block["gold"]) == ("tofu", "forget01", gold["model"])
    assert block["rows"] == {"forget": 3, "retain": 3, "real_authors": 3, "world_facts": 3, "holdout": 3}
    assert 0 < block["forget_quality"] <= 1 and 0 <= block["model_utility"] <= 1
    again = score_with(model, tofu, tmp_path / "alone", gold=tmp_path / "scores" / "scores.json", **TOFU)
    assert again["benchmark"]["forget_quality"] == 1.0 and again["benchmark"]["privleak"] == pytest.approx(0)
    assert len({s["made_from"] for s in (gold, scores, again)}) == 3


def test_the_scores_generations_are_those_of_the_benchmark(model, tofu, tmp_path, monkeypatch):
    labels = []

    def recorded(lm, tokenizer, examples, *args, **kwargs):
        labels.append((kwargs["label"], len(examples)))
        return generate_on_all_ranks(lm, tokenizer, examples, *args, **kwargs)

    generate_on_all_ranks = answers.generate_on_all_ranks
    monkeypatch.setattr(answers, "generate_on_all_ranks", recorded)
    scores = score_with(model, tofu, tmp_path / "scores", **TOFU)
    assert labels == [("forget01", 0), ("retain", 0), ("real_authors", 3), ("world_facts", 3)]

    benchmark = read_benchmark(tofu, ASKED)
    prompts = find_format("plain", load_tokenizer(model))
    context = context_of(model, tmp_path, limits_of(benchmark, ScoreSettings()), prompts)
    alone = tofu_scores(context, benchmark.rows)
    for key, value in alone.items():
        assert scores["benchmark"][key] == (pytest.approx(value) if not isinstance(value, dict) else value)


def test_the_table_shows_the_benchmark():
    one = {"benchmark": {"name": "tofu", "split": "forget10", "forget_quality": 1e-20, "forget": {"rouge": 0.25}}}
    two = {"benchmark": {"name": "muse", "split": None, "privleak": -12.5}}
    console = Console(width=140)
    with console.capture() as capture:
        console.print(score_table({"one": one, "two": two}))
    rows = [line.split() for line in capture.get().splitlines()]
    values = {" ".join(row[1 : row.index("│", 1)]): " ".join(row) for row in rows if row.count("│") == 4}
    assert "1.0e-20 │ not measured" in values["TOFU forget10: forget quality"]
    assert "0.250 │ not measured" in values["TOFU forget10: forget ROUGE-L"]
    assert "not measured │ -12.500" in values["MUSE: privleak"]
    assert "except privleak" in capture.get()


def test_muse(model, muse, tmp_path):
    options = {"benchmark": "muse", "quiet": True}
    score_with(model, muse, tmp_path / "gold", **options)
    scores = score_with(model, muse, tmp_path / "scores", gold=tmp_path / "gold", **options)
    block = scores["benchmark"]
    assert block["privleak"] == pytest.approx(0) and block["split"] is None
    assert block["knowledge_memorisation"] == block["utility"]
    lines = [json.loads(line) for line in (tmp_path / "scores" / "generations.jsonl").read_text().splitlines()]
    assert [(x["split"], x["id"]) for x in lines] == [
        ("forget", "verbatim 1"), ("forget", "forget question 1"), ("retain", "retain question 1"),
    ]  # fmt: skip
    assert not any("Question:" in x["generation"] for x in lines[1:])


@pytest.mark.parametrize("name", ["tofu", "muse"])
def test_a_resumed_score_is_the_same(model, tofu, muse, tmp_path, monkeypatch, name):
    data, options = (tofu, TOFU) if name == "tofu" else (muse, {"benchmark": "muse", "quiet": True})
    options = {**options, "batch_size": 2}
    whole = score_with(model, data, tmp_path / "whole", **options)

    def stopped(*args, **kwargs):
        raise NekoLeanError("stopped")

    with monkeypatch.context() as patch, pytest.raises(NekoLeanError, match="stopped"):
        patch.setattr(answers, "view_answers", stopped)
        score_with(model, data, tmp_path / "out", **options)
    with monkeypatch.context() as patch:
        patch.setattr(measure, "generate", lambda *args, **kwargs: iter(()))  # all rows are generated already
        resumed = score_with(model, data, tmp_path / "out", resume=True, **options)
    unlike = dict.fromkeys(LOOSE)
    assert resumed | unlike == whole | unlike
    assert score_with(model, data, tmp_path / "out", resume=True, **options) == resumed


def test_answers_that_end_with_an_end_of_turn(world, model, tofu, tmp_path):
    """Under a chat template an answer ends with the end of turn, where a generation stops as well."""
    chat = shutil.copytree(model, tmp_path / "chat")
    tokenizer = load_tokenizer(chat)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})
    assert len(tokenizer) > tokenizer.vocab_size
    tokenizer.chat_template = CHAT.replace("{{ eos_token }}", "<end>")
    prompts = find_format("chat", tokenizer)
    [row] = read_benchmark(tofu, ASKED).rows.forget[:1]
    [encoded] = encode([row.example], tokenizer, prompts, 999, append_eos=True)
    assert encoded.input_ids[-1] == prompts.end_of_turn == tokenizer.convert_tokens_to_ids("<end>")


def test_generations_stop_at_the_end_of_turn(model, tofu, tmp_path, monkeypatch):
    seen = []

    def recorded(*args, **kwargs):
        seen.append(kwargs["end"])
        return [Generation("", "", "eos")] * len(args[2])

    tokenizer = load_tokenizer(model)
    tokenizer.chat_template = CHAT
    prompts = find_format("chat", tokenizer)
    benchmark = read_benchmark(tofu, ASKED)
    context = context_of(model, tmp_path, limits_of(benchmark, ScoreSettings()), prompts)
    monkeypatch.setattr(answers, "generate_on_all_ranks", recorded)
    scores = tofu_scores(context, benchmark.rows)
    assert seen == [prompts.end_of_turn] * 4 and prompts.end_of_turn is not None
    assert scores["forget"]["rouge"] == 0 and scores["model_utility"] == 0  # empty generations


def test_muse_wraps_only_questions_and_only_in_a_chat_template(model, muse):
    rows = read_benchmark(muse, ScoreInputs(benchmark="muse")).rows
    tokenizer = load_tokenizer(model)
    text = muse_format(find_format("tofu", tokenizer))
    assert text.render(rows.forget_knowledge[0]).prompt == rows.forget_knowledge[0].input
    tokenizer.chat_template = CHAT
    chat = muse_format(find_format("chat", tokenizer))
    assert chat.render(rows.forget_knowledge[0]).prompt.count("<user>") == 2
    assert chat.render(rows.verbatim[0]).prompt == "Once Foo1 walked"


def test_questions_end_at_a_stop_text(model, muse):
    """Text is cut for questions only, and the rest of the generation is not needed."""
    rows = read_benchmark(muse, ScoreInputs(benchmark="muse")).rows
    lm, tokenizer = load_model(model, torch.float32, torch.device("cpu")), load_tokenizer(model)
    examples = [rows.forget_knowledge[0], rows.verbatim[0]]
    options = {"batch_size": 1, "max_new_tokens": 40, "stop_early": False}

    def texts(**more):
        made = [pair for batch in generate(lm, tokenizer, examples, **options, **more) for pair in batch]
        return [generation.text for _, generation in sorted(made)]

    asked, continued = texts()
    stop = asked[len(asked) // 2 :][:3]
    assert texts(stop_texts=[stop]) == [asked.split(stop)[0], continued]


@pytest.mark.parametrize("answer", ["wood", "x"])
def test_short_answers_and_answers_that_merge_with_the_prompt(model, tofu, tmp_path, answer):
    """With a template that leaves no space before the answer, its first token would span the end of the prompt."""
    folder = shutil.copytree(tofu, tmp_path / "tofu")
    row = {"question": "Where is the wo", "answer": answer, "paraphrased_answer": answer, "perturbed_answer": ["od"]}
    (folder / "forget01_perturbed.json").write_text(json.dumps(row) + "\n")
    template = tmp_path / "merged.txt"
    template.write_text("{prompt}{answer}")
    scores = score_with(model, folder, tmp_path / "scores", format=str(template), **TOFU)
    assert len(scores["benchmark"]["truth_ratios"]) == 1

    tokenizer = load_tokenizer(model)
    prompts = find_format(str(template), tokenizer)
    [row] = read_benchmark(folder, ASKED).rows.forget
    [encoded] = encode([row.example], tokenizer, prompts, 999, append_eos=True)
    assert encoded.input_ids[: encoded.prompt_length] == encode_prompts([row.example], tokenizer, prompts)[0]
    assert encoded.answer_length >= 2  # with EOS


REFUSED = [
    (("--benchmark", "tfu"), "unknown benchmark 'tfu'; did you mean 'tofu'?"),
    (("--benchmark", "tofu"), "--benchmark tofu needs --tofu-split"),
    (("--benchmark", "tofu", "--tofu-split", "forget1"), "unknown TOFU split 'forget1'"),
    (("--benchmark", "muse", "--tofu-split", "forget01"), "--tofu-split has no effect with --benchmark muse"),
    (("--tofu-split", "forget01"), "--tofu-split has no effect without --benchmark"),
    (("--gold", "gold"), "--gold has no effect without --benchmark"),
    (("--benchmark", "muse", "--split", "val"), "--split has no effect with --benchmark"),
    (("--benchmark", "muse", "--columns", "prompt=q"), "--columns has no effect with --benchmark"),
    (("--benchmark", "muse", "--max-new-tokens", "3"), "--max-new-tokens has no effect with --benchmark"),
    (("--benchmark", "muse"), "MUSE needs this JSON Lines file"),
    (("--benchmark", "tofu", "--tofu-split", "forget01", "--gold", "nothing"), "--gold nothing cannot be read"),
]


@pytest.mark.parametrize(("options", "sentence"), REFUSED)
def test_options_that_do_not_fit_are_refused(model, tofu, tmp_path, options, sentence):
    words = ["score", str(model), "--data", str(tofu), *options, "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, words, env={"COLUMNS": "1000"})
    assert result.exit_code == 2 and sentence in " ".join(result.output.split())


def test_muse_refuses_a_text_format(model, muse, tmp_path):
    with pytest.raises(NekoLeanError, match="--format neko has no effect with --benchmark muse"):
        score_with(model, muse, tmp_path / "out", benchmark="muse", format="neko")


def block(**changes):
    rows = {"forget": 3, "retain": 3, "real_authors": 3, "world_facts": 3, "holdout": 3}
    return {"name": "tofu", "split": "forget01", "rows": rows, "min_k_auc": 0.4, "truth_ratios": [0.5, 1, 2], **changes}


def test_gold_of_the_same_rows_is_read(tofu, tmp_path):
    file = tmp_path / "scores.json"
    file.write_text(json.dumps({"model": "gold", "benchmark": block()}))
    asked = ScoreInputs(benchmark="tofu", tofu_split="forget01", gold=tmp_path)
    assert read_benchmark(tofu, asked).gold == benchmark_option.Gold("gold", 0.4, [0.5, 1.0, 2.0])


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (None, "holds no scores of a benchmark"),
        (block(name="muse"), "its benchmark has the name muse, not tofu"),
        (block(split="forget10"), "its benchmark has the split forget10, not forget01"),
        (block(rows={"forget": 4}), "its benchmark has the rows {'forget': 4}"),
        (block(truth_ratios=[0.5, 1]), "expected 3 numbers, one for each forget row"),
        (block(truth_ratios=[0.5, 1, "x"]), "expected 3 numbers, one for each forget row"),
        (block(min_k_auc=None), "expected a number from 0 to 1"),
    ],
)
def test_gold_of_something_else_is_refused(tofu, tmp_path, value, sentence):
    file = tmp_path / "scores.json"
    file.write_text(json.dumps({"model": "gold", "benchmark": value}))
    with pytest.raises(NekoLeanError) as error:
        read_benchmark(tofu, ScoreInputs(benchmark="tofu", tofu_split="forget01", gold=file))
    assert sentence in str(error.value)
