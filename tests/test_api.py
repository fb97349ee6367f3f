"""The Python API: what `from neko_lean import ...` offers, on models and rows that are already loaded."""

import inspect
import json
import subprocess
import sys

import pandas as pd
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import neko_lean
from neko_lean import CacheOptions, NekoLeanError, OutputOptions, RunOptions, ScoreSettings
from neko_lean.data import read_rows
from neko_lean.jsonio import write_jsonl
from tests.helpers import make_rows, model_weights, write_rows

FUNCTIONS = ("cache_teacher", "memorize", "plan", "recipes", "report", "score", "unlearn")
QUICK = {"max_steps": 2, "forget_rows": 4, "retain_rows": 4, "dtype": "float32", "append_eos": False}
QUIET = {"quiet": True, "device": "cpu"}
FLOAT32 = CacheOptions(dtype="float32", format="neko")


def test_names_are_visible_to_completion():
    assert {*FUNCTIONS, "NekoLeanError", "RunOptions"} <= {*dir(neko_lean)} and {*neko_lean.__all__} <= {
        *dir(neko_lean)
    }
    with pytest.raises(AttributeError, match="has no attribute 'unlern'"):
        neko_lean.unlern  # noqa: B018


def test_functions_stay_functions_after_the_packages_are_imported():
    code = f"import neko_lean, neko_lean.cli.demo, neko_lean.demo; from neko_lean import {', '.join(FUNCTIONS)}\n"
    code += f"assert all(callable(f) and f.__name__ == name for name, f in zip({FUNCTIONS}, ({', '.join(FUNCTIONS)})))"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_one_order_of_arguments(name):
    """Model and output come first, and everything else is named."""
    parameters = list(inspect.signature(getattr(neko_lean, name)).parameters.values())
    positional = [parameter.name for parameter in parameters if parameter.kind is not parameter.KEYWORD_ONLY]
    expected = {"plan": ["model"], "recipes": [], "report": ["runs", "out"]}.get(name, ["model", "out"])
    assert positional == expected


def test_loaded_objects_give_the_result_of_files(world, model, tmp_path):
    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    forget, retain = ([row.lume_row for row in read_rows(world, name)] for name in ("forget", "retain"))
    options = {"recipe": "neko", "overrides": QUICK}
    files = {"forget": str(world), "retain": world / "retain.jsonl"}

    neko_lean.cache_teacher(model, tmp_path / "c1", retain=world, cache=FLOAT32, run=OutputOptions(**QUIET))
    neko_lean.cache_teacher(
        loaded, tmp_path / "c2", retain=retain, tokenizer=tokenizer, cache=FLOAT32, run=OutputOptions(**QUIET)
    )
    shards = [sorted(folder.glob("*.safetensors")) for folder in (tmp_path / "c1", tmp_path / "c2")]
    assert [shard.read_bytes() for shard in shards[0]] == [shard.read_bytes() for shard in shards[1]]

    seen = []
    neko_lean.unlearn(model, tmp_path / "u1", **files, cache=tmp_path / "c1", **options, run=RunOptions(**QUIET))
    rows = {"forget": pd.DataFrame(forget), "retain": retain}
    neko_lean.unlearn(
        loaded,
        tmp_path / "u2",
        **rows,
        tokenizer=tokenizer,
        cache=tmp_path / "c2",
        **options,
        callback=lambda step, metrics: seen.append((step, dict(metrics))),
        run=RunOptions(**QUIET),
    )
    weights = [model_weights(tmp_path / name) for name in ("u1", "u2")]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])
    lines = [json.loads(line) for line in (tmp_path / "u2" / "metrics.jsonl").read_text().splitlines()]
    assert [step for step, _ in seen] == [1, 2] == [line["step"] for line in lines]
    assert [metrics["loss"] for _, metrics in seen] == [line["loss"] for line in lines]

    settings = ScoreSettings(max_new_tokens=4)
    run = OutputOptions(**QUIET)
    first = neko_lean.score(tmp_path / "u1", tmp_path / "s1", data=world, settings=settings, run=run)
    unlearned = AutoModelForCausalLM.from_pretrained(tmp_path / "u2", dtype="float32")
    second = neko_lean.score(unlearned, tmp_path / "s2", **rows, tokenizer=tokenizer, settings=settings, run=run)
    assert first["cells"] == second["cells"] and second["model"] == "u2"
    assert neko_lean.report([tmp_path / "s1"], tmp_path / "r.html")["models"] == ["u1"]
    assert {path.name for path in tmp_path.iterdir()} == {"c1", "c2", "u1", "u2", "s1", "s2", "r.html"}


