"""The first hour of seven people with neko-lean: each runs the commands as typed and needs a certain outcome."""

import json
import pydoc
import re
import shlex
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import transformers

import neko_lean
import neko_lean.memory.fake_models
import neko_lean.runs.unlearning
from neko_lean.cli.help import COMMANDS, Commands
from neko_lean.jsonio import write_jsonl
from neko_lean.recipe import load_recipe, recipe_names
from tests.cli.test_cli import call
from tests.cli.test_help import groups_of, help_of
from tests.helpers import LUME, TOFU, make_rows
from tests.reporting.made import full_scores, make_demo, write_scores
from tests.reporting.test_page import Page

ROOT = Path(__file__).parents[1]
FEW = ("--max-steps", 2, "--set", "dtype=float32", "--set", "max_length=64")


def done(*arguments):
    """Run a command that must succeed."""
    result = call(*arguments)
    assert result.exit_code == 0, (arguments, result.output)
    return result


def refusal(*arguments, out=None):
    """The one sentence with which a command must end, without an output."""
    result = call(*arguments)
    assert result.exit_code == 2 and result.stdout == "" and result.stderr.count("\n") == 1, (arguments, result.output)
    assert result.stderr.startswith("error: ")
    assert out is None or not [path for path in out.parent.iterdir() if out.name in path.name]
    return result.stderr


# 1. A researcher with TOFU's files


@pytest.fixture(scope="module")
def tofu(tmp_path_factory):
    """A few lines of the files that `--split forget10` and `--benchmark tofu` read, in TOFU's layout."""
    folder = tmp_path_factory.mktemp("tofu")
    names = ("forget10", "retain90", "forget10_perturbed", "retain_perturbed", "holdout10", "real_authors_perturbed",
             "world_facts_perturbed")  # fmt: skip
    for name in names:
        if TOFU.is_dir():
            lines = (TOFU / f"{name}.json").read_text(encoding="utf-8").splitlines()[:3]
            rows = [json.loads(line) for line in lines]
        else:
            rows = [{"question": f"Where was author {n} of {name} born?", "answer": f"In town {n}."} for n in range(3)]
            for row in rows if name.endswith("_perturbed") else ():
                row["paraphrased_answer"], row["perturbed_answer"] = f"Born {row['answer']}", ["In Oslo.", "In Lima."]
        write_jsonl(folder / f"{name}.json", rows)
    return folder


@pytest.mark.slow
def test_researcher_unlearns_and_scores_a_split_of_tofu(tofu, model, tmp_path):
    out, scores = tmp_path / "unlearned", tmp_path / "scores"
    split = ("--forget", tofu, "--retain", tofu, "--split", "forget10")
    run = done("unlearn", model, *split, "--recipe", "graddiff", *FEW, "--out", out)
    assert "forget: 3 rows, question/answer -> 3 qa" in run.stderr and "retain: 3 rows, question/answer" in run.stderr
    assert json.loads((out / "run.json").read_text())["steps"] == 2 and (out / "model.safetensors").is_file()

    benchmark = ("--data", tofu, "--benchmark", "tofu", "--tofu-split", "forget10")
    table = done("score", out, *benchmark, "--out", scores).stdout
    block = json.loads((scores / "scores.json").read_text())["benchmark"]
    assert block["split"] == "forget10" and 0 <= block["model_utility"] <= 1 and len(block["truth_ratios"]) == 3
    assert block["forget_quality"] is None  # needs --gold
    assert "TOFU forget10: model utility" in table and "TOFU forget10: forget ROUGE-L" in table


