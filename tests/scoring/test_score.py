"""`score` end to end on a random model: files, numbers, resuming, and numbers that are not measured."""

import json
import shutil

import pytest
import torch
import transformers
from rich.console import Console
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from neko_lean.data.examples import Example, read_rows
from neko_lean.errors import NekoLeanError
from neko_lean.jsonio import write_jsonl
from neko_lean.models.loading import load_tokenizer
from neko_lean.scoring import measure
from neko_lean.scoring.generation import Generation, generate
from neko_lean.scoring.stored import read_score
from neko_lean.scoring.table import score_table
from neko_lean.scoring.task import CELLS, task_aggregate
from tests.helpers import make_cache, make_rows, write_rows
from tests.scoring.calls import score_with
from tests.scoring.subjects import make_subject, write_hub

LOOSE = ("wall_seconds", "peak_memory")


def table_text(scores):
    console = Console(width=140)
    with console.capture() as capture:
        console.print(score_table({"score": scores}))
    return capture.get()


def lines_of(folder):
    return [json.loads(line) for line in (folder / "generations.jsonl").read_text().splitlines()]


def same(one, two):
    return {k: v for k, v in one.items() if k not in LOOSE} == {k: v for k, v in two.items() if k not in LOOSE}


def test_files_and_numbers(world, model, tmp_path):
    out = tmp_path / "out"
    scores = score_with(model, world, out, mia=world / "mia", max_new_tokens=8, quiet=True)
    assert json.loads((out / "scores.json").read_text()) == scores
    assert sorted(p.name for p in out.iterdir()) == ["documents.jsonl", "generations.jsonl", "scores.json"]
    lines = lines_of(out)
    rows = {name: read_rows(world, name) for name in ("forget", "retain")}
    assert [x["id"] for x in lines] == [row.id for some in rows.values() for row in some]
    for cell in CELLS:
        split, task, kind = cell.split(".")
        values = [x["score"] for x in lines if (x["split"], x["task"], x["kind"]) == (split, task, kind)]
        assert scores["cells"][cell] == pytest.approx(sum(values) / len(values))
    assert scores["task_aggregate"] == task_aggregate(scores["cells"])
    found = scores["membership"]
    assert 0 <= found["auc"] <= 1 and found["members"] == 12 and found["roc"]["fpr"][-1] == 1
    assert list(found["attacks"]) == ["all"] and "reference" not in found["attacks"]["all"]
    assert scores["mmlu"] is None and scores["final"] is None and scores["difference"] is None
    for key in ("task_aggregate", "cells.forget.Task1.knowledge", "leaks.forget.contained"):
        low, high = scores["intervals"][key]
        assert low <= high
    for split in ("forget", "retain"):
        mean = sum(x["numbers"]["extraction_strength"] for x in lines if x["split"] == split) / len(rows[split])
        assert scores["memorisation"][split]["extraction_strength"] == pytest.approx(mean)
    text = table_text(scores)
    assert text.count("not measured") == 2  # MMLU and final
    assert scores["verdict"][-1] in text.replace("\n", " ")


@pytest.mark.slow
def test_appended_eos_changes_no_number(world, model, tmp_path):
    """With a tokenizer that ends every text in EOS, numbers, losses and texts are the same."""
    ending = shutil.copytree(model, tmp_path / "ending")
    tokenizer = AutoTokenizer.from_pretrained(ending)
    end = (tokenizer.eos_token, tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"$A {end[0]}", special_tokens=[end])
    tokenizer.save_pretrained(ending)
    assert load_tokenizer(ending)("a")["input_ids"][-1] == end[1] != load_tokenizer(model)("a")["input_ids"][-1]

    options = {"mia": world / "mia", "held": world / "mia" / "nonmember.jsonl", "max_new_tokens": 8, "quiet": True}
    one, two = (score_with(m, world, tmp_path / f"scores-{m.name}", **options) for m in (model, ending))
    unlike = {"model": "", "made_from": ""}
    assert same(one | unlike, two | unlike)
    assert lines_of(tmp_path / f"scores-{model.name}") == lines_of(tmp_path / "scores-ending")


