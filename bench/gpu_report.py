"""The report of bench/gpu.py: one document of tables, as plain text and as Markdown, next to results.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

GIB = 2**30
Table = tuple[str, list[str], list[list[str]]]  # title, heads, rows

STEP_HEADS = [
    "step", "real tokens/s", "s/step", "first s", "MFU", "peak GiB", "predicted", "ratio", "64 x 128: peak GiB",
    "predicted", "ratio", "note",
]  # fmt: skip
CARD_HEADS = ["", "parameters", "layers", "peak GiB", "predicted", "ratio", "note"]
HEAD_HEADS = ["loss", "method", "ms", "x materialised", "memory, chunks", "error: loss", "hidden", "weight"]


def write_report(results: dict[str, Any], out: Path) -> None:
    """Write results.json, report.txt and report.md."""
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    tables = [table for table in all_tables(results) if table[2]]
    heading = title(results)
    (out / "report.txt").write_text("\n\n".join([heading, *map(plain, tables)]) + "\n")
    (out / "report.md").write_text("\n\n".join([heading, *map(markdown, tables)]) + "\n")


def title(results: dict[str, Any]) -> str:
    """Where and with what the sections ran."""
    machine = results["sections"].get("machine")
    if machine is None:
        return f"bench/gpu.py, {results['when']}"
    versions = ", ".join(f"{name} {version or 'missing'}" for name, version in machine["versions"].items())
    lines = [
        f"{machine['device']}, {gib(machine['memory'])} GiB, driver {machine['driver']}, CUDA {machine['cuda']}; "
        f"Python {machine['python']}; {results['when']}",
        versions,
        f"Steps of OLMo-1B-0724's shape, random weights, recipe neko; {machine['rows']}.",
    ]
    if results["dry_run"]:
        lines.insert(0, "DRY RUN at toy sizes: no number below is a measurement.")
    return "\n".join(lines)


def all_tables(results: dict[str, Any]) -> list[Table]:
    sections = results["sections"]
    return [
        ("Targets", ["target", "limit", "value", "reached"], target_rows(sections, results["dry_run"])),
        ("Training steps", STEP_HEADS, step_rows(sections)),
        ("Largest model in 24 GB", CARD_HEADS, card_rows(sections)),
        ("Head", HEAD_HEADS, head_rows(sections)),
        ("Scoring and caching", ["", "tokens", "seconds", "tokens/s", "peak GiB"], speed_rows(sections)),
        ("Tests marked cuda", ["outcome", "tests", "names"], test_rows(sections)),
        ("Left out", ["section", "reason"], [list(pair) for pair in results["left_out"].items()]),
    ]  # fmt: skip


def target_rows(sections: dict[str, Any], dry_run: bool) -> list[list[str]]:
    """Each target with its value, and whether that reaches it."""
    step, offloaded, two = (sections.get(name) for name in ("step", "step both offloads", "two bf16 models"))
    head = sections.get("head", {})
    targets = [
        (
            "full fine-tune, 64 x 128 tokens: peak / (weights + 8-bit state)", "<=", 1.25,
            step and step["full"]["peak"] / (step["weights"] + step["full"]["state"]),
        ),
        (
            "both offloads, 64 x 128 tokens: peak / weights", "<=", 1.6,
            offloaded and offloaded["full"]["peak"] / offloaded["weights"],
        ),
        (
            "real tokens/s / those of two bf16 models", ">=", 1.2,
            step and two and step["tokens_per_second"] / two["tokens_per_second"],
        ),
        *(
            (f"head, {loss}: time / that of materialised logits", "<=", 1.35, head_ratio(head, loss))
            for loss in ("target", "target and KL")
        ),
        ("predicted peaks: largest distance from the measured one", "<=", 0.1, worst_prediction(sections)),
    ]  # fmt: skip
    rows = []
    for name, sign, limit, value in targets:
        reached = "not measured"
        if value is not None:
            reached = "yes" if (value <= limit if sign == "<=" else value >= limit) else "NO"
        rows.append([name, f"{sign} {limit}", number(value), "toy" if dry_run and value is not None else reached])
    return rows


def head_ratio(head: dict[str, Any], loss: str) -> float | None:
    ratio: float | None = head.get(loss, {}).get("token_stats", {}).get("ratio")
    return ratio


def worst_prediction(sections: dict[str, Any]) -> float | None:
    """The largest |predicted / measured - 1| of neko-lean's own peaks."""
    own = [result for name, result in sections.items() if name.startswith(("step", "24 GB"))]
    own += [result["full"] for result in own if "full" in result]
    distances = [abs(r["predicted"] / r["peak"] - 1) for r in own if r.get("predicted") and r.get("peak")]
    return max(distances, default=None)


