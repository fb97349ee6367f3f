"""The table and the plot of bench/cache.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

CHANGES = {"little": 0.03, "lot": 0.3}  # standard deviation of the noise, relative to that of each weight tensor


def table(title: str, lines: list[dict[str, Any]]) -> Table:
    columns = ("top-k", "mass", "tail", "bytes/token", "captured")
    errors = ("KL error", "grad cosine", "grad error")
    rows = Table(title=title, title_justify="left")
    for column in (*columns, *(f"{error}, {name}" for name in CHANGES for error in errors)):
        rows.add_column(column, justify="right")
    for line in lines:
        cells = [
            str(line["top_k"]),
            f"{line['mass']:g}",
            line["tail"],
            f"{line['bytes']:.1f}",
            f"{line['captured']:.4f}",
        ]
        for name in CHANGES:
            result = line[name]
            cells += [f"{result['kl_error']:+.1%}", f"{result['cosine']:.5f}", f"{result['gradient_error']:.4f}"]
        rows.add_row(*cells)
    return rows


def plot(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(14, 4.2), sharey=True)
    styles = {"bucket": "o", "renormalised": "s", "dropped": "x", "sampled": "^"}
    for axis, (teacher, lines) in zip(axes, results.items(), strict=True):
        for style, marker in styles.items():
            for name, colour in (("little", "tab:blue"), ("lot", "tab:orange")):
                points = sorted((li["bytes"], 1 - li[name]["cosine"]) for li in lines if li["tail"].endswith(style))
                if points:
                    x, y = zip(*points, strict=True)
                    label = f"{style}, changed a {name}"
                    axis.plot(x, np.maximum(y, 1e-9), marker, color=colour, markersize=5, label=label, alpha=0.75)
        axis.axhline(1e-3, color="grey", linewidth=0.8, linestyle="--")
        axis.set(xscale="log", yscale="log", xlabel="bytes per token", title=f"{teacher} teacher")
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("1 - cosine to the dense gradient")
    axes[2].legend(fontsize=7, loc="lower left")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
