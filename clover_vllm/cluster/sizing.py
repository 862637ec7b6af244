"""`clover-vllm replicas`: how many a load needs, a queueing estimate from the speeds that `clover-vllm bench` measures.

A replica shares its speed among the requests that it holds (processor sharing), and is faster the more they are, up to
`most` requests; further ones wait. With arrivals at random moments (Poisson) the number of requests in it is a
birth-death process: up at the arrival rate, down at the rate at which n requests together finish answers. Its stationary
distribution is a product (Kleinrock, Queueing Systems I, section 3.1), and depends on answer lengths through their mean
only as long as nobody waits.

It breaks where arrivals come in bursts (a batch job, a cache that expires), where prompts and lengths differ from those
that were measured, and where replicas share cores. Requests are split at random here; Ray Serve, which asks two replicas
and takes the emptier one, does a little better.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from clover_vllm.base.errors import UserError
from clover_vllm.bench.report import clovers_method, curve
from clover_vllm.cluster.settings import ReplicasSettings

FULLEST = 0.98
"""Load, over what a replica can do, beyond which the estimate is as good as infinite."""

PAYS = 1.05
"""Speed over plain vLLM's from which on speculation pays."""


@dataclass(frozen=True)
class Estimate:
    """What to expect of a replica.

    Attributes:
        requests: in it, on average.
        seconds: from a request's arrival to the end of its answer, on average.
        waiting: share of requests that find no free place.
        load: arrivals over the most that it can do; at 1 the queue has no end.
    """

    requests: float
    seconds: float
    waiting: float
    load: float


def replicas(settings: ReplicasSettings) -> dict[str, Any]:
    """What to deploy, by a file of measurements.

    Raises:
        UserError: the file is something else, or no number of replicas is enough.
    """
    try:
        return plan(json.loads(settings.measured.read_text()), settings)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{settings.measured} is no result of `clover-vllm bench` ({type(error).__name__}); write it again."
        ) from error


def plan(found: dict[str, Any], settings: ReplicasSettings) -> dict[str, Any]:
    """The same for a measurement that has been read.

    Raises:
        UserError: Clover-2 was not measured, or no number of replicas is enough.
    """
    method = clovers_method(found)
    if method is None:
        raise UserError("Clover-2 is not in the measurement; give clover to `clover-vllm bench --methods`.")
    clover, plain = curve(found, method), curve(found, found["baseline"])
    count = replicas_for(clover, settings.tokens, settings.rate, settings.most, settings.seconds)
    one = estimate(clover, settings.tokens, settings.rate / count, settings.most)
    pays = pays_up_to(clover, plain)
    return {
        "load": f"{settings.rate:g} requests per second, {settings.tokens:g} tokens each",
        "one_replica": f"at most {settings.most} requests at once",
        "tokens_per_second": _shown(clover),
        "of_plain_vLLM": _shown(plain),
        "replicas": count,
        "seconds_per_answer": f"{one.seconds:.1f} of at most {settings.seconds:g}, on average",
        "requests_in_a_replica": f"{one.requests:.1f}, on average",
        "of_what_it_can_do": f"{one.load:.0%}",
        "speculation_pays": f"up to {pays} requests at once" if pays else "at no measured load",
    }


def _shown(speeds: Mapping[int, float]) -> str:
    return ", ".join(f"{speed:.0f} with {count}" for count, speed in sorted(speeds.items()))


def estimate(speeds: Mapping[int, float], tokens: float, rate: float, most: int) -> Estimate:
    """One replica.

    Args:
        speeds: tokens per second of all requests together, by requests at once; straight between those measured, and
            constant beyond them.
        tokens: of an answer, on average.
        rate: requests per second that reach it.
        most: requests at once (`max_num_seqs`).
    """
    counts = np.arange(1, most + 1)
    known = sorted(speeds)
    done = np.interp(counts, [0, *known], [0.0, *(speeds[n] for n in known)]) / tokens  # answers per second
    load = rate / float(done[-1])
    if load >= FULLEST:
        return Estimate(math.inf, math.inf, 1.0, load)
    # Weights of 0, 1, ..., most requests; behind those they fall by `load` from one to the next.
    weights = np.exp(np.concatenate(([0.0], np.cumsum(np.log(rate) - np.log(done)))))
    behind = float(weights[-1]) * load / (1.0 - load)  # all of more than `most`
    total = float(weights.sum()) + behind
    inside = float((np.arange(most + 1) * weights).sum())
    # sum over k >= 1 of (most + k) load^k
    beyond = float(weights[-1]) * (most * load / (1.0 - load) + load / (1.0 - load) ** 2)
    requests = (inside + beyond) / total
    return Estimate(requests, requests / rate, (float(weights[-1]) + behind) / total, load)


def replicas_for(
    speeds: Mapping[int, float], tokens: float, rate: float, most: int, seconds: float, limit: int = 10_000
) -> int:
    """The fewest replicas with which an answer takes no longer than some seconds on average.

    Args:
        speeds, tokens, most: as for `estimate`.
        rate: requests per second that reach all of them.
        seconds: from arrival to the end of the answer.
        limit: of the number.

    Raises:
        UserError: a lone request takes longer.
    """
    alone = tokens / speeds[min(speeds)] * min(speeds)
    if seconds < alone:
        raise UserError(
            f"A lone request takes {alone:.1f} s, so that no number of replicas answers in {seconds:g} s."
        )
    low, high = 1, limit
    while low < high:
        middle = (low + high) // 2
        if estimate(speeds, tokens, rate / middle, most).seconds <= seconds:
            high = middle
        else:
            low = middle + 1
    return low


def pays_up_to(clover: Mapping[int, float], plain: Mapping[int, float], pays: float = PAYS) -> int:
    """The most requests at once, of those measured, up to which speculation pays; 0 where it never does.

    Args:
        clover, plain: tokens per second by requests at once.
        pays: speed over plain vLLM's.
    """
    best = 0
    for count in sorted(clover.keys() & plain.keys()):
        if clover[count] < pays * plain[count]:
            break
        best = count
    return best
