"""Security: no checkpoint, cache or data file can run code, read other files, use the network, or leak its texts."""

import ast
import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

import neko_lean
from neko_lean.cache.manifest import read_manifest
from neko_lean.checkpoints.sealing import find_damage, seal
from neko_lean.cli import app
from neko_lean.data.documents import read_documents
from neko_lean.data.examples import read_rows
from neko_lean.errors import CacheError, NekoLeanError
from neko_lean.jsonio import write_jsonl
from neko_lean.models.loading import load_tokenizer, model_folder, model_name
from neko_lean.models.weight_files import weight_files
from neko_lean.outputs.signing import sign
from neko_lean.reporting.collect import collect
from neko_lean.scoring.mmlu_data import read_mmlu
from neko_lean.scoring.paraphrases import read_paraphrases
from neko_lean.scoring.stored import read_score
from tests.helpers import make_rows, resign, write_rows

PACKAGE = Path(neko_lean.__file__).parent
MARKER = "Zanzibar"
ELSEWHERE = ["../x", "a/../../x", "/etc/passwd", "..", ""]
FORBIDDEN = {"subprocess", "pickle", "marshal", "shelve", "requests", "urllib", "socket"}
# Runs the command line, and prints to stderr when anything tries to connect.
NO_SOCKETS = """
import socket, sys
def refuse(*args, **kwargs):
    print("CONNECTS", *args[:2], file=sys.stderr)
    raise OSError("no network here")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
from neko_lean.cli import main
main()
"""