@pytest.mark.slow
def test_everything_at_once(world, model, tmp_path):
    """MMLU, held-out text, paraphrases, the reference attack, differences, and the official file in one score."""
    cache = tmp_path / "cache"
    nonmembers = world / "mia" / "nonmember.jsonl"
    make_cache(model, world, cache, forget=world, anchor=nonmembers, dtype="float32")
    asked = next(row for row in read_rows(world, "forget") if row.kind == "qa")
    write_jsonl(tmp_path / "other.jsonl", [{"id": asked.id, "input": "Well?", "output": "a wood", "wrong": ["a sea"]}])
    write_hub(tmp_path / "mmlu", [make_subject("anatomy", 6)])
    options = {"mia": world / "mia", "max_new_tokens": 6, "quiet": True, "dtype": "float32"}
    before = score_with(model, world, tmp_path / "before", **options)
    after = score_with(
        model, world, tmp_path / "after", **options, held=nonmembers, reference=cache, mmlu=tmp_path / "mmlu", shots=2,
        paraphrases=tmp_path / "other.jsonl", attacks=["prefix", "paraphrase", "sample"], seed=5,
        before=tmp_path / "before", official=tmp_path / "official.json",
    )  # fmt: skip
    assert after["cells"] == before["cells"] and after["mmlu"]["questions"] == 6
    # The model is its own reference, so all differences are 0.
    documents = [json.loads(line) for line in (tmp_path / "after" / "documents.jsonl").read_text().splitlines()]
    assert max(abs(one["reference"]) for one in documents) < 1e-4
    parts = after["task_aggregate"], after["membership"]["score"], after["mmlu"]["micro"]
    assert after["final"] == pytest.approx(sum(parts) / 3)
    assert after["difference"]["before"] == before["model"]
    for key in ("task_aggregate", "cells.retain.Task1.regurgitation", "memorisation.forget.answer_probability"):
        assert after["difference"][key] == {"difference": 0.0, "interval": [0.0, 0.0]}
    assert after["memorisation"]["forget"]["truth_ratio"] > 0 and after["memorisation"]["retain"]["truth_ratio"] is None
    assert [one["tokens"] for one in after["attacks"]["prefix"]] == [0, 1, 2, 4, 8]
    assert [(one["samples"], one["seed"]) for one in after["attacks"]["sample"]] == [
        (samples, 5) for samples in (0, 1, 2, 4, 8, 16)
    ]
    assert after["held_nll"] == pytest.approx(after["nonmember_nll"])
    results = json.loads((tmp_path / "official.json").read_text())
    assert results["aggregate-score"] == after["final"] and results["mmlu_average"] == after["mmlu"]["micro"]
    assert table_text(after).count("not measured") == 0


@pytest.mark.slow
def test_interrupted_score_resumes_from_its_generations(world, model, tmp_path, monkeypatch):
    options = {"max_new_tokens": 6, "batch_size": 8, "quiet": True}
    whole = score_with(model, world, tmp_path / "whole", **options)
    out, calls = tmp_path / "out", []
    generate = measure.generate

    def killed(*args, **kwargs):
        for number, batch in enumerate(generate(*args, **kwargs)):
            if number == 3:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(measure, "generate", killed)
    with pytest.raises(KeyboardInterrupt):
        score_with(model, world, out, **options)
    assert not out.exists() and (tmp_path / ".out.partial" / "generations.jsonl").is_file()

    def counted(lm, tokenizer, rows, **kwargs):
        calls.append(len(rows))
        return generate(lm, tokenizer, rows, **kwargs)

    monkeypatch.setattr(measure, "generate", counted)
    with pytest.raises(NekoLeanError, match="--resume"):
        score_with(model, world, out, **options)
    resumed = score_with(model, world, out, **options, resume=True)
    assert calls == [60 - 24] and same(resumed, whole)
    assert (out / "generations.jsonl").read_bytes() == (tmp_path / "whole" / "generations.jsonl").read_bytes()


def test_rows_in_other_scripts_are_judged_with_a_warning(world, model, tmp_path, monkeypatch, capsys):
    """For a model that generates every true answer, the official cells are 0, but the verdict is right."""
    rows = {"forget": [], "retain": []}
    for (split, some), name in zip(rows.items(), ("Мария", "Ольга"), strict=True):
        for n, task in enumerate(("Task1", "Task2", "Task3")):
            some.append(Example(f"{split}{n}sc1", "Она", f"{name} {n} родилась в тихом городе", task))
            some.append(Example(f"{split}{n}qa0", f"Где {name}?", "Кто ?", task))
    folder = tmp_path / "data"
    folder.mkdir()
    for split, some in rows.items():
        write_rows(folder / f"{split}.jsonl", some)

    def generate_true_answers(lm, tokenizer, wanted, **_):
        clean = tokenizer.clean_up_tokenization
        yield [(i, Generation(clean(row.output), clean(row.output), "eos")) for i, row in enumerate(wanted)]

    monkeypatch.setattr(measure, "generate", generate_true_answers)
    scores = score_with(model, folder, tmp_path / "one", max_new_tokens=4, quiet=True)
    said = capsys.readouterr().err
    assert "3 of 6 forget rows score below 1" in said and "less than half of the words of 3 of 6 retain rows" in said
    assert scores["official_blind"]["forget"] == {"unscorable": 3, "mostly_unseen": 3}
    assert all(scores["cells"][cell] == 0 for cell in CELLS if cell.endswith("knowledge"))
    assert all(scores["unicode_cells"][cell] == 1 for cell in CELLS)
    assert scores["intervals"]["unicode_cells.forget.Task1.knowledge"] == [1.0, 1.0]
    text = "\n".join(scores["verdict"])
    assert "It forgot little or nothing" in text and "It preserved the retain set" in text
    assert "any script" in table_text(scores)
    again = score_with(model, folder, tmp_path / "two", before=tmp_path / "one", max_new_tokens=4, quiet=True)
    assert again["difference"]["unicode_cells.retain.Task2.knowledge"]["difference"] == 0


