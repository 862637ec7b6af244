"""Plain vLLM and Clover on its V2 model runner, one after the other in one process, in Triton's interpreter.

Plain vLLM attends with its native CPU kernel, which is quicker and a second opinion; Clover with Triton.

Keys of what `main` takes:

    llm: arguments of vllm.LLM for both.
    speculative: Clover's speculative configuration.
    jobs: by name, {"requests": see `clover_vllm.check.scripted.drive`, "scripted": share of the drafts (0) that hide
        the plain answers in random trees, "count_reads": whether to count what is read on the host, "planted": whether our
        code shall read the device where a grammar is followed, "graphs":
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Json = dict[str, Any]


def main(spec: Json) -> Json:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from clover_vllm.launch.interpreter import interpret

    interpret()
    import recorded_graphs
    from vllm import LLM

    from clover_vllm.check.exactness import Seen  # imported before reads are counted: see `note`
    from clover_vllm.check.scripted import ScriptedSlots, drive
    from clover_vllm.launch.in_process import runner_of

    given = {"disable_log_stats": True, "kv_cache_memory_bytes": 1 << 24, **spec["llm"]}
    plain = LLM(**given)
    results: Json = {"plain": {}}
    for name, job in spec["jobs"].items():
        with counting(job.get("count_reads", False)) as reads:
            results["plain"][name] = drive(plain, job["requests"])
        results["plain"][name]["stats"]["vllm reads"] = dict(reads.vllm)
    results["plain runner"] = type(runner_of(plain)).__module__
    del plain
    clover = LLM(**given, speculative_config=spec["speculative"])
    runner = runner_of(clover)
    seen = Seen(runner)
    tally = Tally(runner)
    script = ScriptedSlots(runner, seed=1, share=0.0)
    scheduler = clover.llm_engine.engine_core.engine_core.scheduler
    sizes = getattr(scheduler, "sizes", None)  # of adaptive trees
    chooses, rng = getattr(sizes, "choose", None), random.Random(5)
    results["clover"] = {}
    for name, job in spec["jobs"].items():
        if "graphs" in job:
            assert clover.reset_prefix_cache()
            recorded_graphs.install()
            recorded_graphs.capture(runner, job["graphs"])
        script.share = job.get("scripted", 0.0)
        script._rng.seed(1)
        if sizes is not None:
            rng.seed(5)
            sizes.choose = chooses if job.get("chooses") else lambda _: rng.choice(sizes.ladder)
        script.know(
            [[sequence["tokens"] for sequence in outputs] for outputs in results["plain"][name]["outputs"]]
        )
        with counting(job.get("count_reads", False)) as reads, planted(runner, job.get("planted", False)):
            result = drive(clover, job["requests"])
        while clover.llm_engine.engine_core.engine_core.batch_queue:  # a step ahead of the last answer
            clover.llm_engine.step()
        result["stats"] |= seen.take()
        result["stats"]["reads"], result["stats"]["vllm reads"] = dict(reads.ours), dict(reads.vllm)
        result["stats"]["replays"] = recorded_graphs.replays(runner)
        result["stats"]["counted"], result["stats"]["tally"] = (
            runner.counters.trees.tolist(),
            list(tally.counts),
        )
        results["clover"][name] = result
    results["scheduler"] = [kind.__name__ for kind in type(scheduler).__mro__]
    results["learnt"] = sorted({size for size, _ in sizes._costs}) if sizes is not None else []
    results["cache"] = [
        [type(group.kv_cache_spec).__name__, getattr(group.kv_cache_spec, "sliding_window", None)]
        for group in runner.kv_cache_config.kv_cache_groups
    ]
    results["clover runner"] = [kind.__name__ for kind in type(runner).__mro__]
    return results


class Tally:
    """Counts the trees of a V2 runner as `Counters.trees` does, in plain loops over what is on the device."""

    def __init__(self, runner: Any) -> None:
        nodes = runner.num_speculative_steps
        self.counts = [0.0] * (7 + 3 * nodes)
        self._nodes, self._runner, self._sample = nodes, runner, runner.sample
        runner.sample = self.sample

    def sample(self, hidden: Any, batch: Any, grammar: Any) -> Any:
        """In the place of the runner's."""
        made = self._sample(hidden, batch, grammar)
        if batch.num_draft_tokens == 0:
            return made
        kept, paths = self._runner.trees.kept, self._runner.speculator.scored.path.tolist()
        temperatures = self._runner.sampler.sampling_states.temperature.np
        for r, slot in enumerate(batch.idx_mapping_np):
            given = int(batch.num_draft_tokens_per_req[r])
            own = [i for i, token in enumerate(kept.tokens[slot, :given].tolist()) if token >= 0]
            if not own:
                continue
            path = paths[r][: max(0, int(made[1][r]) - 1)]
            promised = sum(kept.probabilities[slot, own].tolist())
            first, greedy = path[:1] == [1], temperatures[slot] == 0
            totals = (len(own), 1, promised, first, greedy, first and greedy)
            for i, value in enumerate(totals):
                self.counts[i] += float(value)
            self.counts[6 + len(own)] += 1
            depths = kept.depths[slot].tolist()
            for depth in range(max(depths[1 + i] for i in own)):
                self.counts[7 + self._nodes + depth] += 1
            for depth in range(len(path)):
                self.counts[7 + 2 * self._nodes + depth] += 1
        return made


