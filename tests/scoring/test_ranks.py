"""`score` with several processes: same files, resuming with another number of ranks, and errors of one rank."""

import errno
import json

import pytest
import torch

from neko_lean.data.examples import read_rows
from neko_lean.distributed.ranks import is_main_process
from neko_lean.errors import NekoLeanError
from neko_lean.jsonio import write_jsonl
from neko_lean.models.loading import load_model, load_tokenizer
from neko_lean.scoring import generation, measure, shared_prefix, views
from neko_lean.scoring.generation import GenerationLimits, examples_of_rank, generate
from neko_lean.scoring.run import SCORES
from neko_lean.scoring.score_folder import GENERATIONS, add_generations
from neko_lean.scoring.shared_prefix import last_hidden
from neko_lean.scoring.views import tokenize_documents, view_documents
from tests.scoring.calls import score_with
from tests.scoring.subjects import make_subject, write_hub
from tests.torchrun import torchrun

LOOSE = ("wall_seconds", "peak_memory")
FEW = ("--max-new-tokens", 6, "--batch-size", 8)
SMALL = {"max_new_tokens": 6, "batch_size": 8, "quiet": True, "device": "cpu"}


def scores_of(folder):
    return {k: v for k, v in json.loads((folder / SCORES).read_text()).items() if k not in LOOSE}