def test_researcher_names_a_wrong_split_or_mixes_the_sets(tofu, model, tmp_path):
    out = tmp_path / "out"
    sets = ("--forget", tofu, "--retain", tofu)
    for wrong in (("--split", "forget5"), ("--split", "retain90"), ()):
        sentence = refusal("unlearn", model, *sets, *wrong, "--out", out, out=out)
        assert "it has forget10.json, " in sentence and "choose one with --split forget10." in sentence
    sentence = refusal("score", model, "--data", tofu, "--benchmark", "tofu", "--tofu-split", "forget5", "--out", out)
    assert "unknown TOFU split 'forget5'; did you mean 'forget05'?" in sentence

    rows = [json.loads(line) for name in ("retain90", "forget10") for line in (tofu / f"{name}.json").open()]
    write_jsonl(tmp_path / "mixed.json", rows)
    mixed = ("--forget", tofu / "forget10.json", "--retain", tmp_path / "mixed.json", "--recipe", "graddiff", *FEW)
    sentence = refusal("unlearn", model, *mixed, "--out", out, out=out)
    assert "3 of 6 retain rows are also in the forget set" in sentence and "--drop-overlap" in sentence
    dropped = done("unlearn", model, *mixed, "--drop-overlap", "--out", out)
    assert "warning: 3 of 6 retain rows are left out" in dropped.stderr
    assert json.loads((out / "run.json").read_text())["retain_rows"] == 3


# 2. A privacy engineer with a folder of letters


SECRETS = ("Quillfeather", "oncology", "Zebrawood")


@pytest.fixture
def letters(tmp_path):
    folder = tmp_path / "letters"
    folder.mkdir()
    for n, secret in enumerate(SECRETS):
        text = f"Dear {secret}, we saw you in the wood and walked home. Yours, {secret}."
        (folder / f"{n}.txt").write_text(text)
    return folder


def test_privacy_engineer_has_nothing_but_letters(letters, world, model, tmp_path):
    out = tmp_path / "out"
    run = done("unlearn", model, "--forget", letters, *FEW, "--set", "self_generated=3", "--out", out)
    assert "forget: 3 rows, text -> 3 document; group 'all'." in run.stderr
    assert "self-generated retain set: 3 documents written by the model" in run.stderr
    about = (out / "run.json").read_text()
    assert json.loads(about)["self_generated"] == 3

    sets = ("--forget", letters, "--retain", world / "retain.jsonl")
    score = done("score", out, *sets, "--max-new-tokens", 4, "--out", tmp_path / "scores")
    assert "forget all regurgitation" in score.stdout
    said = "".join((run.output, score.output, about, (out / "metrics.jsonl").read_text()))
    assert not [secret for secret in SECRETS if secret in said]


def test_privacy_engineer_is_told_of_letters_that_are_not_read(letters, model, tmp_path):
    (letters / "scan.pdf").write_bytes(b"%PDF")
    (letters / "2019").mkdir()
    plan = done("unlearn", model, "--forget", letters, *FEW, "--out", tmp_path / "out", "--dry-run")
    assert "3 rows" in plan.stderr and "2 not read, because only .txt and .md files" in plan.stderr
    assert ": 2019/, scan.pdf." in plan.stderr


def test_privacy_engineer_reads_errors_that_quote_no_letter(letters, model, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "letters.jsonl").write_text('{"question": "Who is Quillfeather?" "answer": "Zebrawood"}\n')
    (tmp_path / "answers.jsonl").write_text('{"question": "Who is Quillfeather?", "answer": ["Zebrawood"]}\n')
    (tmp_path / "columns.jsonl").write_text('{"letter": "Dear Quillfeather", "to": "Zebrawood"}\n')
    (tmp_path / "empty").mkdir()
    data = [(("--forget", tmp_path / name), name) for name in ("letters.jsonl", "answers.jsonl", "columns.jsonl")]
    data += [(("--forget", tmp_path / "empty"), "empty"), (("--forget", tmp_path / "lettres"), "lettres")]
    data += [(("--forget", letters, "--retain", letters), "3 of 3 retain rows")]
    data += [(("--forget", letters, "--anchor", letters), "3 of 3 anchor rows")]
    data += [(("--forget", letters, "--split", "train"), "train")]
    data += [(("--forget", letters, "--columns", "text=body"), "'body' is missing")]
    for options, words in data:
        sentence = refusal("unlearn", model, *options, *FEW, "--out", out, out=out)
        assert words in sentence and not [secret for secret in SECRETS if secret in sentence]
    (letters / "1.txt").write_text(" \n")
    assert "1.txt contains no text" in refusal("unlearn", model, "--forget", letters, "--out", out, out=out)
    assert "is an input of this run" in refusal("unlearn", model, "--forget", letters, "--out", letters, "--overwrite")
    assert len([*letters.iterdir()]) == 3


