"""Plots of benchmarks."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image

Rows = list[dict[str, Any]]

SOURCE = "Source"
"""Name of a PNG text."""


def plot_speedups(results: Path, path: Path) -> None:
    """Speed-up over load, with intervals.

    Args:
        results: of `bench`; a digest of it is kept in the picture (`source_of`).
        path: PNG to write.
    """
    rows: Rows = json.loads(results.read_text())["results"]
    figure, axis = plt.subplots(figsize=(8, 4.5), constrained_layout=True)
    draw_speedups(axis, rows)
    _finish(figure, axis, path, {SOURCE: digest(results)})


def draw_speedups(axis: Any, rows: Rows) -> None:
    """One line per method; the first is the baseline."""
    baseline = rows[0]["method"]
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        means = [row["speedup"] for row in own]
        style = {"color": "black", "linestyle": "--"} if method == baseline else {"marker": "o"}
        axis.errorbar(
            [row["concurrency"] for row in own],
            means,
            # A mean may lie a rounding error outside the interval of equal values.
            yerr=[
                [max(mean - row["speedup_interval"][0], 0.0) for mean, row in zip(means, own, strict=True)],
                [max(row["speedup_interval"][1] - mean, 0.0) for mean, row in zip(means, own, strict=True)],
            ],
            label=method,
            capsize=3,
            **style,
        )
    concurrencies = sorted({row["concurrency"] for row in rows})
    axis.set(xscale="log", xlabel="concurrent requests", ylabel=f"tokens per second over {baseline}")
    axis.set_xticks(concurrencies, [str(c) for c in concurrencies])
    axis.minorticks_off()


def digest(file: Path) -> str:
    """Of a file's content."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def source_of(picture: Path) -> str | None:
    """The digest of the results that a picture was drawn from."""
    with Image.open(picture) as image:
        return image.info.get(SOURCE)


def plot_lengths(rows: Rows, path: Path) -> None:
    """Tokens per verified draft, bonus token included, at the lowest concurrency."""
    lowest = min(row["concurrency"] for row in rows)
    own = [row for row in rows if row["concurrency"] == lowest]
    figure, axis = plt.subplots(figsize=(8, 4), constrained_layout=True)
    bars = axis.bar([row["method"] for row in own], [row["acceptance_length"] for row in own])
    axis.bar_label(bars, fmt="%.2f")
    axis.set(ylabel="tokens per verified draft", title=f"concurrency {lowest}")
    axis.grid(alpha=0.3, axis="y")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_split(rows: Rows, baseline: str, path: Path) -> None:
    """Milliseconds per step by part, beside a step of the first method."""
    figure, axis = plt.subplots(figsize=(9, 4.5), constrained_layout=True)
    timed = [row for row in rows if row["ms_by_part"] or row["method"] == baseline]
    labels = [f"{row['method']}\n{row['concurrency']}" for row in timed]
    bottom = [0.0] * len(timed)
    parts = next((list(row["ms_by_part"]) for row in timed if row["ms_by_part"]), [])
    whole = [0.0 if row["ms_by_part"] else row["ms_per_decode_step"] for row in timed]
    axis.bar(labels, whole, label=f"{baseline} step", color="lightgrey")
    for part in parts:
        heights = [row["ms_by_part"].get(part, 0.0) for row in timed]
        axis.bar(labels, heights, bottom=bottom, label=part)
        bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
    axis.set(xlabel="method and concurrency", ylabel="ms per decode step")
    axis.tick_params(axis="x", labelsize=7)
    _finish(figure, axis, path)


def plot_climb(results: Path, path: Path) -> None:
    """Throughput beside plain, nodes per step and sleep over time.

    Args:
        results: of `climb`.
        path: PNG to write.
    """
    found = json.loads(results.read_text())
    figure, (speed, size) = plt.subplots(2, 1, figsize=(9, 6), sharex=True, constrained_layout=True)
    for name, seconds in found["by_second"].items():
        style = {"color": "black", "linestyle": "--"} if name == "plain" else {}
        speed.plot([s["tokens"] for s in seconds], label=name, **style)
    clover = found["by_second"]["clover"]
    size.plot([s["nodes_per_step"] for s in clover], label="nodes per step")
    size.fill_between(
        range(len(clover)), 0, 1, where=[s["asleep"] > 0.5 for s in clover], color="lightgrey",
        transform=size.get_xaxis_transform(), label="asleep",
    )  # fmt: skip
    for i, phase in enumerate(found["phases"]):
        speed.axvline(i * found["seconds_per_phase"], color="grey", linewidth=0.5)
        speed.annotate(
            str(phase["running"]),
            (i * found["seconds_per_phase"], 1.0),
            xycoords=("data", "axes fraction"),
            fontsize=8,
        )
    speed.set(ylabel="tokens per second")
    size.set(xlabel="seconds", ylabel="nodes per step")
    speed.legend(fontsize=8)
    _finish(figure, size, path, {SOURCE: digest(results)})


def plot_memory(
    plain: list[tuple[float, float]], engines: list[list[tuple[float, float]]], path: Path
) -> None:
    """Resident memory, (minutes, MiB), of a plain engine and of engines with Clover-2 that followed each other."""
    figure, axis = plt.subplots(figsize=(8, 4.5), constrained_layout=True)
    axis.plot(*zip(*plain, strict=True), color="black", linestyle="--", label="plain vLLM")
    for i, memory in enumerate(engines):
        label = "with Clover-2, an engine each" if i == 0 else None
        axis.plot(*zip(*memory, strict=True), color=f"C{i % 10}", marker=".", markersize=3, label=label)
    axis.set(xlabel="minutes", ylabel="resident memory less malloc's free pages, MiB", ylim=(0, None))
    _finish(figure, axis, path)


def _finish(figure: Any, axis: Any, path: Path, metadata: dict[str, str] | None = None) -> None:
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110, metadata=metadata)
    plt.close(figure)