def test_missing_inputs_are_reported_as_not_measured(world, model, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write_rows(folder / "forget.jsonl", [r for r in make_rows("Foo", 1) if r.task != "Task3"])
    write_rows(folder / "retain.jsonl", make_rows("Rix", 1))
    scores = score_with(model, folder, tmp_path / "out", max_new_tokens=4, quiet=True)
    assert scores["membership"] is None and scores["task_aggregate"] is None
    assert scores["missing_cells"] == ["forget.Task3.regurgitation", "forget.Task3.knowledge"]
    text = table_text(scores)
    assert text.count("not measured") == 8 and "Task3 (forget set)" in text.replace("\n", " ")


def test_invalid_input_writes_nothing(world, model, tmp_path):
    out = tmp_path / "out"
    before = tmp_path / "before"
    score_with(model, world, before, max_new_tokens=2, quiet=True)
    other = tmp_path / "other"
    other.mkdir()
    write_rows(other / "forget.jsonl", make_rows("Foo", 1))
    write_rows(other / "retain.jsonl", make_rows("Rix", 1))
    cases = [
        ({"mia": tmp_path}, r"member\.jsonl"),
        ({"data": tmp_path}, r"contains no forget"),
        ({"batch_size": 0}, "batch-size"),
        ({"attacks": ["bribe"]}, "unknown attack 'bribe'"),
        ({"attacks": ["paraphrase"]}, "--paraphrases"),
        ({"reference": tmp_path}, "--mia"),
        ({"before": tmp_path}, "holds no scores.json"),
        ({"before": before, "data": other}, "other rows"),
        ({"held": tmp_path / "none.jsonl"}, "does not exist"),
        ({"mmlu": tmp_path}, str(tmp_path)),
    ]
    for change, words in cases:
        with pytest.raises(NekoLeanError, match=words):
            score_with(model, change.pop("data", world), out, quiet=True, **change)
    assert not out.exists()
    shutil.copytree(before, tmp_path / "old")
    lines = [{k: v for k, v in one.items() if k != "numbers"} for one in lines_of(before)]
    write_jsonl(tmp_path / "old" / "generations.jsonl", lines)
    with pytest.raises(NekoLeanError, match="older neko-lean"):
        read_score(tmp_path / "old")


def saved(config, model, out):
    """Save a random model of another family with the tokenizer of `model`."""
    tokenizer = load_tokenizer(model)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config(len(tokenizer), tokenizer.eos_token_id)).save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


@pytest.mark.slow
def test_recurrent_model_logs_its_decoding_method_once(world, model, tmp_path, capsys):
    def config(vocabulary, eos):
        return transformers.Lfm2Config(
            vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, layer_types=["conv", "full_attention"], eos_token_id=eos,
        )  # fmt: skip

    folder = saved(config, model, tmp_path / "m")
    write_hub(tmp_path / "mmlu", [make_subject("anatomy", 3)])
    scores = score_with(
        folder, world, tmp_path / "out", mmlu=tmp_path / "mmlu", shots=1, attacks=["prefix", "sample"], max_new_tokens=4
    )
    assert capsys.readouterr().err.count("by transformers' generate, prompts of equal length together") == 1
    assert scores["mmlu"]["questions"] == 3 and len(scores["attacks"]["prefix"]) > 1
    assert scores["attacks"]["sample"][1]["leak_rows"] == 24


@pytest.mark.slow
def test_truncated_prompts_are_warned_of_once_even_if_quiet(world, model, tmp_path, capsys):
    def config(vocabulary, eos):
        return transformers.GPT2Config(
            vocab_size=vocabulary, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=eos, eos_token_id=eos
        )

    folder = saved(config, model, tmp_path / "m")
    score_with(folder, world, tmp_path / "out", attacks=["prefix"], quiet=True)
    said = capsys.readouterr().err
    assert said.count("warning: ") == 1 and "60 of 60 rows have fewer than 256 new tokens" in said
    assert "the model has 64 positions" in said


def test_eos_tokens_are_part_of_the_plan(world, model, tmp_path, monkeypatch):
    folder, out = tmp_path / "m", tmp_path / "out"
    shutil.copytree(model, folder)
    ends = folder / "generation_config.json"

    def killed(*args, **kwargs):
        yield next(generate(*args, **kwargs))
        raise KeyboardInterrupt

    monkeypatch.setattr(measure, "generate", killed)
    with pytest.raises(KeyboardInterrupt):
        score_with(folder, world, out, max_new_tokens=4, quiet=True)
    ends.write_text('{"eos_token_id": [3, 5]}')
    with pytest.raises(NekoLeanError, match="eos_token_id"):
        score_with(folder, world, out, max_new_tokens=4, quiet=True, resume=True)
    ends.write_text("{not JSON")
    with pytest.raises(NekoLeanError, match=r"generation_config\.json is not readable JSON"):
        score_with(folder, world, tmp_path / "other", max_new_tokens=4, quiet=True)
    assert not (tmp_path / "other").exists()
