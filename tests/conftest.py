"""Shared fixtures: a small data set, a random model and its teacher cache. No test needs the network."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# Test workers share the cores, so waiting threads must not spin.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported, by whichever test

from hypothesis import HealthCheck, settings

import neko_lean
from neko_lean.demo.base_model import write_base
from neko_lean.jsonio import write_jsonl
from tests.helpers import SMALL, flat, make_cache, make_rows, random_model, write_rows

torch.set_num_threads(2)
# The same examples in every run, and no limit that a slow machine misses. `--hypothesis-profile default` tries others.
settings.register_profile(
    "suite", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
settings.load_profile("suite")


@pytest.fixture(autouse=True)
def bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat every CPU as one with bfloat16 instructions, so that warnings and dtypes are the same everywhere."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True, raising=False)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests marked cuda on a machine without a GPU."""
    if item.get_closest_marker("cuda") is not None and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")


@pytest.fixture
def gpu() -> torch.device:
    """The first GPU, for tests marked cuda."""
    return torch.device("cuda", 0)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the GPUs, for tests that compare this process with another one that runs on the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with forget.jsonl, retain.jsonl, mia/, and base/, the config and tokenizer of a small OLMo."""
    folder = tmp_path_factory.mktemp("world")
    forget, retain, unseen = make_rows("Foo"), make_rows("Rix", 6), make_rows("Oth")
    write_rows(folder / "forget.jsonl", forget)
    write_rows(folder / "retain.jsonl", retain)
    (folder / "mia").mkdir()
    for name, examples in (("member", forget), ("nonmember", unseen)):
        documents = [
            {"id": example.id, "document": f"{example.input} {example.output}"}
            for example in examples
            if example.kind == "completion"
        ]
        write_jsonl(folder / "mia" / f"{name}.jsonl", documents)
    write_base(folder / "base", [*forget, *retain])
    return folder


@pytest.fixture(scope="session")
def model(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with the world's tokenizer."""
    return random_model(world, tmp_path_factory.mktemp("model"), scale=20.0)


@pytest.fixture(scope="session")
def cache(world: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's teacher cache of the world's retain set, in float32 and the neko format."""
    out = tmp_path_factory.mktemp("cache")
    make_cache(model, world, out, dtype="float32", format="neko")
    return out


@pytest.fixture
def unlearn(world: Path, model: Path, cache: Path) -> Callable[..., Any]:
    """A function `unlearn(out, overrides, **kwargs)` that unlearns the world's forget set with the recipe neko."""

    def run(out: Path, overrides: dict[str, Any] = SMALL, **kwargs: Any) -> dict[str, Any]:
        defaults = {"model": model, "cache": cache, "recipe": "neko", "overrides": overrides, "seed": 3, "quiet": True}
        return flat(neko_lean.unlearn)(out=out, forget=world, retain=world, **{**defaults, **kwargs})

    return run
