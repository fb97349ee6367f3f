"""`lr = "auto"`: a learning rate by the width of the model."""

import json

import pytest

from neko_lean.errors import NekoLeanError
from neko_lean.recipe import load_recipe
from neko_lean.runs.learning_rates import with_learning_rate


@pytest.mark.parametrize(("width", "lr"), [(192, 4e-4), (576, 1.3e-4), (2048, 3.8e-5)])
def test_the_learning_rate_is_inverse_to_the_hidden_size(tmp_path, capsys, width, lr):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": width}))
    chosen = with_learning_rate(load_recipe("calibrated", {"lr": "auto"}), tmp_path)
    assert chosen.lr == pytest.approx(lr, rel=1e-9)
    assert f"lr = {lr:.1e} (for hidden size {width})" in capsys.readouterr().err


def test_adapters_have_their_own_learning_rate_and_numbers_stay_as_they_are(tmp_path):
    adapters = load_recipe("calibrated", {"lr": "auto", "lora_rank": 4})
    assert with_learning_rate(adapters, tmp_path, quiet=True).lr == 2e-4
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