def files(folder):
    """Every file except scores.json, which holds times."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != SCORES}


@pytest.fixture
def as_rank(monkeypatch):
    """A function that makes this process one of several ranks, without the others."""

    def become(number, count):
        for name, value in (("TORCHELASTIC_RUN_ID", "x"), ("WORLD_SIZE", count), ("RANK", number)):
            monkeypatch.setenv(name, str(value))

    return become


@pytest.fixture(scope="module")
def parts(world, model):
    return load_model(model, torch.float32, torch.device("cpu")), load_tokenizer(model), read_rows(world, "forget")


@pytest.fixture(scope="module")
def whole(world, model, tmp_path_factory):
    """A score made by one process."""
    out = tmp_path_factory.mktemp("whole") / "out"
    score_with(model, world, out, **SMALL)
    return out


def by_ranks(monkeypatch, as_rank, module, count, work):
    """What each rank sends in `work`, which gathers once, and what each rank returns."""

    def send(own):
        sent.append(own)
        raise InterruptedError

    sent, found = [], []
    monkeypatch.setattr(module, "all_gather_tensors", send)
    for number in range(count):
        as_rank(number, count)
        with pytest.raises(InterruptedError):
            work()
    monkeypatch.setattr(module, "all_gather_tensors", lambda own: sent)
    for number in range(count):
        as_rank(number, count)
        found.append(work())
    return sent, found


@pytest.mark.parametrize("count", [2, 5])
def test_views_equal_those_of_one_process(parts, monkeypatch, as_rank, count):
    lm, tokenizer, rows = parts
    ids, _ = tokenize_documents(tokenizer, [f"{row.input} {row.output}" for row in rows])
    wanted = view_documents(lm, tokenizer, ids, batch_tokens=150)
    sent, found = by_ranks(
        monkeypatch, as_rank, views, count, lambda: view_documents(lm, tokenizer, ids, batch_tokens=150)
    )
    assert len(sent[0]) and len(sent[1]) and sum(map(len, sent)) == sum(len(one) - 1 for one in ids)
    for some in found:
        for one, two in zip(some, wanted, strict=True):
            assert all((getattr(one, k) == getattr(two, k)).all() for k in ("logp", "entropy", "deviation", "rank"))
            assert one.rank.dtype == two.rank.dtype == "int64"


@pytest.mark.parametrize(("count", "batch_tokens"), [(2, 100), (3, 10**6)])
def test_hidden_states_equal_those_of_one_process(parts, monkeypatch, as_rank, count, batch_tokens):
    lm, tokenizer, rows = parts
    ids = [[5, 6, 7, *one] for one in tokenize_documents(tokenizer, [row.input for row in rows])[0]]
    wanted = last_hidden(lm, ids, 0, batch_tokens=batch_tokens)
    sent, found = by_ranks(
        monkeypatch, as_rank, shared_prefix, count, lambda: last_hidden(lm, ids, 0, batch_tokens=batch_tokens)
    )
    assert sum(map(len, sent)) == len(ids)
    assert [len(one) for one in sent[1:]] == [0, 0] or batch_tokens == 100  # one batch: two ranks have none
    assert all(torch.equal(one, wanted) for one in found)


@pytest.mark.parametrize("count", [2, 20])
def test_ranks_generate_the_same_batches(parts, monkeypatch, as_rank, count):
    _, tokenizer, rows = parts
    made = []
    monkeypatch.setattr(generation, "_decode", lambda lm, tokenizer, prompts, *_: [([], "eos") for _ in prompts])

    def batches(own):
        said = generate(parts[0], tokenizer, [rows[i] for i in own], batch_size=5, max_new_tokens=1)
        return [[own[i] for i, _ in batch] for batch in said]

    wanted = batches(range(len(rows)))
    assert len(wanted) == 6
    for number in range(count):
        as_rank(number, count)
        made.append(batches(examples_of_rank(parts[0], tokenizer, rows, GenerationLimits(5, 1))))
        assert made[-1] == wanted[number::count]
    assert sum(map(len, made)) == len(wanted)


@pytest.mark.slow
def test_two_processes_write_the_files_of_one(world, model, tmp_path):
    nonmembers = world / "mia" / "nonmember.jsonl"
    write_hub(tmp_path / "mmlu", [make_subject("anatomy", 6), make_subject("virology", 1)])
    asked = [row for row in read_rows(world, "forget") if row.kind == "qa"][:3]
    write_jsonl(tmp_path / "other.jsonl", [{"id": row.id, "output": "a wood", "wrong": ["a sea"]} for row in asked])
    score_with(
        model, world, tmp_path / "one", **SMALL, mia=world / "mia", held=nonmembers, mmlu=tmp_path / "mmlu", shots=2,
        paraphrases=tmp_path / "other.jsonl", attacks=["prefix", "sample", "quantize", "relearn"],
        official=tmp_path / "one.json",
    )  # fmt: skip
    found = torchrun(
        "score", model, "--data", world, "--out", tmp_path / "two", *FEW, "--mia", world / "mia", "--held", nonmembers,
        "--mmlu", tmp_path / "mmlu", "--shots", 2, "--paraphrases", tmp_path / "other.jsonl", "--attack", "prefix",
        "--attack", "sample", "--attack", "quantize", "--attack", "relearn",
        "--official", tmp_path / "two.json", "--json",
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    said = json.loads(found.stdout)  # one object: only the main process prints
    assert said.pop("out") == str(tmp_path / "two")
    assert said == json.loads((tmp_path / "two" / SCORES).read_text())
    assert scores_of(tmp_path / "two") == scores_of(tmp_path / "one")
    assert sorted(files(tmp_path / "one")) == ["documents.jsonl", GENERATIONS]
    assert files(tmp_path / "two") == files(tmp_path / "one")
    assert (tmp_path / "two.json").read_bytes() == (tmp_path / "one.json").read_bytes()
    assert not any(path.name.startswith(".") for path in tmp_path.iterdir())


@pytest.mark.slow
def test_three_processes_resume_a_run_of_one(world, model, whole, tmp_path, monkeypatch):
    def killed(*args, **kwargs):
        for number, batch in enumerate(generate(*args, **kwargs)):
            if number == 7:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(measure, "generate", killed)
    with pytest.raises(KeyboardInterrupt):
        score_with(model, world, tmp_path / "out", **SMALL)
    found = torchrun("score", model, "--data", world, "--out", tmp_path / "out", *FEW, "--resume", ranks=3)
    assert found.returncode == 0, found.stderr
    assert "score: 54 of 60 rows were generated already" in found.stderr  # one batch is left, so two ranks have none
    assert files(tmp_path / "out") == files(whole) and scores_of(tmp_path / "out") == scores_of(whole)


@pytest.mark.slow
def test_full_disk_of_one_rank_stops_all_and_one_process_resumes(world, model, whole, tmp_path):
    out, stage = tmp_path / "out", tmp_path / ".out.partial"
    found = torchrun("score", model, "--data", world, "--out", out, *FEW, script=__file__)
    assert found.returncode != 0 and not out.exists()
    for rank in ("", "rank 1: "):
        assert f"\n{rank}error: No space left on the disk while writing {out}" in f"\n{found.stderr}"
    assert f"{stage} keeps what was generated: continue with --resume." in found.stderr
    held = {path.name: len(path.read_text().splitlines()) for path in stage.glob("generations*")}
    assert held == {GENERATIONS: 32, "generations-1.jsonl": 8}  # the first rank's share, and a batch
    with pytest.raises(NekoLeanError, match="--resume"):
        score_with(model, world, out, **SMALL)
    score_with(model, world, out, **SMALL, resume=True)
    assert files(out) == files(whole) and scores_of(out) == scores_of(whole)


if __name__ == "__main__":  # under torchrun: the disk of every rank except the first is full after a batch
    from neko_lean.cli import main

    def full(stage, batch):
        if not is_main_process() and any(stage.glob("generations-*")):
            raise OSError(errno.ENOSPC, "No space left on device")
        add_generations(stage, batch)

    measure.add_generations = full
    main()
