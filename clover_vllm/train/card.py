"""The model card of a trained head: what it was made of, and with what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clover_vllm.heads.registry import head_kind


def write_card(folder: Path, summary: dict[str, Any]) -> None:
    """Write `README.md` into a head folder from a training summary."""
    kind = head_kind(summary["method"]).title
    made = summary["provenance"]
    sources = sorted(summary["sources"].items(), key=lambda item: -item[1])
    settings = summary["settings"]
    lines = [
        f"# {kind} draft head for {Path(settings['target']).name}",
        "",
        f"Trained on {summary['answer_tokens']:,} answer tokens of the target itself "
        f"({summary['answers']:,} answers), {summary['answer_token_visits']:,} token visits in "
        f"{summary['steps']:,} steps. It is of use with this target only.",
        "",
        "```",
        made["command"],
        "```",
        "",
        "| made with | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in made.items() if name != "command"),
        f"| peak memory | {summary['peak_memory_gib']} GiB host, {summary['peak_gpu_memory_gib']} GiB GPU |",
        "",
        "| setting | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in settings.items() if value is not None),
        "",
        "| source of prompts | answers |",
        "|---|---|",
        *(f"| {name} | {count} |" for name, count in sources),
        "",
        "![loss and accuracy per depth](training.png)",
        "",
    ]
    (folder / "README.md").write_text("\n".join(lines))
