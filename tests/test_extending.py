"""The example in docs/extending.md works as printed: objective, registration and recipe."""

import re
from pathlib import Path

import pytest
import torch
from transformers import ByT5Tokenizer

import neko_lean
from neko_lean.data import prompts
from neko_lean.data.examples import Example
from neko_lean.objectives import FORGET_OBJECTIVES, TokenInputs
from neko_lean.options import RunOptions
from neko_lean.recipe import load_recipe
from tests.helpers import make_cache

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), re.DOTALL)


@pytest.fixture
def tnpo(monkeypatch, tmp_path):
    """The page's objective, registered; returns the path of its recipe."""
    monkeypatch.setitem(FORGET_OBJECTIVES, "tnpo", None)
    del FORGET_OBJECTIVES["tnpo"]
    code, recipe = (next(text for kind, text in BLOCKS if kind == wanted) for wanted in ("python", "toml"))
    exec(compile(code, "tnpo.py", "exec"), {"__name__": "tnpo"})
    (tmp_path / "tnpo.toml").write_text(recipe)
    return tmp_path / "tnpo.toml"


def test_the_loss_is_the_formula(tnpo):
    generator = torch.Generator().manual_seed(0)
    logp = (-3 * torch.rand(6, generator=generator, dtype=torch.float64)).requires_grad_()
    reference = -3 * torch.rand(6, generator=generator, dtype=torch.float64)
    weights = torch.full((6,), 1 / 6, dtype=torch.float64)
    inputs = TokenInputs(logp, torch.arange(6), weights, reference_logp=reference)
    loss = FORGET_OBJECTIVES["tnpo"].loss(inputs, beta=0.5)
    ratios = [q.exp() / p.exp() for q, p in zip(logp, reference, strict=True)]
    expected = torch.stack([2 / 0.5 * torch.log(1 + ratio**0.5) for ratio in ratios]).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, logp)[0] for value in (loss, expected)))


def test_its_recipe_trains(tnpo, world, model, tmp_path):
    recipe = load_recipe(tnpo)
    assert recipe.hyperparameters == {"beta": 0.5} and recipe.lr == load_recipe("npo").lr

    make_cache(model, world, tmp_path / "cache", forget=world, dtype="float32")
    overrides = {"max_steps": 2, "forget_rows": 4, "retain_rows": 4, "dtype": "float32"}
    result = neko_lean.unlearn(
        model, tmp_path / "out", forget=world, retain=world, cache=tmp_path / "cache", recipe=tnpo, overrides=overrides,
        run=RunOptions(quiet=True),
    )  # fmt: skip
    assert result["steps"] == 2 and result["recipe"]["beta"] == 0.5

    # A cache without the forget set is refused, because the objective asks for a reference.
    make_cache(model, world, tmp_path / "retain-only", dtype="float32")
    with pytest.raises(neko_lean.NekoLeanError, match="--forget"):
        neko_lean.unlearn(
            model, tmp_path / "other", forget=world, retain=world, cache=tmp_path / "retain-only",
            recipe=tnpo, overrides=overrides, run=RunOptions(quiet=True),
        )  # fmt: skip


def test_the_registration_names_the_line_that_is_there():
    """The diff on the page applies to the current file."""
    diff = next(text for kind, text in BLOCKS if kind == "diff")
    (before,) = (line[1:] for line in diff.splitlines() if line.startswith("-"))
    assert before in (ROOT / "neko_lean" / "objectives" / "__init__.py").read_text().splitlines()


def test_the_prompt_format_works(monkeypatch):
    code = [text for kind, text in BLOCKS if kind == "python"][1]
    monkeypatch.setattr(prompts, "_REGISTRY", dict(prompts._REGISTRY))
    exec(compile(code, "qa.py", "exec"), {"prompt_format": prompts.prompt_format, "Example": Example})
    example = Example("a-qa0", "Who?", "Mira.", "Task2")
    assert prompts.find_format("qa", ByT5Tokenizer()).render(example)[:2] == ("Question: Who?\nAnswer:", " Mira.")
