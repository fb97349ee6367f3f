"""`lr = "auto"`: a learning rate by the width of the model."""

import json

import pytest

from neko_lean.errors import NekoLeanError
from neko_lean.recipe import load_recipe
from neko_lean.runs.learning_rates import with_learning_rate


@pytest.mark.parametrize(
    ("width", "rank", "lr"), [(192, 0, 4e-4), (576, 0, 1.3e-4), (2048, 0, 3.8e-5), (192, 16, 4e-3), (4096, 64, 1.9e-4)]
)
def test_the_learning_rate_is_inverse_to_the_hidden_size(tmp_path, width, rank, lr):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": width}))
    chosen = with_learning_rate(load_recipe("calibrated", {"lr": "auto", "lora_rank": rank}), tmp_path)
    assert chosen.lr == pytest.approx(lr, rel=1e-9)


def test_a_number_stays_as_it_is(tmp_path):
    assert with_learning_rate(load_recipe("calibrated", {"lr": 0.5}), tmp_path).lr == 0.5


def test_memorize_needs_a_number():
    with pytest.raises(NekoLeanError, match="set a number"):
        load_recipe("memorize", {"lr": "auto"})


def test_a_run_trains_with_the_number_and_records_it(unlearn, model, tmp_path):
    width = json.loads((model / "config.json").read_text())["hidden_size"]
    run = unlearn(tmp_path / "out", {"lr": "auto", "max_steps": 2})
    assert run["recipe"]["lr"] == pytest.approx(0.077 / width, rel=0.05)
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["lr"] == run["recipe"]["lr"]