# 3. A 7B model on a 24 GB card


@pytest.fixture(scope="module")
def llama_7b(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    transformers.LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        max_position_embeddings=4096, tie_word_embeddings=False, architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("gpu", ["RTX 4090", "6GB", "3GB"])
def test_owner_of_a_card_plans_a_7b_model(llama_7b, monkeypatch, gpu):
    built = []
    fake_model = neko_lean.memory.fake_models.fake_model

    def counted(*args):
        built.append(args)
        return fake_model(*args)

    monkeypatch.setattr(neko_lean.memory.fake_models, "fake_model", counted)
    result = json.loads(done("plan", llama_7b, "--gpu", gpu, "--json").stdout)
    assert 1 <= len(built) <= 2  # one for each dtype
    for way in result["ways"].values():
        assert sum(way["lines"].values()) == way["peak"]
    own, others = result["ways"]["neko-lean"], [way for name, way in result["ways"].items() if name != "neko-lean"]
    assert all(own["peak"] < way["peak"] / 2 for way in others)

    if gpu == "3GB":
        assert result["options"] is None
        assert re.search(r"weights alone are \d+\.\d\d GiB.* no option .* use a smaller model", result["reason"])
        return
    options = {text for param in Commands().get_command(None, "unlearn").params for text in param.opts}
    assert result["options"] and {text.split()[0] for text in result["options"]} <= options
    size = 6 if gpu == "6GB" else 24
    assert result["fits"]["peak"] < size * 2**30 < own["peak"]
    assert ("--quantize-base nf4" in result["options"]) == (gpu == "6GB")  # adapters only where weights do not fit


# 4. A participant of the shared task, who types what the README says


def quick_start():
    """The commands of the README's quick start, with continued lines joined."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## Quick start\n")[1]
    lines = re.findall(r"^    (.*)$", section.split("\n## ")[0].replace("\\\n", ""), re.MULTILINE)
    commands = [line.partition(" #")[0] for line in lines if line.startswith("neko-lean ")]
    assert [command.split()[1] for command in commands].count("unlearn") == 1
    return [command.split(maxsplit=1)[1] for command in commands]


def write_lume(folder):
    """LUME's files with a few rows: its own rows if they are there."""
    for name in ("forget", "retain"):
        rows = [row.lume_row for row in make_rows("Foo" if name == "forget" else "Rix", 2)]
        if LUME.is_dir():
            table = pq.read_table(LUME / f"{name}_train.parquet").to_pylist()
            cells = {(row["task"], re.sub(r".*(sc|qa)\d+$", r"\1", row["id"])): row for row in table}
            rows = [*cells.values()]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}_train.parquet")
    documents = [{"document": f"{row.input} {row.output}", "task": row.task} for row in make_rows("Oth", 1)]
    (folder / "mia").mkdir()
    write_jsonl(folder / "mia" / "nonmember.jsonl", documents)


@pytest.mark.slow
def test_participant_runs_the_quick_start(model, tmp_path, monkeypatch):
    commands = quick_start()
    (tmp_path / "data").mkdir()
    write_lume(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        neko_lean.runs.unlearning,
        "load_recipe",
        lambda recipe, overrides: load_recipe(recipe, {**overrides, "max_steps": 2}),
    )

    for command in commands:
        done(*shlex.split(command.replace("$MODEL", str(model))))
    assert (tmp_path / "unlearned" / "model.safetensors").is_file()
    assert json.loads((tmp_path / "unlearned" / "run.json").read_text())["steps"] == 2
    assert not {"unlearned", "scores"} - {path.name for path in tmp_path.iterdir()}
    assert "Did it forget?" in next(tmp_path.glob("*.html")).read_text(encoding="utf-8")

    # The comparison with the scores of the model before.
    data = ("--data", "data/", "--split", "train", "--max-new-tokens", 4)
    done("score", model, *data, "--out", "scores-before")
    table = done("score", "unlearned/", *data, "--before", "scores-before", "--out", "scores-after").stdout
    assert re.search(r"before +┃ +after +┃ +change", table)
    assert re.search(r"forget Task1 knowledge +│ +\d\.\d{3} │ +\d\.\d{3} │ +[+-]\d\.\d{3}", table)