READS = {
    f"aten.{name}"
    for name in (
        "item",
        "is_nonzero",
        "_local_scalar_dense",
        "nonzero",
        "argwhere",
        "masked_select",
        "equal",
        "_unique",
        "_unique2",
        "unique_dim",
        "unique_consecutive",
        "bincount",
    )
}
"""Operators whose result the host waits for."""


@dataclass
class Reads:
    """What was read of tensors on the host, other than in Triton's interpreter.

    Attributes:
        ours: by file of Clover whose code is innermost.
        vllm: by file and function of vLLM, and what read.
    """

    ours: Counter[str] = field(default_factory=Counter)
    vllm: Counter[str] = field(default_factory=Counter)


@contextmanager
def counting(wanted: bool) -> Iterator[Reads]:
    """Count what is read on the host."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    found = Reads()
    if not wanted:
        yield found
        return

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            name = op.overloadpacket.__name__
            indexed = name in ("index", "index_put", "index_put_")
            by_mask = indexed and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
            unsized = name == "repeat_interleave" and kwargs.get("output_size") is None
            if by_mask or unsized or str(op.overloadpacket) in READS:
                note(found, name)
            return op(*args, **kwargs)

    originals = {
        name: getattr(torch.Tensor, name) for name in ("tolist", "numpy", "item", "cpu", "__array__", "to")
    }

    def wrapped(name: str) -> Any:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            if name != "to" or (is_host((*args, *kwargs.values())) and not kwargs.get("non_blocking")):
                note(found, name)
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


def is_host(given: tuple[Any, ...]) -> bool:
    """Whether arguments of `Tensor.to` name the host; a tensor or device of this process's GPU, the CPU, does not."""
    return any(isinstance(one, str) and one == "cpu" for one in given)


RECORDING = ("note", "call", "__torch_dispatch__")
"""Functions of this file that see a read; what its others and `Seen` read is theirs, and is not counted."""


def note(found: Reads, what: str) -> None:
    """Count a read by the innermost code that is not PyTorch's."""
    watching = (__file__, sys.modules["clover_vllm.check.exactness"].__file__)
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        file = code.co_filename
        if "/torch/" not in file and not (file == __file__ and code.co_name in RECORDING):
            if file not in watching and "/clover_vllm/" in file:
                found.ours[Path(file).name] += 1
            elif file not in watching and "/vllm/" in file:
                found.vllm[f"{Path(file).name} {code.co_name}: {what}"] += 1
            return
        frame = frame.f_back  # type: ignore[assignment]


@contextmanager
def planted(runner: Any, wanted: bool) -> Iterator[None]:
    """A read of the device in the path of grammars, as if it were written in the file of `SlotTrees`."""
    from clover_vllm.engine.v2 import trees

    if not wanted:
        yield
        return
    space = {"original": runner.trees.drop}
    text = "def drop(rows, batch):\n    rows.any().item()\n    original(rows, batch)"
    exec(compile(text, trees.__file__, "exec"), space)
    runner.trees.drop = space["drop"]
    try:
        yield
    finally:
        del runner.trees.drop
