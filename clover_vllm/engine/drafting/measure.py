"""What steps and drafting cost on this machine: a few timed runs at start-up, kept for the next start."""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

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

ROWS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256, 512)
"""Rows of the target that are timed, while time is left."""

HEAD_ROWS = (1, 2, 4, 8, 16, 32, 64)

SECONDS = 6.0
"""Most that start-up spends on it, but for the last run to be begun."""

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
    end = time.perf_counter() + SECONDS
    most = runner.max_num_tokens
    with set_current_vllm_config(runner.vllm_config):
        runner.drafter.idle = True  # vLLM's dummy run would run it too
        forward = _curve(ROWS, most, end, lambda rows: lambda: runner._dummy_run(rows, skip_eplb=True))
        runner.drafter.idle = False
        hidden = torch.zeros(
            min(most, 64), runner.model_config.get_hidden_size(), dtype=runner.dtype, device=runner.device
        )

        def sample(rows: int) -> Callable[[], object]:
            return lambda: runner.sampler.greedy_sample(runner.model.compute_logits(hidden[:rows]).float())

        logits = _curve(HEAD_ROWS, len(hidden), end, sample)
        augment, first, level = (
            _curve(
                HEAD_ROWS if part != "augment" else (*HEAD_ROWS, 256), most, end, runner.drafter.timed(part)
            )
            for part in ("augment", "first", "level")
        )
    cached = _reading(runner, forward.at(1))
    return Costs(forward, logits, augment, first, level, cached=cached, crossed=CROSSING * cached)


def _curve(
    rows: tuple[int, ...], most: int, end: float, prepare: Callable[[int], Callable[[], object]]
) -> Curve:
    """Time a part at some numbers of rows. All ranks run it as often as the first finds right."""
    measured: dict[float, float] = {}
    for count in rows:
        if count > most or (len(measured) > 1 and agree(time.perf_counter() > end)):
            break
        run = prepare(count)
        run()
        times = []
        for _ in range(5):
            begun = time.perf_counter()
            run()
            times.append(time.perf_counter() - begun)
            if agree(sum(times) > 0.2):
                break
        measured[count] = 1e3 * min(times)
    return Curve(measured)


def _reading(runner: CloverRunner, forward: float) -> float:
    """Milliseconds to read a cached token, from its bytes and the speed at which a row's forward reads the weights."""
    weights = sum(p.numel() * p.element_size() for p in runner.model.parameters())
    slots = runner.kv_cache_config.num_blocks * runner.input_batch.block_table[0].block_size
    token = sum(cache.numel() * cache.element_size() for cache in runner.kv_caches) / max(1, slots)
    return forward * token / max(1, weights)
