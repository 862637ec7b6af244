"""Plots of training runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def plot_training(history: list[dict[str, Any]], path: Path) -> None:
    """Loss and accuracy per depth over steps, as PNG."""
    rows = [r for r in history if "accuracy" in r]
    if not rows:
        return
    steps = [r["step"] for r in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    left.plot(steps, [r["loss"] for r in rows], color="tab:blue", linewidth=1)
    validated = [r for r in history if "eval_loss" in r]
    if validated:
        left.plot(
            [r["step"] for r in validated], [r["eval_loss"] for r in validated], "o-", color="tab:orange"
        )
        left.legend(["training", "validation"], fontsize=8)
    left.set(xlabel="step", ylabel="loss", yscale="log", title="loss")
    for depth in range(len(rows[0]["accuracy"])):
        right.plot(steps, [r["accuracy"][depth] for r in rows], linewidth=1, label=f"depth {depth + 1}")
    right.set(xlabel="step", ylabel="accuracy", ylim=(0, 1), title="top token equals the target's")
    right.legend(loc="lower right", fontsize=8)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)
