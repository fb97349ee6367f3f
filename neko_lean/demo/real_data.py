"""Real data in the demo's layout: forget, retain, anchor, and members and non-members of a membership attack."""

from __future__ import annotations

from pathlib import Path

from neko_lean.data import read_anchor, read_rows
from neko_lean.demo.world import anchor_documents, task3_documents
from neko_lean.errors import NekoLeanError
from neko_lean.jsonio import write_jsonl

ANCHORS = 60  # documents of each task in an anchor taken from the train split


def copy_rows(source: Path, split: str | None, out: Path) -> None:
    """Copy one split of real data to `out` in the layout of the synthetic world; its Task3 documents are members."""
    sets = {name: read_rows(source, name, split) for name in ("forget", "retain")}
    out.mkdir()
    for name, rows in sets.items():
        write_jsonl(out / f"{name}.jsonl", [example.row for example in rows])
    anchors = _anchor(source, {row.input for rows in sets.values() for row in rows})
    if anchors:
        write_jsonl(out / "anchor.jsonl", anchors)
    nonmembers = source / "mia" / "nonmember.jsonl"
    members = task3_documents(sets["forget"])
    if nonmembers.is_file() and members:
        # The official member.jsonl is drawn from the train split; with another split they would be non-members.
        (out / "mia").mkdir()
        write_jsonl(out / "mia" / "member.jsonl", members)
        (out / "mia" / "nonmember.jsonl").write_bytes(nonmembers.read_bytes())


def _anchor(source: Path, known: set[str]) -> list[dict[str, str]]:
    """The documents of `anchor.jsonl`, or else the first of each task in the train split that are not `known`."""
    if (source / "anchor.jsonl").is_file():
        return [{"document": row.output, "task": row.task} for row in read_anchor(source / "anchor.jsonl")]
    try:
        rows = [row for row in read_rows(source, "retain", "train") if row.input not in known]
    except NekoLeanError:
        return []
    return anchor_documents(rows, ANCHORS)