def step_rows(sections: dict[str, Any]) -> list[list[str]]:
    rows = []
    for name, result in sections.items():
        if not name.startswith(("step", "two")):
            continue
        full = result.get("full", {})
        rows.append([
            name, number(result["tokens_per_second"], 0), number(result["seconds"], 3),
            number(result["all_seconds"][0], 1), share(result), *peaks(result), *peaks(full), note(name, result),
        ])  # fmt: skip
    return rows


def peaks(result: dict[str, Any]) -> list[str]:
    """Measured peak, predicted peak, and predicted / measured."""
    measured, predicted = result.get("peak"), result.get("predicted")
    return [gib(measured), gib(predicted), number(predicted / measured) if predicted and measured else ""]


def share(result: dict[str, Any]) -> str:
    if "mfu" not in result:
        return ""
    return "unknown card" if result["mfu"] is None else f"{result['mfu']:.1%}"


def note(name: str, result: dict[str, Any]) -> str:
    """What differs from the section's name."""
    notes = []
    wanted = "checkpointed" if "checkpointed" in name else "layerwise"
    if result.get("backward", wanted) != wanted:
        notes.append(f"fell back to backward={result['backward']}")
    if result.get("head_chunk") or result.get("full", {}).get("head_chunk"):
        smaller = result.get("full", result)
        sizes = f"head in chunks of {smaller['head_chunk']}, micro_tokens {smaller['micro_tokens']}"
        notes.append(f"memory ran out, continued with {sizes}")
    if result.get("limited_by") == "host memory":
        notes.append("limited by host memory, not by the card")
    if result.get("packed"):
        notes.append("packed")
    return "; ".join(notes)


def card_rows(sections: dict[str, Any]) -> list[list[str]]:
    return [
        [name, f"{result['parameters'] / 1e9:.2f}e9", str(result["layers"]), *peaks(result), note(name, result)]
        for name, result in sections.items()
        if name.startswith("24 GB")
    ]


def head_rows(sections: dict[str, Any]) -> list[list[str]]:
    head, rows = sections.get("head", {}), []
    for loss in ("target", "target and KL"):
        for method, result in head.get(loss, {}).items():
            if "error" in result:
                rows.append([loss, method, result["error"][:70], "", "", "", "", ""])
                continue
            chunks = result["extra_bytes"] / head["chunk_bytes"] if result["extra_bytes"] is not None else None
            errors = [f"{result['errors'][key]['largest']:.1e}" for key in ("loss", "grad_hidden", "grad_weight")]
            rows.append(
                [loss, method, number(1000 * result["seconds"]), number(result.get("ratio")), number(chunks), *errors]
            )
    if "left_out" in head:
        rows.append(["", head["left_out"], "", "", "", "", "", ""])
    return rows


def speed_rows(sections: dict[str, Any]) -> list[list[str]]:
    score = sections.get("score", {})
    names = {"generation": "score: generated tokens", "teacher": "cache-teacher: tokens of the retain set"}
    return [
        [text, str(score[key]["tokens"]), number(score[key]["seconds"]), number(score[key]["tokens_per_second"], 0),
         gib(score[key]["peak"])]
        for key, text in names.items() if key in score
    ]  # fmt: skip


def test_rows(sections: dict[str, Any]) -> list[list[str]]:
    tests = sections.get("tests")
    if tests is None:
        return []
    rows = []
    for outcome in ("PASSED", "FAILED", "ERROR", "SKIPPED"):
        names = [name for name, ended in tests["outcomes"].items() if ended == outcome]
        if names:
            rows.append([outcome.lower(), str(len(names)), "" if outcome == "PASSED" else ", ".join(names)])
    if not tests["finished"]:
        rows.append(["not finished", "", "the time limit ended the tests; see tests.log"])
    return rows


def gib(count: float | None) -> str:
    return "" if count is None else f"{count / GIB:.2f}"


def number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def plain(table: Table) -> str:
    """A table in aligned columns."""
    name, heads, rows = table
    rows = [heads, *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([name, "-" * len(lines[0]), *lines])


def markdown(table: Table) -> str:
    name, heads, rows = table
    cells = [[cell.replace("|", "\\|") for cell in row] for row in [heads, ["---"] * len(heads), *rows]]
    return "\n".join([f"## {name}", "", *("| " + " | ".join(row) + " |" for row in cells)])
