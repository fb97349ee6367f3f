"""The notebook in examples/ runs from the first cell to the last, on a tiny model."""

import json
from pathlib import Path

import pytest

from tests.helpers import make_chat_model

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.slow
def test_forget_in_python(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((EXAMPLES / "forget_in_python.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in cells)

    names: dict[str, object] = {}
    for cell in cells:
        exec("".join(cell["source"]), names)
        if "parameters" in cell["metadata"].get("tags", []):
            overrides = {"max_steps": 2, "dtype": "float32", "batch_tokens": 512}
            names |= {"MODEL": str(make_chat_model(model, tmp_path / "chat")), "OVERRIDES": overrides}

    assert len(names["losses"]) == 2 and names["after"]["difference"] is not None
    assert "2 steps, loss" in capsys.readouterr().out
    assert {path.name for path in Path("forgetting").iterdir()} == {
        "scores-before", "unlearned", "scores-after", "report.html"
    }  # fmt: skip
