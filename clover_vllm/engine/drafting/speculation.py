"""What is drafted after each step, for which requests: the head, what was retrieved, and how much of both."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.attention.backend import CommonAttentionMetadata

from clover_vllm.engine.drafting.backlog import AcceptedRows, Backlog
from clover_vllm.engine.drafting.measure import costs_of
from clover_vllm.engine.drafting.ranks import agree, leads
from clover_vllm.engine.drafting.retrieval import Retrieval, suffix_cache
from clover_vllm.engine.drafting.sizing import Sizer, Wanted
from clover_vllm.engine.scorer import GREEDY_TEMPERATURE
from clover_vllm.tree import Tree
from clover_vllm.tree.costs import StepSize
from clover_vllm.tree.forest import Forest, Retrieved
from clover_vllm.tree.kinds import SOURCES
from clover_vllm.tree.outcomes import count_sources
from clover_vllm.tree.step import NEVER, Step

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

    from clover_vllm.engine.runner import CloverRunner

GREEDY, SAMPLED, SPECIAL = 0, 1, -1
"""What a request's outcomes teach: about those that take the most likely token, those that sample, or nobody."""

SHORT_REST = 64
"""Positions of a request that has ended which the head still reads, for others with the same prefix."""


def sampling_kind(params: SamplingParams | None) -> int:
    """Whose acceptance a request's outcomes speak for."""
    if params is None or params.structured_outputs is not None or params.thinking_token_budget is not None:
        return SPECIAL
    changed = (
        params.repetition_penalty != 1.0 or params.presence_penalty or params.frequency_penalty
        or params.logit_bias or params.allowed_token_ids or params.bad_words or params.extra_args
    )  # fmt: skip
    if changed:
        return SPECIAL
    return GREEDY if params.temperature < GREEDY_TEMPERATURE else SAMPLED


@dataclass
class Scored:
    """A step that has been scored, and for which nothing has been drafted so far. Legend: R requests.

    Attributes:
        step: with what it accepted.
        sampled: tokens by request, none where a prompt goes on.
        hidden: [rows, D], the target's pre-norm hidden states.
        common: vLLM's metadata of the step.
        names: of the requests.
        computed: int [R], positions cached before the step.
        table: int [R or more, blocks], vLLM's block table.
        at: when it was scored, by `time.perf_counter`.
    """

    step: Step
    sampled: list[list[int]]
    hidden: torch.Tensor
    common: CommonAttentionMetadata
    names: list[str]
    computed: np.ndarray
    table: np.ndarray
    at: float = field(default_factory=time.perf_counter)

    @cached_property
    def going(self) -> list[int]:
        """Requests that can use a draft in the next step."""
        endings = self.step.endings
        return [r for r, own in enumerate(self.sampled) if own and endings.get(r, NEVER).leaves_room(own)]

    def has_ended(self, r: int) -> bool:
        """Whether a request that sampled has come to its end."""
        return self.step.endings.get(r, NEVER).at(self.sampled[r])

    def cached(self, r: int) -> int:
        """Positions of a request that are cached now."""
        return int(self.computed[r]) + self.step.root_rows[r] - self.step.first_rows[r] + len(self.sampled[r])


