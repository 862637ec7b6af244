"""The dashboard of `serving/grafana/clover.json` for engines under Ray, whose metrics have other names.

`python -m clover_vllm.cluster.dashboard` in the repository's root writes `serving/grafana/clover-ray.json`.
"""

from __future__ import annotations

import re
from pathlib import Path

FOLDER = Path("serving/grafana")
NAME = re.compile(r"\b(vllm|clover):(\w+)")
HISTOGRAMS = ("clover:tree_nodes",)
"""Of ours; under Ray their buckets, sums and counts are counters (`engine.ray_metrics`)."""


def ray_name(name: str) -> str:
    """What Ray makes of a metric's name: a prefix, no colons, and `_total` behind whatever is pushed as a counter."""
    made = "ray_" + name.replace(":", "_")
    parts = ("_bucket", "_sum", "_count")
    return f"{made}_total" if name.startswith(HISTOGRAMS) and name.endswith(parts) else made


def for_ray(dashboard: str) -> str:
    """The dashboard with Ray's names."""
    made = NAME.sub(lambda found: ray_name(found[0]), dashboard)
    made = made.replace('"title": "vLLM with Clover-2"', '"title": "vLLM with Clover-2 on Ray"')
    return made.replace('"uid": "clover-vllm"', '"uid": "clover-vllm-ray"')


if __name__ == "__main__":
    (FOLDER / "clover-ray.json").write_text(for_ray((FOLDER / "clover.json").read_text()))
