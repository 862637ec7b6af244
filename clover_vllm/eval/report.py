"""Tables, JSON and plots of `clover-vllm eval`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from clover_vllm.base.errors import UserError
from clover_vllm.base.files import make_folder, whole_file, write_json
from clover_vllm.base.provenance import provenance
from clover_vllm.eval.evaluate import Replay
from clover_vllm.heads.registry import kind_of_config
from clover_vllm.heads.weights import read_config


@dataclass
class Evaluation:
    """Replays of all answers with one head and one growth."""

    head: str
    growth: str  # its name
    replays: list[Replay]

    @property
    def tokens_per_step(self) -> float:
        """All tokens over all steps."""
        return sum(r.tokens for r in self.replays) / sum(r.steps for r in self.replays)

    @property
    def spread(self) -> float:
        """Standard deviation over answers of their own tokens per step."""
        return statistics.pstdev(r.tokens_per_step for r in self.replays)

    @property
    def standard_error(self) -> float:
        """Of the mean over answers."""
        return self.spread / len(self.replays) ** 0.5

    def acceptance_by_depth(self) -> list[float]:
        """Share of all steps that accepted a node at depth 1, 2, ..., as vLLM counts per position.

        Falls with depth; the sum is tokens per step less the bonus token, but for tokens that an
        answer's end cuts off.
        """
        depth = max(len(r.accepted) for r in self.replays)
        steps = sum(r.steps for r in self.replays)
        return [sum(r.accepted[d] for r in self.replays if len(r.accepted) > d) / steps for d in range(depth)]

    def by_category(self) -> dict[str, float]:
        """Tokens per step of each prompt category, most answers first."""
        groups: dict[str, list[Replay]] = {}
        for replay in self.replays:
            groups.setdefault(replay.category, []).append(replay)
        ordered = sorted(groups.items(), key=lambda item: -len(item[1]))
        return {name: sum(r.tokens for r in group) / sum(r.steps for r in group) for name, group in ordered}

    def as_json(self) -> dict[str, Any]:
        return {
            "head": self.head,
            "growth": self.growth,
            "answers": len(self.replays),
            "steps": sum(r.steps for r in self.replays),
            "tokens_per_step": round(self.tokens_per_step, 4),
            "spread_over_answers": round(self.spread, 4),
            "standard_error": round(self.standard_error, 4),
            "acceptance_by_depth": [round(x, 4) for x in self.acceptance_by_depth()],
            "by_category": {k: round(v, 4) for k, v in self.by_category().items()},
        }


def evaluations(measured: dict[str, dict[str, list[Replay]]]) -> list[Evaluation]:
    """Results of `evaluate.evaluate`, named by the shortest unambiguous part of the head's path."""
    names = [Path(name).name for name in measured]
    if len(set(names)) < len(names):
        names = list(measured)
    return [
        Evaluation(name, growth, replays)
        for name, growths in zip(names, measured.values(), strict=True)
        for growth, replays in growths.items()
    ]


def record_acceptance(measured: dict[str, dict[str, list[Replay]]]) -> None:
    """Write the share of steps that accept the likeliest draft token into the heads' config.json.

    Servers compare themselves with it (`head.config.Clover2Config`, `first_acceptance`).

    Args:
        measured: by `evaluate.evaluate`, by head folder, with the default growths.

    Raises:
        UserError: a config cannot be written.
    """
    for head, growths in measured.items():
        config = read_config(Path(head))
        if not kind_of_config(config, head).records_acceptance:
            continue
        chain = Evaluation(head, "chain", next(iter(growths.values())))
        share = next(iter(chain.acceptance_by_depth()), 0.0)
        path = Path(head) / "config.json"
        try:
            with whole_file(path) as fresh:
                fresh.write_text(json.dumps(config | {"first_acceptance": round(share, 4)}, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror}).") from error


def write_report(results: Sequence[Evaluation], output: Path) -> None:
    """Results and where they come from as JSON, with a plot beside it.

    Args:
        results: what was measured.
        output: the JSON file (`*.json`), or a folder for `eval.json`.
    """
    file = output if output.suffix == ".json" else output / "eval.json"
    make_folder(file.parent)
    write_json(file, {"provenance": provenance(), "results": [r.as_json() for r in results]})
    plot(results, file.with_suffix(".png"))


def table(results: Sequence[Evaluation]) -> Table:
    """Tokens per step and acceptance per depth."""
    out = Table(title="Tokens per step, bonus token included (greedy)", title_justify="left")
    out.add_column("head", overflow="fold")
    out.add_column("tree", no_wrap=True)
    out.add_column("tokens/step", justify="right")
    out.add_column("+- std. error", justify="right")
    out.add_column("std. dev.", justify="right")
    out.add_column("steps that accept at depth 1, 2, ...", overflow="fold")
    for result in results:
        out.add_row(
            result.head,
            result.growth,
            f"{result.tokens_per_step:.2f}",
            f"{result.standard_error:.2f}",
            f"{result.spread:.2f}",
            " ".join(f"{x:.0%}" for x in result.acceptance_by_depth()),
        )
    return out


def category_table(results: Sequence[Evaluation], most: int = 12) -> Table:
    """Tokens per step by prompt category, of the two trees that are quoted most where present."""
    quoted = [r for r in results if r.growth in ("tree of 8", "tree of 25")]
    results = quoted or results
    out = Table(title="By category (those with the most answers)", title_justify="left")
    out.add_column("category")
    for result in results:
        out.add_column(f"{result.head}\n{result.growth}", justify="right")
    split = [result.by_category() for result in results]
    for name in list(split[0])[:most]:
        out.add_row(name, *(f"{values[name]:.2f}" for values in split))
    return out


def plot(results: Sequence[Evaluation], path: Path) -> None:
    """Tokens per step by tree, and acceptance by depth, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    heads = list(dict.fromkeys(r.head for r in results))
    growths = list(dict.fromkeys(r.growth for r in results))
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4), constrained_layout=True)
    width = 0.8 / len(heads)
    for index, head in enumerate(heads):
        own = {r.growth: r for r in results if r.head == head}
        places = [i + index * width for i, g in enumerate(growths) if g in own]
        bars = left.bar(
            places,
            [own[g].tokens_per_step for g in growths if g in own],
            width,
            yerr=[own[g].standard_error for g in growths if g in own],
            label=head,
        )
        left.bar_label(bars, fmt="%.2f", fontsize=7)
        for growth, result in own.items():
            values = result.acceptance_by_depth()
            right.plot(range(1, len(values) + 1), values, marker="o", label=f"{head}, {growth}")
    left.set_xticks([i + 0.4 - width / 2 for i in range(len(growths))], growths, fontsize=8)
    left.set(ylabel="tokens per step", title="tokens per step, bonus included")
    left.legend(fontsize=8)
    right.set(xlabel="depth", ylabel="accepted", ylim=(0, 1), title="acceptance by depth")
    right.legend(fontsize=6)
    right.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)
