"""The picture of `clover-vllm compare`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from clover_vllm.bench.plots import SOURCE, digest

Row = dict[str, Any]


def plot_compare(file: Path, picture: Path) -> None:
    """Tokens per step by task family, one panel for each tree; a digest of the file is kept in the picture."""
    results: list[Row] = json.loads(file.read_text())["results"]
    growths = list(dict.fromkeys(row["growth"] for row in results))
    families = list(dict.fromkeys(row["family"] for row in results))
    methods = list(dict.fromkeys(row["title"] for row in results))
    figure, panels = plt.subplots(
        len(growths), 1, figsize=(10, 2.6 * len(growths)), squeeze=False, sharex=True
    )
    width = 0.8 / len(methods)
    for axis, growth in zip(panels[:, 0], growths, strict=True):
        for index, title in enumerate(methods):
            own = [row for row in results if (row["growth"], row["title"]) == (growth, title)]
            values = [row["tokens_per_step"] for row in own]
            bounds = [row["tokens_per_step_interval"] for row in own]
            spread = [
                [max(v - low, 0.0) for v, (low, _) in zip(values, bounds, strict=True)],
                [max(high - v, 0.0) for v, (_, high) in zip(values, bounds, strict=True)],
            ]
            places = [families.index(row["family"]) + index * width for row in own]
            axis.bar(places, values, width, yerr=spread, capsize=2, label=title)
        axis.set(ylabel="tokens per step", title=growth, ylim=(1, None))
        axis.grid(alpha=0.3, axis="y")
    middle = 0.4 - width / 2
    panels[-1, 0].set_xticks([i + middle for i in range(len(families))], families, rotation=20, ha="right")
    panels[0, 0].legend(fontsize=8, ncols=len(methods))
    figure.tight_layout()
    figure.savefig(picture, dpi=110, metadata={SOURCE: digest(file)})
    plt.close(figure)
