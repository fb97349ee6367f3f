"""Fixtures: a small world, a random model and its cache, made on the fly. No test needs the network."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# Two workers with two threads each share two cores: threads that wait must not spin.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

import neko_lean
from neko_lean.demo.base_model import write_base
from neko_lean.jsonio import write_jsonl
from tests.helpers import SMALL, flat, make_cache, make_rows, random_model, write_rows

torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same warnings and dtypes on every CPU: it counts as one with bfloat16 instructions."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True, raising=False)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that compare with another process, which runs on the CPU: so does this one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with forget.jsonl, retain.jsonl, mia/, and base/: config and tokenizer of a small OLMo."""
    folder = tmp_path_factory.mktemp("world")
    forget, retain, other = make_rows("Foo"), make_rows("Rix", 6), make_rows("Oth")
    write_rows(folder / "forget.jsonl", forget)
    write_rows(folder / "retain.jsonl", retain)
    (folder / "mia").mkdir()
    for name, rows in (("member", forget), ("nonmember", other)):
        documents = [{"id": r.id, "document": f"{r.input} {r.output}"} for r in rows if r.kind == "sc"]
        write_jsonl(folder / "mia" / f"{name}.jsonl", documents)
    write_base(folder / "base", [*forget, *retain])
    return folder


@pytest.fixture(scope="session")
def model(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model(world, tmp_path_factory.mktemp("model"), scale=20.0)


@pytest.fixture(scope="session")
def cache(world: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's teacher cache over the world's retain rows, with the default settings in float32."""

    out = tmp_path_factory.mktemp("cache")
    make_cache(model, world, out, dtype="float32", format="neko")
    return out


@pytest.fixture
def unlearn(world: Path, model: Path, cache: Path) -> Callable[..., Any]:
    """`unlearn` of the world with recipe neko, in few words."""

    def run(out: Path, change: dict[str, Any] = SMALL, **options: Any) -> dict[str, Any]:
        given = {"model": model, "cache": cache, "recipe": "neko", "overrides": change, "seed": 3, "quiet": True}
        return flat(neko_lean.unlearn)(out=out, forget=world, retain=world, **{**given, **options})

    return run