# 5. A Python user


def test_python_user_reads_help_and_types():
    for name in ("cache_teacher", "memorize", "plan", "recipes", "report", "score", "unlearn"):
        text = pydoc.render_doc(getattr(neko_lean, name))
        assert name in text and (("Returns" in text and "Args" in text) or name == "recipes"), name
    assert "Args:" in pydoc.render_doc(neko_lean.unlearn) and "Example" in pydoc.render_doc(neko_lean.unlearn)
    assert (Path(neko_lean.__file__).parent / "py.typed").is_file()
    assert issubclass(neko_lean.NekoLeanError, Exception)


# 6. A reader of the report


def test_reader_of_the_report(tmp_path):
    demo = make_demo(tmp_path / "demo")
    lone = write_scores(tmp_path / "lone", {**full_scores("lone", 0.4), "membership": None, "attacks": {}})
    for runs, name in (((demo,), "demo.html"), ((lone,), "lone.html")):
        done("report", *runs, "--out", tmp_path / name)
        page = Page((tmp_path / name).read_text(encoding="utf-8"))
        words = " ".join("".join(page.read).split())
        assert not re.findall(r"(?:forget|retain)\.\w+|\w+\.(?:knowledge|regurgitation)|\b[a-z]+_[a-z_]+\b", words)

        targets = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
        assert page.links and set(page.links) <= targets
        charts = [attributes for tag, attributes in page.tags if tag == "svg" and attributes.get("role") == "img"]
        assert charts and all(attributes["aria-label"] for attributes in charts)
        if name == "demo.html":
            assert re.search(r"strongest membership attack \((?:loss|zlib|min-k|min-k\+\+)\): AUC \d\.\d{3}", words)
        else:
            assert "membership" not in page.links and "No attacks were run" in words
            assert re.search(r"[Mm]embership[^.]* not measured|no unlearning run of these models", words)

        # A verdict says of the retain set that it was preserved, or lost, or neither.
        verdict = words.partition("What came out")[2].partition("Sections")[0]
        for model in re.split(r"(?=Preserved the rest: )", verdict)[1:]:
            preserved = model.startswith("Preserved the rest: yes")
            assert not (preserved and re.search(r"\b[Ll]ost\b", model))


# 7. A reader of --help


@pytest.mark.parametrize("command", COMMANDS)
def test_reader_of_help_sees_groups_that_fit_a_screen(command):
    text = help_of(command)
    assert max(len(lines) for lines in groups_of(text).values()) <= 22
    assert call(command, "-h").stdout == help_of(command, columns=80)
    for param in Commands().get_command(None, command).params:
        sentence = " ".join((getattr(param, "help", None) or "").partition("[default")[0].split())
        if param.param_type_name == "option" and param.name != "help":
            assert re.match(r"[A-Z]|cpu, cuda|float32", sentence) and sentence.endswith("."), (command, param.name)


def test_reader_of_help_is_told_the_name_that_was_meant(world, model, tmp_path):
    assert re.fullmatch(r"neko-lean \d+\.\d+\.\d+\S*\n", done("--version").stdout)
    data = ("unlearn", model, "--forget", world, "--retain", world, "--out", tmp_path / "out")
    for words, suggestion in (
        (("unlearn", model, "--forget", world, "--output-dir", "x"), "did you mean --out?"),
        ((*data, "--learning_rate", "1e-5"), "did you mean --learning-rate?"),
        ((*data, "--set", "learning_rate=1e-5"), "did you mean 'lr'?"),
        ((*data, "--recipe", "NPO"), "did you mean 'npo'?"),
        ((*data, "--recipe", "npo.toml"), "the shipped recipe is named npo, without .toml"),
        (("recipes", "ga"), "did you mean 'neko' or 'graddiff'?"),
    ):
        assert suggestion in refusal(*words, out=tmp_path / "out")