def call(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def change(file, **values):
    """Change fields of the JSON object in a file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.fixture
def copied(model, tmp_path):
    """A copy of the model that a test may change; it must not read the weights `x` in the parent folder."""
    folder = shutil.copytree(model, tmp_path / "model")
    shutil.copy(folder / "model.safetensors", tmp_path / "x")
    return folder


@pytest.fixture
def no_network(monkeypatch):
    """Make every connection and name lookup fail, and list the attempts."""
    attempts = []

    def refuse(*args, **kwargs):
        attempts.append(args)
        raise OSError("no network here")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    return attempts


def test_the_package_never_runs_a_shell_unpickles_or_trusts_remote_code():
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = (
                    [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                )
                assert not {name.split(".")[0] for name in names} & FORBIDDEN, file
            if isinstance(node, ast.Call):
                function = ast.unparse(node.func)
                assert function not in ("eval", "exec", "os.system", "os.popen", "torch.load", "np.load"), file
                for keyword in node.keywords:
                    if keyword.arg in ("trust_remote_code", "shell"):
                        assert ast.unparse(keyword.value) == "False", file
                assert not function.endswith("from_pretrained") or "local_files_only=True" in ast.unparse(node), file


# Checkpoints


def test_code_in_a_checkpoint_is_never_run(copied, tmp_path, world):
    (copied / "evil.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n")
    classes = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    change(copied / "config.json", model_type="evil", architectures=["Evil"], auto_map=classes)
    tokenizer = {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}
    change(copied / "tokenizer_config.json", tokenizer_class="EvilTokenizer", auto_map=tokenizer)
    for args in (
        ("plan", copied),
        ("score", copied, "--data", world, "--out", tmp_path / "s"),
        ("memorize", copied, "--data", world, "--out", tmp_path / "m"),
        ("cache-teacher", copied, world, "--out", tmp_path / "c"),
    ):
        result = call(*args)
        assert result.exit_code == 2 and "trust_remote_code" not in result.stderr, result.output
        assert "never runs code that comes with a checkpoint" in result.stderr
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
@pytest.mark.parametrize("nested", [False, True])
def test_code_on_the_hub_is_never_run(copied, no_network, key, nested):
    value = {"text_config": {key: {"": "someone/kernel"}}} if nested else {key: "someone/kernel"}
    change(copied / "config.json", **value)
    with pytest.raises(NekoLeanError, match="run code from the hub"):
        model_folder(copied)
    assert not no_network


@pytest.mark.parametrize("name", [*ELSEWHERE, "part/model.safetensors", 7])
def test_a_weight_index_cannot_name_files_outside_its_folder(copied, name):
    (copied / "model.safetensors").unlink()
    (copied / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(NekoLeanError, match="not a file in its folder"):
        weight_files(copied)


def test_the_weights_that_are_loaded_are_those_that_are_fingerprinted(copied):
    # If a folder contains both a single file and an index, transformers reads the file.
    (copied / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../x"}}))
    assert weight_files(copied) == [copied / "model.safetensors"]
    change(copied / "config.json", transformers_weights="../x")
    with pytest.raises(NekoLeanError, match="transformers_weights"):
        model_folder(copied)


def test_an_adapter_is_refused(copied):
    (copied / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/etc"}))
    with pytest.raises(NekoLeanError, match="adapter"):
        model_folder(copied)


def test_a_tokenizer_cannot_name_files_outside_its_folder(copied, tmp_path):
    shutil.move(copied / "tokenizer.json", tmp_path / "tokenizer.json")
    change(copied / "tokenizer_config.json", tokenizer_file=str(tmp_path / "tokenizer.json"))
    with pytest.raises(NekoLeanError, match="tokenizer"):
        load_tokenizer(copied)


@pytest.mark.parametrize("text", [b"{", b"[" * 10**5, b"\xff"])
def test_a_config_that_is_not_json_is_refused(copied, text):
    (copied / "config.json").write_bytes(text)
    with pytest.raises(NekoLeanError, match="not readable JSON"):
        model_folder(copied)


# Manifests


@pytest.mark.parametrize("name", [*ELSEWHERE, "../shard-00000-of-00001.safetensors", "a/shard-00000-of-00001"])
def test_a_cache_manifest_cannot_name_files_outside_its_folder(cache, tmp_path, name):
    folder = shutil.copytree(cache, tmp_path / "cache")
    shards = json.loads((folder / "manifest.json").read_text())["shards"]
    resign(folder, shards=[{**shards[0], "file": name}, *shards[1:]])
    with pytest.raises(CacheError, match="as number 0, not shard-00000"):
        read_manifest(folder / "manifest.json")


@pytest.mark.parametrize("name", [*ELSEWHERE, "link"])
def test_a_save_manifest_cannot_name_files_outside_its_folder(tmp_path, name):
    (tmp_path / "x").write_text("outside")
    folder = tmp_path / "step-00000001"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "state.json").write_text("{}")
    seal(folder)
    assert find_damage(folder) is None
    (folder / "link").symlink_to(tmp_path / "x")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest |= {"files": {name: manifest["files"]["sub/state.json"]}, "checksum": "0" * 64}
    (folder / "manifest.json").write_bytes(sign(json.dumps(manifest).encode()))
    assert "outside the folder" in find_damage(folder)


@pytest.mark.parametrize("name", ["scores.json", "generations.jsonl"])
def test_scores_cannot_be_links_to_files_outside_their_folder(tmp_path, name):
    (tmp_path / "private").write_text(json.dumps({"id": "a-sc1", "numbers": {}}) + "\n")
    folder = tmp_path / "handed" / "scores"
    folder.mkdir(parents=True)
    (folder / "scores.json").write_text(json.dumps({"model": "m"}))
    (folder / "generations.jsonl").write_text("")
    (folder / name).unlink()
    (folder / name).symlink_to("../../private")
    for read in (lambda: collect([folder]), lambda: collect([folder.parent]), lambda: read_score(folder)):
        with pytest.raises(NekoLeanError, match="is a link to a file outside its folder"):
            read()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "s").symlink_to(folder)
    with pytest.raises(NekoLeanError, match="holds neither"):
        collect([tmp_path / "other"])


# The network


@pytest.mark.slow
def test_local_folders_need_no_network(world, model, tmp_path, no_network, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("went to the hub"))
    data = ("--forget", world, "--retain", world, "--max-steps", 1, "--quiet")
    mia = ("--mia", world / "mia", "--max-new-tokens", 2)
    for args in (
        ("cache-teacher", model, world, "--out", tmp_path / "cache", "--check", 2),
        ("unlearn", model, *data, "--cache", tmp_path / "cache", "--out", tmp_path / "u"),
        ("score", tmp_path / "u", "--data", world, *mia, "--out", tmp_path / "s"),
        ("memorize", world / "base", "--data", world, "--out", tmp_path / "m", "--max-steps", 1),
        ("plan", model),
    ):
        result = call(*args)
        assert result.exit_code == 0, result.output
    assert no_network == []


def test_a_hub_name_is_one_sentence_when_offline(tmp_path):
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(PACKAGE.parent)}
    command = [sys.executable, "-c", NO_SOCKETS, "plan", "owner/name"]
    process = subprocess.run(command, capture_output=True, text=True, env=env)
    assert process.returncode == 2 and "CONNECTS" not in process.stderr, process.stderr
    refusal = "error: owner/name is not a local folder, and downloading it from the Hugging Face Hub failed"
    assert refusal in process.stderr.splitlines()[-1]


@pytest.mark.slow
def test_a_revision_pins_the_download_and_is_recorded(world, model, tmp_path, monkeypatch):
    import huggingface_hub

    requests = []

    def fetch(name, *, revision, allow_patterns):
        requests.append((name, revision))
        assert all(
            pattern.endswith((".json", ".safetensors", ".txt", ".model", ".jinja")) for pattern in allow_patterns
        )
        return str(model)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    pin = ("owner/name", "--revision", "abc123")
    data = ("--forget", world, "--retain", world, "--max-steps", 1, "--quiet")
    for args in (
        ("cache-teacher", *pin, world, "--out", tmp_path / "cache"),
        ("unlearn", *pin, *data, "--cache", tmp_path / "cache", "--out", tmp_path / "u"),
        ("score", *pin, "--data", world, "--out", tmp_path / "s", "--max-new-tokens", 2),
        ("memorize", *pin, "--data", world, "--out", tmp_path / "m", "--max-steps", 1),
        ("plan", *pin),
    ):
        result = call(*args)
        assert result.exit_code == 0, result.output
    assert requests == [("owner/name", "abc123")] * 5
    for file in ("cache/manifest.json", "u/run.json", "s/scores.json", "m/run.json"):
        assert json.loads((tmp_path / file).read_text())["model"] == "owner/name@abc123"
    model_folder("owner/name")
    assert requests[-1] == ("owner/name", None) and model_name("owner/name") == "owner/name"
    refused = call("plan", model, "--revision", "abc123")
    assert refused.exit_code == 2 and "--revision applies to a hub name" in refused.stderr
    for revision in ("../../x", "a/../../x", "", "x y", "/etc"):
        assert call("plan", "owner/name", "--revision", revision).exit_code == 2
    assert len(requests) == 6


# Personal data


@pytest.mark.slow
def test_no_command_prints_texts_of_the_data(world, model, tmp_path, capfd):
    """Every text contains a marker, and all commands run with their default output."""
    data = tmp_path / "data"
    (data / "mia").mkdir(parents=True)
    for name, prefix in (("forget", "Foo"), ("retain", "Rix")):
        examples = [
            replace(example, input=f"{MARKER} {example.input}", output=f"{example.output} {MARKER}")
            for example in make_rows(prefix)
        ]
        write_rows(data / f"{name}.jsonl", examples)
    for name in ("member", "nonmember"):
        documents = [{"document": f"{MARKER} {n} {name} and more words", "task": "Task1"} for n in range(4)]
        write_jsonl(data / "mia" / f"{name}.jsonl", documents)
    anchor = ("--anchor", data / "mia" / "nonmember.jsonl")
    both = ("--forget", data, "--retain", data, *anchor, "--cache", tmp_path / "c", "--max-steps", 2)
    score_inputs = ("--data", data, "--mia", data / "mia", "--max-new-tokens", 4)
    output = ""
    for args in (
        ("cache-teacher", model, data, *anchor, "--forget", data, "--out", tmp_path / "c", "--check", 2, "--top-k", 2),
        ("inspect", tmp_path / "c", "--verify"),
        ("unlearn", model, *both, "--out", tmp_path / "u"),
        ("memorize", model, "--data", data, "--max-steps", 2, "--out", tmp_path / "m"),
        ("score", tmp_path / "m", *score_inputs, "--out", tmp_path / "s1", "--attack", "prefix"),
        ("score", tmp_path / "u", *score_inputs, "--before", tmp_path / "s1", "--json", "--out", tmp_path / "s2"),
        ("report", tmp_path / "s1", tmp_path / "s2", "--out", tmp_path / "report.html"),
    ):
        result = call(*args)
        assert result.exit_code == 0, result.output
        output += result.output + result.stderr
    out, err = capfd.readouterr()
    assert len(output) > 1000 and MARKER not in output + out + err
    files = [path for path in tmp_path.rglob("*") if path.is_file() and data not in path.parents]
    assert {path.name for path in files if MARKER.encode() in path.read_bytes()} == {"generations.jsonl", "report.html"}


@pytest.mark.parametrize("column", ["id", "input", "output", "task"])
@pytest.mark.parametrize("value", [[MARKER], {"a": MARKER}, ""])
def test_no_error_quotes_a_row(tmp_path, column, value):
    """If columns are mixed up, the id or the task can contain personal data."""
    row = {**make_rows("Foo")[0].lume_row, "input": f"{MARKER} asks", "output": MARKER, "task": MARKER, column: value}
    write_jsonl(tmp_path / "forget.jsonl", [row])
    with pytest.raises(NekoLeanError, match=r"row 1[:,] column") as caught:
        read_rows(tmp_path, "forget")
    assert MARKER not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", f'{{"id": "{MARKER}'),
        ("a.jsonl", f'["{MARKER}"]'),
        ("a.csv", f'id,input,output,task\n"{MARKER}"{MARKER},x'),
        ("a.csv", f"{MARKER},b\n1,2\n"),
        ("a.parquet", MARKER),
        ("a.json", MARKER),
        ("a.tsv", f"{MARKER}\tb\n1\t2\n"),
        ("a.xlsx", MARKER),
    ],
)
def test_no_error_quotes_a_file(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(NekoLeanError) as caught:
        read_rows(tmp_path / name)
    assert MARKER not in str(caught.value)


def test_no_error_quotes_a_document_a_paraphrase_or_a_question(tmp_path):
    file, examples = tmp_path / "x.jsonl", make_rows("Foo")
    for split in ("dev", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / f"virology_{split}.csv").write_text(f"{MARKER},a,b,c,d,{MARKER}\n")
    for read, raw in (
        (lambda: read_documents(file, ""), {"document": MARKER, "task": [MARKER]}),
        (lambda: read_documents(file, ""), {"document": [MARKER]}),
        (lambda: read_paraphrases(file, examples), {"id": MARKER, "input": MARKER}),
        (lambda: read_paraphrases(file, examples), {"id": examples[0].id, "input": [MARKER]}),
        (lambda: read_mmlu(tmp_path), {}),
    ):
        write_jsonl(file, [raw])
        with pytest.raises(NekoLeanError, match=r"row 1[:,] column") as caught:
            read()
        assert MARKER not in str(caught.value)
