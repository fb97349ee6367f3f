"""Other wordings of rows, which the user gives: of the prompt, for an attack; of the answer, for the truth ratio."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from neko_lean.data import Example, is_file, read_jsonl
from neko_lean.errors import NekoLeanError


@dataclass(frozen=True)
class Paraphrase:
    """Another wording of one row: of its prompt, or of its answer together with wrong answers; or both."""

    id: str
    input: str | None
    output: str | None
    wrong: tuple[str, ...]


def read_paraphrases(path: str | Path, rows: Sequence[Example]) -> list[Paraphrase]:
    """The lines of a jsonl file with an `id` that is one of `rows`, and `input`, or `output` and `wrong` (a list of
    texts), or all three. A row may have several. Raises NekoLeanError naming file, line and column."""
    file = Path(path)
    if not is_file(file):
        missing = "is not a file" if file.exists() else "does not exist"
        raise NekoLeanError(f"{file} {missing}: --paraphrases wants a jsonl file with id, input, output, wrong.")
    known: dict[str, set[Example]] = {}
    for row in rows:
        known.setdefault(row.id, set()).add(row)
    found = []
    for where, raw in read_jsonl(file):
        if not isinstance(raw.get("id"), str) or raw["id"] not in known:
            raise NekoLeanError(f"{where}, column id: is the id of no row that is scored.")
        if len(known[raw["id"]]) > 1:
            raise NekoLeanError(
                f"{where}, column id: {raw['id']!r} is the id of a forget row and of a retain row, so which of them is "
                f"meant cannot be told; rename one of the two."
            )
        texts = {name: raw.get(name) for name in ("input", "output")}
        for name, text in texts.items():
            if text is not None and not (isinstance(text, str) and text.strip()):
                raise NekoLeanError(f"{where}, column {name}: expected text.")
        wrong = raw.get("wrong", [])
        if not isinstance(wrong, list) or not all(isinstance(one, str) and one.strip() for one in wrong):
            raise NekoLeanError(f"{where}, column wrong: expected a list of texts.")
        if (texts["output"] is None) != (not wrong) or (texts["output"] is None and texts["input"] is None):
            raise NekoLeanError(f"{where}: needs an input, or an output together with wrong answers.")
        found.append(Paraphrase(raw["id"], texts["input"], texts["output"], tuple(wrong)))
    if not found:
        raise NekoLeanError(f"{file} holds no paraphrases.")
    return found