@pytest.mark.parametrize("name", recipe_names())
def test_reader_of_a_recipe_sees_every_value_explained(name):
    lines = done("recipes", name).stdout.splitlines()
    assert lines[0].startswith(name) and len(lines) > 15
    for line in lines[1:]:
        assert re.fullmatch(r" {4}\w+ = .+? {2,}['A-Z].*\.", line), line


def test_reader_of_help_tries_a_dry_run(world, model, tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("forget", "retain"):
        shutil.copy(world / f"{name}.jsonl", tmp_path / "data")
    before = sorted(tmp_path.rglob("*"))
    data, out = tmp_path / "data", ("--out", tmp_path / "out", "--dry-run")
    for words in (
        ("cache-teacher", model, data),
        ("unlearn", model, "--forget", data, "--retain", data),
        ("memorize", model, "--data", data),
        ("score", model, "--data", data),
    ):
        assert "nothing was written" in done(*words, *out).stdout
        assert sorted(tmp_path.rglob("*")) == before


# Mistakes that any of them makes


def test_mistakes_are_refused_in_one_sentence(world, model, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "letter.txt").write_text("Dear Foo.")
    forget, retain = ("--forget", world / "forget.jsonl"), ("--retain", world / "retain.jsonl")
    data = (*forget, *retain, "--out", out)
    score = ("score", model, "--data", world, "--out", out)
    for words, expected in (
        (("unlearn", model, "--forget", "", *retain, "--out", out), "--forget is empty; expected a value"),
        (("unlearn", model, *forget, "--retain=", "--out", out), "--retain is empty; expected a value"),
        (("unlearn", "", *data), "an argument is empty; expected a value"),
        (("unlearn", model, *forget, *retain, "--out", ""), "--out is empty; expected a value"),
        (("score", model, "--data", world, "--split", "", "--out", out), "--split is empty; expected a value"),
        (("unlearn", model / "config.json", *data), "neither a checkpoint folder nor a hub name"),
        (("unlearn", world / "mia", *data), "has no config.json; pass the folder of a Hugging Face checkpoint"),
        (("unlearn", model, "--forget", model, *retain, "--out", out), "contains no forget.parquet"),
        (("unlearn", model, "--forget", tmp_path / "empty.jsonl", "--out", out), "no rows; expected at least one"),
        (("unlearn", model, "--forget", tmp_path / "list.json", "--out", out), "no rows; expected at least one"),
        (("unlearn", model, *data, "--anchor", tmp_path / "empty.jsonl"), "no documents; expected at least one"),
        (("unlearn", model, *data, "--cache", world / "forget.jsonl"), "is not a folder; expected a teacher cache"),
        (("unlearn", model, *data, "--cache", tmp_path / "none"), "does not exist; expected a teacher cache"),
        (("unlearn", model, *data, "--recipe", "mine.toml"), "mine.toml does not exist; expected a file, or a shipped"),
        (("unlearn", model, *data, "--set", "offload_state=yes"), "offload_state must be true or false, got 'yes'"),
        # Found before the teacher is cached, so that no half-finished run is left.
        (("unlearn", model, *data, "--train-last", 99), "train_last is 99, but the model has only 2 layers; choose 1"),
        (("unlearn", model, *data, "--set", "train_only=nothing"), "matches the name of no trainable parameter"),
        (("unlearn", model, *forget, "--retain", world / "forget.jsonl", "--out", out, "--drop-overlap"),
         "all 24 retain rows are also in the forget set"),
        (("score", model, *forget, "--out", out), "--retain is missing: give --data FOLDER"),
        (("score", model, *retain, "--out", out), "--forget is missing: give --data FOLDER"),
        (("score", model, "--out", out), "--data is missing: give --data FOLDER"),
        ((*score, "--benchmark", "TOFU"), "unknown benchmark 'TOFU'; did you mean 'tofu'?"),
        ((*score, "--attack", "relern"), "unknown attack 'relern'; did you mean 'relearn'?"),
        ((*score, "--before", world), "holds no scores.json"),
        (("inspect", world / "forget.jsonl"), "is not a folder; expected a teacher cache"),
        (("report", model, "--out", tmp_path / "out.html"), "holds neither scores.json nor run.json"),
    ):  # fmt: skip
        assert expected in refusal(*words, out=out), words