def test_memorize_all_rows_of_a_list(world, model, tmp_path):
    rows = [{"question": "Who sang?", "answer": "Mira"}, {"question": "Where?", "answer": "Bergen"}]
    steps = []
    result = neko_lean.memorize(
        model,
        tmp_path / "out",
        data=rows,
        overrides={"max_steps": 1, "dtype": "float32"},
        callback=lambda step, _: steps.append(step),
        run=neko_lean.TrainingOptions(**QUIET),
    )
    assert result["retain_rows"] == 2 and result["sets"] == ["data"] and steps == [1]
    with pytest.raises(NekoLeanError, match=r"only the retain set is to be learned, so the data must be a folder"):
        neko_lean.memorize(model, tmp_path / "no", data=rows, sets=("retain",))


def test_an_error_in_a_callback_ends_the_run(world, model, tmp_path):
    def callback(step, metrics):
        raise ZeroDivisionError

    options = {"recipe": "graddiff", "overrides": QUICK, "run": RunOptions(**QUIET)}
    with pytest.raises(ZeroDivisionError):
        neko_lean.unlearn(model, tmp_path / "out", forget=world, retain=world, callback=callback, **options)
    assert not (tmp_path / "out").exists()


def test_forget_rows_in_the_retain_set_and_in_the_anchor(world, model, tmp_path):
    forget, retain = make_rows("Foo"), make_rows("Rix", 6)
    write_rows(tmp_path / "retain.jsonl", [*retain, *forget[:3]])
    anchor = [{"document": f"{row.input}  {row.output}"} for row in make_rows("Oth", 1)[:1] + forget[:1]]
    write_jsonl(tmp_path / "anchor.jsonl", anchor)
    sets = {"forget": world, "retain": tmp_path}
    options = {"overrides": {**QUICK, "batch_tokens": 512}}

    for extra, message in (({}, "3 of 39 retain rows"), ({"retain": world, "anchor": anchor}, "1 of 2 anchor rows")):
        given = {**sets, **extra}
        with pytest.raises(NekoLeanError, match=message):
            neko_lean.unlearn(model, tmp_path / "out", **given, **options, run=RunOptions(**QUIET))
        with pytest.raises(NekoLeanError, match=message):
            neko_lean.cache_teacher(model, tmp_path / "out", **given, cache=FLOAT32, run=OutputOptions(**QUIET))
    with pytest.raises(NekoLeanError, match="3 of 39 retain rows"):
        neko_lean.score(model, tmp_path / "out", **sets, run=OutputOptions(**QUIET))
    assert not (tmp_path / "out").exists()

    # Without the common rows, the run is that of the clean files.
    results = [
        neko_lean.unlearn(model, tmp_path / name, **given, **options, run=RunOptions(**QUIET, drop_overlap=drop))
        for name, given, drop in (
            ("dropped", {**sets, "anchor": tmp_path / "anchor.jsonl"}, True),
            ("clean", {"forget": world, "retain": world, "anchor": anchor[:1]}, False),
        )
    ]
    assert [result["retain_rows"] for result in results] == [37, 37]
    weights = [model_weights(tmp_path / name) for name in ("dropped", "clean")]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])


def test_recipes():
    shipped = neko_lean.recipes()
    assert shipped["calibrated"].name == "calibrated" and {"neko", "npo"} <= {*shipped}
