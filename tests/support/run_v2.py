"""Plain vLLM and Clover on its V2 model runner, one after the other in one process, in Triton's interpreter.

Plain vLLM attends with its native CPU kernel, which is quicker and a second opinion; Clover with Triton.

Keys of what `main` takes:

    llm: arguments of vllm.LLM for both.
    speculative: Clover's speculative configuration.
    jobs: by name, {"requests": see `clover_vllm.check.scripted.drive`, "scripted": share of the drafts (0) that hide
        the plain answers in random trees, "count_reads": whether to count what our code reads on the host, "graphs":
        sizes of CUDA graphs, in tokens, that Clover captures before this job, "chooses": whether the sizes of trees are
        chosen as they are for users; else at random}.

It returns by engine, "plain" and "clover", what `drive` returns by job, with more statistics of the latter.
"""

from __future__ import annotations

import os
import random
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Json = dict[str, Any]


def main(spec: Json) -> Json:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from clover_vllm.launch.interpreter import interpret

    interpret()
    import recorded_graphs
    from vllm import LLM

    from clover_vllm.check.exactness import Seen
    from clover_vllm.check.scripted import ScriptedSlots, drive
    from clover_vllm.launch.in_process import runner_of

    given = {"disable_log_stats": True, "kv_cache_memory_bytes": 1 << 24, **spec["llm"]}
    plain = LLM(**given)
    results: Json = {"plain": {name: drive(plain, job["requests"]) for name, job in spec["jobs"].items()}}
    results["plain runner"] = type(runner_of(plain)).__module__
    del plain
    clover = LLM(**given, speculative_config=spec["speculative"])
    runner = runner_of(clover)
    seen = Seen(runner)
    script = ScriptedSlots(runner, seed=1, share=0.0)
    scheduler = clover.llm_engine.engine_core.engine_core.scheduler
    sizes = scheduler.sizes
    chooses, rng = sizes.choose, random.Random(5)
    results["clover"] = {}
    for name, job in spec["jobs"].items():
        if "graphs" in job:
            assert clover.reset_prefix_cache()
            recorded_graphs.install()
            recorded_graphs.capture(runner, job["graphs"])
        script.share = job.get("scripted", 0.0)
        sizes.choose = chooses if job.get("chooses") else lambda _: rng.choice(sizes.ladder)
        script.know(
            [[sequence["tokens"] for sequence in outputs] for outputs in results["plain"][name]["outputs"]]
        )
        with counting(job.get("count_reads", False)) as reads:
            result = drive(clover, job["requests"])
        result["stats"] |= seen.take()
        result["stats"]["reads"] = dict(reads)
        result["stats"]["replays"] = recorded_graphs.replays(runner)
        results["clover"][name] = result
    results["scheduler"] = [kind.__name__ for kind in type(scheduler).__mro__]
    results["learnt"] = sorted({size for size, _ in sizes._costs})
    results["clover runner"] = [kind.__name__ for kind in type(runner).__mro__]
    return results


READS = {
    f"aten.{name}"
    for name in ("item", "is_nonzero", "_local_scalar_dense", "nonzero", "argwhere", "masked_select", "equal")
}
"""Operators whose result the host waits for."""


@contextmanager
def counting(wanted: bool) -> Iterator[Counter[str]]:
    """Count, by file of Clover, what it reads of tensors on the host, other than in Triton's interpreter."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    found: Counter[str] = Counter()
    if not wanted:
        yield found
        return

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            indexed = op.overloadpacket.__name__ in ("index", "index_put", "index_put_")
            by_mask = indexed and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
            if by_mask or str(op.overloadpacket) in READS:
                note(found)
            return op(*args, **(kwargs or {}))

    originals = {
        name: getattr(torch.Tensor, name) for name in ("tolist", "numpy", "item", "cpu", "__array__")
    }

    def wrapped(name: str) -> Any:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            note(found)
            return originals[name](self, *args, **kwargs)

        return call

    for name in originals:
        setattr(torch.Tensor, name, wrapped(name))
    try:
        with Mode():
            yield found
    finally:
        for name, original in originals.items():
            setattr(torch.Tensor, name, original)


def note(found: Counter[str]) -> None:
    """Count a read if the innermost code that is not PyTorch's, this file's or that of `Seen` is Clover's."""
    watching = (__file__, sys.modules["clover_vllm.check.exactness"].__file__)
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if "/torch/" not in file and file not in watching:
            if "/clover_vllm/" in file:
                found[Path(file).name] += 1
            return
        frame = frame.f_back  # type: ignore[assignment]
