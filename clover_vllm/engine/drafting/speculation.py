"""What is drafted after each step, for which requests: the head, what was retrieved, and how much of both."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.attention.backend import CommonAttentionMetadata

from clover_vllm.engine.drafting.backlog import Backlog
from clover_vllm.engine.drafting.measure import costs_of
from clover_vllm.engine.drafting.ranks import agree, leads
from clover_vllm.engine.drafting.retrieval import Retrieval, suffix_cache
from clover_vllm.engine.drafting.sizing import LONG_PROMPT, Sizer, Wanted
from clover_vllm.engine.options import DEFAULT_NODES
from clover_vllm.tree import Tree
from clover_vllm.tree.costs import StepSize
from clover_vllm.tree.forest import Forest, Prices
from clover_vllm.tree.step import NEVER, Step

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

    from clover_vllm.engine.runner import CloverRunner

GREEDY, SAMPLED, SPECIAL = 0, 1, -1
"""What a request's outcomes teach: about those that take the most likely token, those that sample, or nobody."""

SHORT_REST = 64
"""Positions of a request that has ended which the head still reads, for others with the same prefix."""


def kind_of(params: SamplingParams | None) -> int:
    """Whose acceptance a request's outcomes speak for."""
    if params is None or params.structured_outputs is not None or params.thinking_token_budget is not None:
        return SPECIAL
    changed = (
        params.repetition_penalty != 1.0 or params.presence_penalty or params.frequency_penalty
        or params.logit_bias or params.allowed_token_ids or params.bad_words or params.extra_args
    )  # fmt: skip
    if changed:
        return SPECIAL
    return GREEDY if params.temperature < 1e-5 else SAMPLED


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
        self._due: tuple[Step, list[list[int]], torch.Tensor, CommonAttentionMetadata, float] | None = None

    def initialize(self) -> None:
        """Once the cache is known."""
        runner = self._runner
        cached = runner.vllm_config.cache_config.enable_prefix_caching
        self.backlog = Backlog(
            runner.drafter.options.backlog_mib << 20,
            runner.input_batch.block_table[0].block_size,
            runner.kv_cache_config.num_blocks if cached else 0,
            runner.model_config.get_vocab_size(),
        )

    def measure(self) -> None:
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
            self._kinds[request.req_id] = kind_of(request.sampling_params)
        if cached.resumed_req_ids:
            for name, computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
                if name in cached.resumed_req_ids:
                    backlog.start(name, computed, self._runner.requests[name].block_ids[0])
        if self.sizer is not None:
            self.sizer.costs.learn_outside(1e3 * (self._begun - self._ended))

    def kinds(self, names: Sequence[str]) -> list[int]:
        """By request, `GREEDY`, `SAMPLED` or `SPECIAL`."""
        return [self._kinds.get(name, SPECIAL) for name in names]

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
        # The scheduler cuts the lists of requests that end.
        self._due = (step, [list(own) for own in sampled], hidden, common, time.perf_counter())

    @property
    def is_due(self) -> bool:
        """Whether a step has been scored for which nothing was drafted so far."""
        return self._due is not None

    def draft(self) -> tuple[dict[int, Tree], int]:
        """Drafts for the next step, by request of the batch, and the number of requests in it."""
        assert self._due is not None
        (step, sampled, hidden, common, done), self._due = self._due, None
        return self._draft(step, sampled, hidden, common, done), len(step.rows)

    def _draft(
        self,
        step: Step,
        sampled: list[list[int]],
        hidden: torch.Tensor,
        common: CommonAttentionMetadata,
        done: float,
    ) -> dict[int, Tree]:
        runner, backlog = self._runner, self.backlog
        assert backlog is not None
        batch = runner.input_batch
        count = len(step.rows)
        names = list(batch.req_ids[:count])
        computed = batch.num_computed_tokens_cpu[:count].copy()
        table = batch.block_table[0].block_table.np
        kept = hidden if hidden.device.type == "cpu" else hidden.clone()
        backlog.note(kept, names, step, computed, table)
        going = self.going = [
            r for r, own in enumerate(sampled) if own and step.endings.get(r, NEVER).leaves_room(own)
        ]
        if self._follows:
            self._follow(backlog, names, table, common)
            return {}
        if self.sizer is None:
            return self._of_one_size(backlog, names, going, table, common)
        self._learn(self.sizer, step, sampled, names, computed, done)
        made = self._adaptive(self.sizer, backlog, step, sampled, names, computed, going, table, common)
        self._ended = time.perf_counter()
        return made

    def _of_one_size(
        self,
        backlog: Backlog,
        names: Sequence[str],
        going: Sequence[int],
        table: np.ndarray,
        common: CommonAttentionMetadata,
    ) -> dict[int, Tree]:
        """Everything is read as it comes."""
        runner = self._runner
        accepted = backlog.take(range(len(names)), names, runner.requests, table, runner.max_num_tokens)
        backlog.sweep()
        if accepted is None:
            return {}
        drafting = [r for r in going if r in accepted.complete]
        nodes = runner.num_spec_tokens
        if runner.drafter.options.tree == "adaptive":
            nodes = min(nodes, DEFAULT_NODES)
        trees = runner.drafter.draft(accepted, drafting, common, nodes)
        return dict(zip(drafting, trees, strict=bool(trees)))

    def _learn(
        self,
        sizer: Sizer,
        step: Step,
        sampled: list[list[int]],
        names: Sequence[str],
        computed: np.ndarray,
        done: float,
    ) -> None:
        """Costs and chances from a step that has just been scored."""
        nodes = np.array([len(tree) if tree is not None else 0 for tree in step.trees])
        size = StepSize(
            sum(step.rows), len(step.rows) + int(nodes.sum()), int(computed.sum()), float(nodes @ computed)
        )
        taken = done - self._begun
        self._runner.counters.count_reckoning(
            1e-3 * sizer.costs.of_inner(size), taken, taken if sizer.decision.asleep else 0.0
        )
        sizer.costs.learn_step(size, 1e3 * taken)
        if nodes.any():
            kinds = self.kinds(names)
            for r, own in enumerate(sampled):
                if not own or step.endings.get(r, NEVER).at(own):
                    kinds[r] = SPECIAL  # where it ends says nothing of the nodes behind
            sizer.learn_outcomes(step.trees, step.accepted, kinds)

    def _adaptive(
        self,
        sizer: Sizer,
        backlog: Backlog,
        step: Step,
        sampled: list[list[int]],
        names: Sequence[str],
        computed: np.ndarray,
        going: Sequence[int],
        table: np.ndarray,
        common: CommonAttentionMetadata,
    ) -> dict[int, Tree]:
        runner = self._runner
        wanted = self._wanted(backlog, step, sampled, names, computed, going)
        if not wanted:
            agree(((), ()))
            return {}
        sampling, prompts, cached = self._next_step(step, sampled, computed, names)
        prices = sizer.prices(wanted, sampling, prompts, cached)
        forest = sizer.forest(wanted)
        looked_up = self._retrieve(sizer, wanted, names, forest, prices)
        places = [
            i for i in sizer.choose(wanted, forest, prices)
            if not (wanted[i].pending or 0) > LONG_PROMPT or wanted[i].r not in self._first_tokens(step, going)
        ]  # fmt: skip
        asked, ended = [wanted[i].r for i in places], []
        if places and not sizer.decision.asleep:
            ended = self._rests(backlog, sampled, names, computed, going)
        agree((asked, ended))
        if places:
            accepted = backlog.take([*asked, *ended], names, runner.requests, table, runner.max_num_tokens)
            backlog.sweep()
            if accepted is not None:
                places = [i for i in places if wanted[i].r in accepted.complete]
                runner.drafter.grow_forest(
                    accepted, [wanted[i].r for i in places], places, common, forest, prices
                )
                sizer.learn_draft(forest, places)
        if not forest.candidates and not looked_up:
            return {}
        budget = forest.budget(prices)
        if looked_up:
            sizer.retrieving.learn(forest.saved_by_retrieval(budget) / len(wanted), looked_up / len(wanted))
        trees = forest.trees(budget.nodes)
        return {w.r: tree for w, tree in zip(wanted, trees, strict=True) if len(tree)}

    def _follow(
        self,
        backlog: Backlog,
        names: Sequence[str],
        table: np.ndarray,
        common: CommonAttentionMetadata,
    ) -> None:
        """What `_adaptive` of the first rank asks the head for."""
        runner = self._runner
        asked, ended = agree(((), ()))
        if not asked:
            return
        accepted = backlog.take([*asked, *ended], names, runner.requests, table, runner.max_num_tokens)
        backlog.sweep()
        if accepted is not None:
            runner.drafter.follow_forest(accepted, [r for r in asked if r in accepted.complete], common)

    def _retrieve(
        self, sizer: Sizer, wanted: Sequence[Wanted], names: Sequence[str], forest: Forest, prices: Prices
    ) -> float:
        """Look the requests' texts up. Milliseconds that it took; 0 where it was not done."""
        if self.retrieval is None or not sizer.retrieving.due():
            return 0.0
        begun = time.perf_counter()
        states = self._runner.requests
        found = {}
        for i, w in enumerate(wanted):
            name = names[w.r]
            own = self.retrieval.look_up(name, states[name], min(sizer.limit, w.room))
            if own is not None:
                found[i] = own
        forest.retrieve(found)
        taken = 1e3 * (time.perf_counter() - begun)
        prices.spent += taken
        return taken

    def _first_tokens(self, step: Step, going: Sequence[int]) -> set[int]:
        """Requests whose prompt has ended in this step."""
        return {r for r in going if step.root_rows[r] > step.first_rows[r]}

    def _wanted(
        self,
        backlog: Backlog,
        step: Step,
        sampled: list[list[int]],
        names: Sequence[str],
        computed: np.ndarray,
        going: Sequence[int],
    ) -> list[Wanted]:
        found = []
        for r in going:
            prompt = step.root_rows[r] - step.first_rows[r]
            cached = int(computed[r]) + prompt + len(sampled[r])
            kind = self._kinds.get(names[r], SPECIAL)
            found.append(
                Wanted(
                    r,
                    room=step.endings.get(r, NEVER).remaining - len(sampled[r]) - 1,
                    cached=cached,
                    pending=backlog.pending(names[r], cached),
                    sampled=kind == SAMPLED,
                    plain=kind != SPECIAL,
                )
            )
        return found

    def _next_step(
        self, step: Step, sampled: list[list[int]], computed: np.ndarray, names: Sequence[str]
    ) -> tuple[int, int, int]:
        """Requests that will sample, rows of prompts beside them, and positions that are read."""
        states = self._runner.requests
        sampling = prompts = 0
        budget = self._runner.max_num_tokens
        for r, own in enumerate(sampled):
            if own:
                sampling += not step.endings.get(r, NEVER).at(own)
                continue
            left = states[names[r]].num_prompt_tokens - int(computed[r]) - step.rows[r]
            taken = max(0, min(left, budget - prompts - sampling))
            prompts += taken
            sampling += taken == left
        return max(1, sampling), prompts, int(computed.sum()) + sum(step.rows)

    def _rests(
        self,
        backlog: Backlog,
        sampled: list[list[int]],
        names: Sequence[str],
        computed: np.ndarray,
        going: Sequence[int],
    ) -> list[int]:
        """Requests that end, whose last positions others may share."""
        if not self._runner.vllm_config.cache_config.enable_prefix_caching:
            return []
        able = set(going)
        found = []
        for r, own in enumerate(sampled):
            if own and r not in able:
                pending = backlog.pending(names[r], int(computed[r]) + len(own))
                if pending is not None and 0 < pending <= SHORT_REST:
                    found.append(r)
        return found
