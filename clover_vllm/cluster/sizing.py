"""How many replicas a load needs: a queueing estimate from the speeds that `clover-vllm bench` measures.

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

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

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
        ValueError: a lone request takes longer.
    """
    alone = tokens / speeds[min(speeds)] * min(speeds)
    if seconds < alone:
        raise ValueError(
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


def target_requests(clover: Mapping[int, float], plain: Mapping[int, float], pays: float = PAYS) -> int:
    """Requests per replica to aim at: the most, of those measured, up to which speculation pays.

    With fewer a replica is not used for what it can do; with more it is no faster than plain vLLM, and another replica
    gives more.

    Args:
        clover, plain: tokens per second by requests at once.
        pays: speed over plain vLLM's.
    """
    best = 1
    for count in sorted(clover.keys() & plain.keys()):
        if clover[count] < pays * plain[count]:
            break
        best = count
    return best
