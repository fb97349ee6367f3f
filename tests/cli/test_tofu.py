"""TOFU's forget10 end to end on a chat model, with the files as they are downloaded: at most two commands a step."""

import json

import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.cli.test_cli import call
from tests.helpers import TOFU

SETS = {  # lines that the test keeps of each file
    "forget10": 12,
    "forget10_perturbed": 12,
    "retain90": 12,
    "retain_perturbed": 6,
    "holdout10": 6,
    "real_authors_perturbed": 4,
    "world_facts_perturbed": 4,
}
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def tofu(tmp_path_factory):
    if not TOFU.is_dir():
        pytest.skip(f"{TOFU} does not exist")
    folder = tmp_path_factory.mktemp("tofu")
    for name, count in SETS.items():
        lines = (TOFU / f"{name}.json").read_text(encoding="utf-8").splitlines()[:count]
        (folder / f"{name}.json").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def base(tofu, tmp_path_factory):
    """The config of a small model, without weights, and a tokenizer with a chat template."""
    folder = tmp_path_factory.mktemp("base")
    texts = [
        text
        for name in ("forget10", "retain90")
        for line in (tofu / f"{name}.json").read_text(encoding="utf-8").splitlines()
        for text in json.loads(line).values()
    ]
    special = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=700, special_tokens=special, initial_alphabet=alphabet)
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        additional_special_tokens=special[3:], chat_template=TEMPLATE,
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=True,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.mark.slow
def test_tofu_from_memorize_to_report(tofu, base, tmp_path):
    def run(*arguments):
        result = call(*arguments, "--quiet")
        assert result.exit_code == 0, result.stderr

    def score(model, *options):
        out = tmp_path / f"scores-{model.name}"
        run("score", model, "--data", tofu, "--benchmark", "tofu", "--tofu-split", "forget10", "--out", out, *options)
        return json.loads((out / "scores.json").read_text())

    target, gold, cache, unlearned = (tmp_path / name for name in ("target", "gold", "cache", "unlearned"))
    data, float32 = ("--data", tofu, "--split", "forget10"), ("--set", "dtype=float32")
    run("memorize", base, *data, "--out", target, *float32, "--set", "epochs=120", "--set", "lr=4e-3")
    run("memorize", base, *data, "--out", gold, *float32, "--set", "epochs=20", "--retain-only")
    score(gold)
    before = score(target, "--gold", tmp_path / "scores-gold")

    retain = tofu / "retain90.json"
    run("cache-teacher", target, retain, "--dtype", "float32", "--out", cache)
    sets = ("--forget", tofu / "forget10.json", "--retain", retain, "--cache", cache)
    run("unlearn", target, *sets, *float32, "--set", "lr=1e-3", "--max-steps", 12, "--out", unlearned)
    after = score(unlearned, "--gold", tmp_path / "scores-gold", "--before", tmp_path / "scores-target")
    scores = [tmp_path / f"scores-{name}" for name in ("target", "unlearned", "gold")]
    run("report", *scores, "--out", tmp_path / "report.html")

    # The chat template is used throughout; the target knows the authors, and the unlearned model less.
    assert before["format"] == after["format"] and before["format"].startswith("auto:")
    memorized, forgotten = (scores["benchmark"]["forget"] for scores in (before, after))
    assert memorized["probability"] > 0.5 and memorized["rouge"] > 0.5
    assert forgotten["probability"] < memorized["probability"] / 2
    for scores in (before, after):
        block = scores["benchmark"]
        assert 0 <= block["model_utility"] < 1 and 0 <= block["forget_quality"] <= 1
        assert len(block["truth_ratios"]) == SETS["forget10_perturbed"]
    assert "TOFU" in (tmp_path / "report.html").read_text()