class Speculation:
    """Decides and drafts, between a step and the next."""

    def __init__(self, runner: CloverRunner) -> None:
        self._runner = runner
        self.sizer: Sizer | None = None  # of the rank that decides
        self._follows = False  # whether another rank decides
        self.backlog: Backlog | None = None
        self.retrieval: Retrieval | None = None
        self.going: list[int] = []  # requests of the last step that can use a draft
        self._kinds: dict[str, int] = {}
        self._begun = self._ended = 0.0
        self._drafting: float | None = None  # milliseconds before the step under way; None: nobody was asked
        self._load = 0  # requests that could use a draft when the step under way was chosen
        self._due: Scored | None = None
        self._proposed: tuple[Forest, list[str]] | None = None  # for the step under way, of these requests

    def initialize(self) -> None:
        """Once the cache is known."""
        runner = self._runner
        cached = runner.vllm_config.cache_config.enable_prefix_caching
        self.backlog = Backlog(
            runner.drafter.options.backlog_mib << 20,
            runner.drafter.options.read_window,
            runner.input_batch.block_table[0].block_size,
            runner.kv_cache_config.num_blocks if cached else 0,
            runner.model_config.get_vocab_size(),
        )

    def time_costs(self) -> None:
        """Time steps and drafting, once all is compiled."""
        runner = self._runner
        if runner.drafter.is_adaptive and runner.kv_caches:
            costs = costs_of(runner)
            self._follows = not leads()
            if self._follows:
                return
            self.sizer = Sizer(costs, runner.num_spec_tokens)
            self.begin_retrieval()
            runner.drafter.sizer = self.sizer

    def begin_retrieval(self) -> None:
        """With no text to look up so far."""
        cache = suffix_cache(self._runner.drafter.options.retrieval) if self.sizer is not None else None
        self.retrieval = Retrieval(cache) if cache is not None else None

    def begin_step(self, scheduler_output: SchedulerOutput) -> None:
        """Before a step: who comes and goes."""
        self._begun = time.perf_counter()
        backlog = self.backlog
        if backlog is None:
            return
        cached = scheduler_output.scheduled_cached_reqs
        for names in (scheduler_output.finished_req_ids, cached.resumed_req_ids):
            backlog.forget(names)
        for name in scheduler_output.finished_req_ids:
            self._kinds.pop(name, None)
        if self.retrieval is not None:
            self.retrieval.forget(scheduler_output.finished_req_ids)
        for request in scheduler_output.scheduled_new_reqs:
            backlog.start(request.req_id, request.num_computed_tokens, request.block_ids[0])
            self._kinds[request.req_id] = sampling_kind(request.sampling_params)
        if cached.resumed_req_ids:
            resumed = zip(cached.req_ids, cached.num_computed_tokens, cached.new_block_ids, strict=True)
            for name, computed, blocks in resumed:
                if name in cached.resumed_req_ids and blocks is not None:
                    backlog.start(name, computed, blocks[0])
        if self.sizer is not None:
            self.sizer.costs.learn_outside(1e3 * (self._begun - self._ended))

    def scored(
        self, step: Step, sampled: list[list[int]], hidden: torch.Tensor, common: CommonAttentionMetadata
    ) -> None:
        """A step has been scored.

        Args:
            step: with what it accepted.
            sampled: tokens by request, none where a prompt goes on.
            hidden: [rows, D], the target's pre-norm hidden states.
            common: vLLM's metadata of the step.
        """
        batch, count = self._runner.input_batch, len(step.rows)
        self._due = Scored(
            step,
            [list(own) for own in sampled],  # the scheduler cuts the lists of requests that end
            hidden if hidden.device.type == "cpu" else hidden.clone(),
            common,
            list(batch.req_ids[:count]),
            batch.num_computed_tokens_cpu[:count].copy(),
            batch.block_table[0].block_table.np,
        )

    @property
    def is_due(self) -> bool:
        """Whether a step has been scored for which nothing was drafted so far."""
        return self._due is not None

    def draft(self) -> tuple[dict[int, Tree], int]:
        """Drafts for the next step, by request of the batch, and the number of requests in it."""
        done, backlog = self._due, self.backlog
        assert done is not None
        assert backlog is not None
        self._due = None
        backlog.note(done.hidden, done.names, done.step, done.computed, done.table)
        self.going = done.going
        if self._follows:
            self._follow(backlog, done)
            return {}, len(done.names)
        if self.sizer is None:
            made = self._of_one_size(backlog, done)
        else:
            self._learn(self.sizer, done)
            begun = time.perf_counter()
            made = self._adaptive(self.sizer, backlog, done)
            self._ended = time.perf_counter()
            if self._drafting is not None:
                self._drafting += 1e3 * (self._ended - begun)
        return made, len(done.names)

    def _of_one_size(self, backlog: Backlog, done: Scored) -> dict[int, Tree]:
        """Everything is read as it comes."""
        runner = self._runner
        accepted = self._take(backlog, done, range(len(done.names)))
        if accepted is None:
            return {}
        drafting = [r for r in done.going if r in accepted.complete]
        trees = runner.drafter.draft(accepted, drafting, done.common, runner.num_spec_tokens)
        return dict(zip(drafting, trees, strict=bool(trees)))

    def _take(self, backlog: Backlog, done: Scored, requests: Sequence[int]) -> AcceptedRows | None:
        """What some requests have for the head to read."""
        runner = self._runner
        accepted = backlog.take(requests, done.names, runner.requests, done.table, runner.max_num_tokens)
        backlog.sweep()
        return accepted

    def _learn(self, sizer: Sizer, done: Scored) -> None:
        """Costs and chances from a step that has just been scored."""
        step = done.step
        nodes = np.array([len(tree) if tree is not None else 0 for tree in step.trees])
        size = StepSize(
            rows=sum(step.rows),
            sampled=len(step.rows) + int(nodes.sum()),
            cached=int(done.computed.sum()),
            crossed=float(nodes @ done.computed),
        )
        taken = done.at - self._begun
        self._runner.counters.count_reckoning(
            1e-3 * sizer.costs.of_step(size), taken, taken if sizer.asleep else 0.0
        )
        sizer.costs.learn_step(size, 1e3 * taken)
        verified, accepted = count_sources(step.trees, step.accepted)
        emitting = sum(map(bool, done.sampled))
        head, found = SOURCES.index("head"), SOURCES.index("retrieved")
        if self._drafting is not None:
            own = int(verified[head]), int(accepted[head])
            sizer.settle(sizer.ledger, self._load, size, emitting, *own, self._drafting)
        if verified[found]:  # whether looking pays is for `sizer.retrieving` to say
            own = int(verified[found]), int(accepted[found])
            sizer.settle(sizer.found, self._load, size, emitting, *own, 0.0)
        self._drafting = None
        if self._proposed is not None:
            forest, names = self._proposed
            self._proposed = None
            # Where a request ends says nothing of what would have followed.
            said = {
                name: own
                for r, (name, own) in enumerate(zip(done.names, done.sampled, strict=True))
                if own and not done.has_ended(r)
            }
            seen = forest.outcomes([said.get(name, ()) for name in names])
            sizer.learn_outcomes(seen, [self._kinds.get(name, SPECIAL) for name in names])

    def _adaptive(self, sizer: Sizer, backlog: Backlog, done: Scored) -> dict[int, Tree]:
        runner = self._runner
        self._load = len(done.going)
        looks = self.retrieval is not None and bool(done.going) and sizer.looks(len(done.going))
        if not done.going or (not looks and sizer.rests(len(done.going))):
            agree(((), ()))
            return {}
        wanted = self._wanted(backlog, done)
        texts = len(wanted)
        found, looked_up = self._look_up(sizer, wanted, done.names) if looks else ({}, 0.0)
        if looks and not found and sizer.rests(len(done.going)):
            sizer.retrieving.learn(0.0, looked_up / texts, texts)
            agree(((), ()))
            return {}
        prices = sizer.prices(wanted, *self._next_step(done))
        forest = sizer.forest(wanted)
        begun = time.perf_counter()
        forest.retrieve(found)
        looked_up += 1e3 * (time.perf_counter() - begun) if found else 0.0
        prices.spent += looked_up
        begun = time.perf_counter()
        places = sizer.choose(wanted, forest, prices)
        asked = [wanted[i].r for i in places]
        ended = self._rests(backlog, done) if places and not sizer.asleep else []
        agree((asked, ended))
        if places:
            self._drafting = None if sizer.asleep else -looked_up
            accepted = self._take(backlog, done, [*asked, *ended])
            if accepted is not None:
                places = [i for i in places if wanted[i].r in accepted.complete]
                asked = [wanted[i].r for i in places]
                runner.drafter.grow_forest(accepted, asked, places, done.common, forest, prices)
                for _ in forest.spoiled:
                    runner.counters.count_fallback("non_finite_draft")
                if places:
                    taken = 1e3 * (time.perf_counter() - begun)
                    sizer.learn_draft(forest, places, len(accepted.positions), taken)
        budget = forest.budget(prices) if len(forest.nodes) else None
        if looks:
            saved = forest.saved_by_retrieval(budget) if budget is not None else 0.0
            sizer.retrieving.learn(saved / texts, looked_up / texts, texts)
        if budget is None:
            return {}
        self._proposed = forest, [done.names[w.r] for w in wanted]
        trees = forest.trees(budget.nodes)
        return {w.r: tree for w, tree in zip(wanted, trees, strict=True) if len(tree)}

    def _follow(self, backlog: Backlog, done: Scored) -> None:
        """What `_adaptive` of the first rank asks the head for."""
        asked, ended = agree(((), ()))
        accepted = self._take(backlog, done, [*asked, *ended]) if asked else None
        if accepted is not None:
            mine = [r for r in asked if r in accepted.complete]
            self._runner.drafter.follow_forest(accepted, mine, done.common)

    def _look_up(
        self, sizer: Sizer, wanted: Sequence[Wanted], names: Sequence[str]
    ) -> tuple[dict[int, Retrieved], float]:
        """What the requests' texts went on with before, by place among the wanted, and milliseconds that looking took."""
        assert self.retrieval is not None
        begun = time.perf_counter()
        states = self._runner.requests
        found = {}
        for i, w in enumerate(wanted):
            name = names[w.r]
            own = self.retrieval.look_up(name, states[name], min(sizer.limit, w.room))
            if own is not None:
                found[i] = own
        return found, 1e3 * (time.perf_counter() - begun)

    def _wanted(self, backlog: Backlog, done: Scored) -> list[Wanted]:
        endings, sampled = done.step.endings, done.sampled
        found = []
        for r in done.going:
            name, cached = done.names[r], done.cached(r)
            pending = backlog.pending(name, cached)
            room = endings.get(r, NEVER).remaining - len(sampled[r]) - 1
            found.append(Wanted(r, room, cached, pending, self._kinds.get(name, SPECIAL) == SAMPLED))
        return found

    def _next_step(self, done: Scored) -> tuple[int, int, int]:
        """Requests that will sample, rows of prompts beside them, and positions that are read."""
        states = self._runner.requests
        sampling = prompts = 0
        budget = self._runner.max_num_tokens
        for r, own in enumerate(done.sampled):
            if own:
                sampling += not done.has_ended(r)
                continue
            left = states[done.names[r]].num_prompt_tokens - int(done.computed[r]) - done.step.rows[r]
            taken = max(0, min(left, budget - prompts - sampling))
            prompts += taken
            sampling += taken == left
        return max(1, sampling), prompts, int(done.computed.sum()) + sum(done.step.rows)

    def _rests(self, backlog: Backlog, done: Scored) -> list[int]:
        """Requests that end, whose last positions others may share."""
        if not self._runner.vllm_config.cache_config.enable_prefix_caching:
            return []
        able = set(done.going)
        return [
            r
            for r, own in enumerate(done.sampled)
            if own and r not in able and 0 < backlog.missed(done.names[r], done.cached(r)) <= SHORT_REST
        ]
