"""What steps and drafting cost on this machine: a few timed runs at start-up, kept for the next start."""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm import envs
from vllm.config import set_current_vllm_config
from vllm.logger import init_logger

from clover_vllm.base.files import write_json
from clover_vllm.engine.drafting.ranks import agree, leads
from clover_vllm.tree.costs import Costs, Curve

if TYPE_CHECKING:
    from clover_vllm.engine.runner import CloverRunner

logger = init_logger("vllm.clover")

FORMAT = 3
"""Of what is kept; costs that were measured in another way are measured anew."""

ROWS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256, 512)
"""Rows of the target that are timed, while time is left."""

LOGIT_ROWS, HEAD_ROWS = (1, 2, 4, 8, 16, 32, 64), (1, 4, 16, 64)

SECONDS = 8.0
"""That start-up spends on it; more only where a few rounds over the smallest sizes take longer."""

SHARES = {"forward": 0.5, "logits": 0.05, "augment": 0.125, "first": 0.125, "level": 0.125, "reading": 0.075}
"""Of that time."""

ROUNDS, LEAST_ROUNDS = 12, 3
"""Times that all sizes of a part are timed, one after the other; the fastest counts. And however long they take."""

CONTEXTS, CONTEXT = 8, 1024
"""Requests of the step by which reading is timed, and cached tokens of each."""

LEAST_READING = 0.02
"""Share of that step that reading is taken to cost at least, since served steps teach no cost that begins at nothing."""

CROSSING = 0.25
"""Cost of a node's reading a cached token, at the start, over that of a request's reading it: rows of a request share
the trip to memory."""


def costs_of(runner: CloverRunner) -> Costs:
    """Those kept from an earlier start with the same settings on such a machine, or measured now."""
    place = _place(runner)
    if (kept := agree(_kept(place))) is not None:
        return kept
    started = time.perf_counter()
    costs = _measure(runner)
    if not leads():
        return costs
    logger.info("Clover-2 timed steps and drafting in %.1f s.", time.perf_counter() - started)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        write_json(place, costs.to_json())
    except OSError as error:
        logger.warning("Clover-2 cannot keep what it measured: %s.", error)
    return costs


def _kept(place: Path) -> Costs | None:
    """What an earlier start has kept, if it can be read."""
    try:
        return Costs.from_json(json.loads(place.read_text()))
    except (OSError, KeyError, TypeError, ValueError, AttributeError):
        return None


def _place(runner: CloverRunner) -> Path:
    """Where costs are kept: a file per model, device, dtype and settings."""
    known = (
        FORMAT,
        runner.vllm_config.compute_hash(),
        runner.speculative_config.draft_model_config.compute_hash(),
        platform.machine(),
        _processor(),
        torch.get_num_threads(),
    )
    name = hashlib.sha256(repr(known).encode()).hexdigest()[:16]
    return Path(envs.VLLM_CACHE_ROOT) / "clover" / f"costs-{name}.json"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith("model name")), platform.processor())


@torch.inference_mode()
def _measure(runner: CloverRunner) -> Costs:
    most = runner.max_num_tokens
    with set_current_vllm_config(runner.vllm_config):
        hidden = torch.zeros(
            min(most, 64), runner.model_config.get_hidden_size(), dtype=runner.dtype, device=runner.device
        )

        def sample(rows: int) -> Callable[[], object]:
            return lambda: runner.sampler.greedy_sample(runner.model.compute_logits(hidden[:rows]).float())

        logits = Curve(_times("logits", LOGIT_ROWS, len(hidden), sample))
        augment, first, level = (
            Curve(_times(part, rows, most, runner.drafter.timed(part), before=lambda: _target(runner, 1)))
            for part, rows in (("augment", (*HEAD_ROWS, 256)), ("first", HEAD_ROWS), ("level", HEAD_ROWS))
        )
        cached = _reading(runner)
        forward = Curve(_times("forward", ROWS, most, lambda rows: lambda: _target(runner, rows)))
    return Costs(forward, logits, augment, first, level, cached=cached, crossed=CROSSING * cached)


def _target(runner: CloverRunner, rows: int, **how: Any) -> None:
    """A forward of the target alone: vLLM's dummy run would run the head too."""
    runner.drafter.idle = True
    runner._dummy_run(rows, skip_eplb=True, **how)
    runner.drafter.idle = False


def _times(
    part: str,
    sizes: tuple[int, ...],
    most: int,
    prepare: Callable[[int], Callable[[], object]],
    before: Callable[[], object] | None = None,
) -> dict[float, float]:
    """Milliseconds of a part by its size. All ranks run it as often as the first finds right.

    Round by round over all sizes: where a machine is slow for a second, as rented ones are, all sizes are, and the
    fastest of some rounds has the form of none of these seconds.

    Args:
        part: of `SHARES`.
        sizes: to be timed, while time is left.
        most: rows of a step; greater sizes are left out.
        prepare: makes the run of a size.
        before: run before each, since in serving a part finds the processor's caches full of something else.
    """
    begun, share = time.perf_counter(), SHARES[part] * SECONDS
    runs: dict[int, Callable[[], object]] = {}
    fastest: dict[float, float] = {}
    for size in sizes:
        if size > most or (len(runs) > 1 and agree(time.perf_counter() > begun + share / 2)):
            break
        runs[size] = prepare(size)
        runs[size]()  # warms it up
        fastest[size] = _time(runs[size], before)
    for done in range(1, ROUNDS):
        if done >= LEAST_ROUNDS and agree(time.perf_counter() > begun + share):
            break
        for size, run in runs.items():
            fastest[size] = min(fastest[size], _time(run, before))
    return fastest


def _time(run: Callable[[], object], before: Callable[[], object] | None) -> float:
    """Milliseconds of a run, with something before it that is not timed."""
    if before is not None:
        before()
    begun = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - begun)


def _reading(runner: CloverRunner) -> float:
    """Milliseconds to read a cached token: of a decode step by the length of its contexts.

    Every request reads blocks of its own, as in serving: a block that all share would lie in the processor's cache.
    """
    table = runner.input_batch.block_table[0]
    blocks = runner.kv_cache_config.num_blocks
    requests = min(CONTEXTS, runner.max_num_reqs, runner.max_num_tokens, blocks - 1)
    context = min(CONTEXT, runner.max_model_len, (blocks - 1) // max(1, requests) * table.block_size)
    own = context // table.block_size
    if requests < 1 or own < 1:
        return 0.0
    table.block_table.np[:requests, :own] = 1 + np.arange(requests * own).reshape(requests, own)

    def decode(length: int) -> Callable[[], object]:
        return lambda: _target(runner, requests, force_attention=True, profile_seq_lens=length)

    lengths = 1, own * table.block_size
    try:
        short, long = _times("reading", lengths, lengths[1], decode).values()
    finally:
        table.block_table.np[:requests, :own] = 0
        table.commit_block_table(requests)
    return max(LEAST_READING * long, long - short) / (requests * own * table.block_size)
