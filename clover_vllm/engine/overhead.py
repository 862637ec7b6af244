"""`clover-vllm overhead`: what speculation's own Python costs per request and step.

The runner's methods run over stand-ins for vLLM's batch, with a scripted target and head that take no time: a step is
laid out, scored, noted, counted and drafted for as in an engine, and only what is ours is timed.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from rich.table import Table
from vllm import SamplingParams
from vllm.distributed import parallel_state
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.worker.gpu_input_batch import CachedRequestState

from clover_vllm.base.provenance import write_result
from clover_vllm.base.show import print_table
from clover_vllm.base.timing import StepTimer
from clover_vllm.bench.settings import OverheadSettings
from clover_vllm.engine.backends.cpu import TreeCPUAttentionMetadataBuilder
from clover_vllm.engine.drafting.pending import PendingDrafts
from clover_vllm.engine.drafting.sizing import MOST_LEVELS, Sizer
from clover_vllm.engine.drafting.speculation import Speculation
from clover_vllm.engine.metrics import AcceptanceWatch, Counters
from clover_vllm.engine.options import ADAPTIVE_WIDTH, CloverOptions
from clover_vllm.engine.runner import CloverCPUModelRunner
from clover_vllm.engine.scorer import TreeScorer
from clover_vllm.tree.budget import Floats, Ints
from clover_vllm.tree.costs import Costs, Curve
from clover_vllm.tree.step import CurrentStep

PARTS = ("lay out", "score", "note", "read", "look up", "choose", "remember", "count")
"""Of a step: rows, positions and masks; the walk; noting hidden states; handing them to the head; looking texts up;
choosing and growing trees; keeping them; counters."""

VOCAB = 50_000
WIDTH = 576
"""Of hidden states, as SmolLM2-135M's."""

BLOCK = 128
PROMPT = 2 * BLOCK
NODES = 16
CHANCES = (0.5, 0.2, 0.1, 0.06, 0.04, 0.03, 0.02, 0.01)
"""Of the head's candidates; and how often each is what the target says."""

WARM_UP = 40
"""Steps before the first that is timed: drafting decides nothing in the first ones."""


@dataclass(frozen=True)
class Overhead:
    """Microseconds per request and step."""

    requests: int
    drafts: bool  # whether anything is drafted
    nodes: float  # verified, per request and step
    accepted: float  # of those
    parts: dict[str, float]
    catch_up: (
        float  # milliseconds for the head's inputs of all requests after these steps; 0 where it has kept up
    )

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def said(r: int, position: int) -> int:
    """The token of a request's text at a position; nothing ever repeats."""
    return (7919 * r + 104_729 * position + 31 * position * position) % VOCAB


class _Target:
    """Stands for vLLM's sampler: the logits of a row are the token that it says."""

    @staticmethod
    def greedy_sample(logits: torch.Tensor) -> torch.Tensor:
        return logits[:, 0].long()


class _Head:
    """`LevelDrafter` that is right as often as it says."""

    def __init__(self, rng: random.Random, roots: Sequence[tuple[int, int]]) -> None:
        """roots: request and position of each."""
        self._rng, self._states = rng, list(roots)
        self._log_chances = np.log(CHANCES)

    def _candidates(self, r: int, position: int) -> list[int]:
        tokens = [VOCAB + i for i in range(len(CHANCES))]
        right = self._rng.choices(range(len(CHANCES) + 1), [*CHANCES, 1.0 - sum(CHANCES)])[0]
        if right < len(CHANCES):
            tokens[right] = said(r, position + 1)
        return tokens

    def _behind(self, states: Sequence[tuple[int, int]]) -> tuple[Floats, Ints]:
        found = np.array([self._candidates(*state) for state in states])
        return np.tile(self._log_chances, (len(found), 1)), found

    def first(self) -> tuple[Floats, Ints]:
        return self._behind(self._states)

    def expand(self, parents: Ints, tokens: Ints) -> tuple[Floats, Ints]:
        del tokens
        level = [(r, position + 1) for r, position in (self._states[parent] for parent in parents.tolist())]
        self._states += level
        return self._behind(level)


class _Drafter:
    """Stands for the proposer."""

    is_adaptive = True

    def __init__(self, timer: StepTimer) -> None:
        self.options = CloverOptions()
        self.sizer: Sizer | None = None
        self._timer, self._rng = timer, random.Random(0)

    def grow_forest(
        self,
        accepted: Any,
        asked: Sequence[int],
        places: Sequence[int],
        common: Any,
        forest: Any,
        prices: Any,
    ) -> None:
        del common
        assert self.sizer is not None
        with self._timer.measure("head"):
            place = {r: accepted.starts[i + 1] - 1 for i, r in enumerate(accepted.requests)}
            head = _Head(self._rng, [(r, int(accepted.positions[place[r]]) + 1) for r in asked])
            _timed(self._timer, head, "first", "head")
            _timed(self._timer, head, "expand", "head")
        forest.grow_head(head, places, prices, self.sizer.following, MOST_LEVELS, ADAPTIVE_WIDTH)


def _timed(timer: StepTimer, owner: Any, name: str, part: str) -> None:
    """Count the time of a method as a part's."""
    original: Callable[..., Any] = getattr(owner, name)

    def run(*args: Any) -> Any:
        with timer.measure(part):
            return original(*args)

    setattr(owner, name, run)


def _costs(drafts: bool) -> Costs:
    """With which drafting some nodes for everybody pays, or none."""
    step, draft = Curve({1: 10.0, 64: 12.0, 4096: 30.0}), Curve({1: 0.05 if drafts else 100.0})
    return Costs(
        step, Curve({1: 0.1}), draft, draft, draft, cached=1e-5, crossed=1e-6, asking=Curve({1: 0.1})
    )


class Stand:
    """A runner that has no engine."""

    def __init__(self, requests: int, drafts: bool, folder: str) -> None:
        """
        Args:
            requests: in the batch, which decode all the time.
            drafts: whether drafting pays.
            folder: for metrics.
        """
        self.timer = timer = StepTimer()
        names = [f"request-{r}" for r in range(requests)]
        blocks = 64
        self.states = {
            name: CachedRequestState(
                req_id=name,
                prompt_token_ids=[said(r, p) for p in range(PROMPT)],
                mm_features=[],
                sampling_params=SamplingParams(
                    temperature=0.0, max_tokens=100_000, stop_token_ids=[VOCAB + 99]
                ),
                generator=None,
                block_ids=([*range(blocks * r, blocks * (r + 1))],),
                num_computed_tokens=0,
                output_token_ids=[said(r, PROMPT)],
            )
            for r, name in enumerate(names)
        }
        self.batch = batch = SimpleNamespace(
            req_ids=names,
            req_id_to_index={name: r for r, name in enumerate(names)},
            req_output_token_ids=[state.output_token_ids for state in self.states.values()],
            num_logprobs={},
            greedy_reqs=set(names),
            generators={},
            num_reqs=requests,
            num_computed_tokens_cpu=np.full(requests, PROMPT, dtype=np.int32),
            block_table=[
                SimpleNamespace(
                    block_size=BLOCK,
                    block_table=SimpleNamespace(
                        np=np.arange(requests * blocks, dtype=np.int32).reshape(requests, -1)
                    ),
                )
            ],
        )
        runner: Any = object.__new__(CloverCPUModelRunner)
        self.runner = runner
        runner.input_batch, runner.requests = batch, self.states
        runner.device, runner.max_model_len, runner.max_num_tokens = torch.device("cpu"), 200_000, 8192
        runner.num_spec_tokens, runner._draft_token_req_ids = NODES, None
        runner.discard_request_mask = SimpleNamespace(np=np.zeros(requests, dtype=bool))
        runner.positions = torch.zeros(requests * (NODES + 1), dtype=torch.int64)
        runner.current, runner.timer = CurrentStep(), StepTimer()
        runner.counters = Counters(NODES)
        runner.counters.export(folder, {"model_name": "none", "engine": "0"})
        runner._watch = AcceptanceWatch(runner.counters, 0.5)
        runner._pending = PendingDrafts(runner.counters.count_fallback)
        runner.scorer = TreeScorer(_Target(), runner.current)  # type: ignore[arg-type]
        runner.drafter = _Drafter(timer)
        runner.vllm_config = SimpleNamespace(cache_config=SimpleNamespace(enable_prefix_caching=True))
        runner.kv_cache_config = SimpleNamespace(num_blocks=requests * blocks)
        runner.model_config = SimpleNamespace(get_vocab_size=lambda: 2 * VOCAB)
        runner.speculation = speculation = Speculation(runner)
        speculation.initialize()
        costs = _costs(drafts)
        for name in ("learn_step", "learn_outside", "learn_drafting"):  # steps take no time here
            setattr(costs, name, lambda *_: None)
        speculation.sizer = runner.drafter.sizer = sizer = Sizer(costs, NODES)
        setattr(sizer.ledger, "forbids", lambda _: False)  # noqa: B010
        speculation.begin_retrieval()
        self.builder: Any = object.__new__(TreeCPUAttentionMetadataBuilder)
        self.sampling = SimpleNamespace(
            thinking_budget_state_holder=None,
            temperature=None,
            all_greedy=True,
            logitsprocs=LogitsProcessors(),
            logprob_token_ids=None,
            bad_words_token_ids={},
            no_penalties=True,
            allowed_token_ids_mask=None,
        )
        self.drafted: dict[str, list[int]] = {}
        self.nodes = self.accepted = 0
        _timed(timer, speculation.backlog, "note", "note")
        _timed(timer, speculation.backlog, "take", "read")
        _timed(timer, speculation.backlog, "sweep", "read")
        _timed(timer, speculation, "_look_up", "look up")
        _timed(timer, runner, "_remember", "remember")
        self._begin()

    def _begin(self) -> None:
        new = [
            SimpleNamespace(
                req_id=name,
                num_computed_tokens=PROMPT,
                block_ids=state.block_ids,
                sampling_params=state.sampling_params,
            )
            for name, state in self.states.items()
        ]
        self.runner.speculation.begin_step(self._scheduled(new))

    def _scheduled(self, new: Sequence[Any] = ()) -> Any:
        cached = SimpleNamespace(resumed_req_ids=set(), req_ids=[], num_computed_tokens=[], new_block_ids=[])
        return SimpleNamespace(
            finished_req_ids=set(),
            scheduled_new_reqs=new,
            scheduled_cached_reqs=cached,
            scheduled_spec_decode_tokens={name: own for name, own in self.drafted.items() if own},
        )

    def step(self) -> None:
        """A whole step, as the runner and its attention backend do it."""
        runner, batch, timer = self.runner, self.batch, self.timer
        scheduled = self._scheduled()
        rows = np.array([1 + len(self.drafted.get(name, ())) for name in batch.req_ids], dtype=np.int32)
        starts = torch.from_numpy(np.concatenate(([0], np.cumsum(rows))).astype(np.int32))
        computed = batch.num_computed_tokens_cpu
        plain = SimpleNamespace(
            num_actual_tokens=int(rows.sum()),
            block_table=torch.from_numpy(batch.block_table[0].block_table.np),
            query_start_loc=starts,
            seq_lens=torch.from_numpy(computed + rows),
        )
        with timer.measure("lay out"):
            runner.speculation.begin_step(scheduled)
            step = runner._step(scheduled, rows)
            runner.current.begin(step)
            if step.has_branches:
                runner._set_positions(step)
                self.builder._tree_inputs(step, [*range(len(rows))], plain)
        depths = [[0, *(tree.depths if tree is not None else ())] for tree in step.trees]
        logits = torch.tensor(
            [[float(said(r, int(computed[r]) + 1 + depth))] for r, own in enumerate(depths) for depth in own]
        )
        if self.drafted_any:
            with timer.measure("score"):
                output = runner.scorer.forward(None, None, logits, self.sampling)
                step.moves()
            tokens = [[t for t in own if t >= 0] for own in output.sampled_token_ids.tolist()]
        else:
            step.accepted = [[] for _ in rows]
            tokens = [[int(row[0])] for row in logits.tolist()]
        for state, own in zip(self.states.values(), tokens, strict=True):
            state.output_token_ids += own
        self.nodes += int(rows.sum()) - len(rows)
        self.accepted += sum(map(len, step.accepted))
        hidden = torch.zeros(int(rows.sum()), WIDTH, dtype=torch.bfloat16)
        with timer.measure("note"):
            runner.speculation.scored(step, tokens, hidden, None)
        with timer.measure("count"):
            runner._end_step(step)
        with timer.measure("choose"):
            runner.take_draft_token_ids()
        computed += np.array([len(own) for own in tokens], dtype=np.int32)
        self.drafted = dict(zip(batch.req_ids, runner._draft_token_ids, strict=True))

    def catch_up(self) -> float:
        """Milliseconds to hand the head all that it has missed."""
        batch, begun = self.batch, time.perf_counter()
        table = batch.block_table[0].block_table.np
        self.runner.speculation.backlog.take(
            range(batch.num_reqs), batch.req_ids, self.states, table, 1 << 20
        )
        return 1e3 * (time.perf_counter() - begun)

    @property
    def drafted_any(self) -> bool:
        return any(self.drafted.values())


@contextmanager
def _one_rank() -> Iterator[None]:
    """As an engine without tensor parallelism has it."""
    before = parallel_state._TP
    parallel_state._TP = SimpleNamespace(world_size=1, is_first_rank=True)
    try:
        yield
    finally:
        parallel_state._TP = before


@contextmanager
def warm_stand(requests: int, drafts: bool) -> Iterator[Stand]:
    """A runner that has served some steps."""
    with _one_rank(), tempfile.TemporaryDirectory() as folder:
        stand = Stand(requests, drafts, folder)
        for _ in range(WARM_UP):
            stand.step()
        yield stand


def time_overhead(requests: int, drafts: bool, steps: int) -> Overhead:
    """Time steps of a batch.

    Args:
        requests: in the batch.
        drafts: whether drafting pays.
        steps: that are timed.
    """
    with warm_stand(requests, drafts) as stand:
        stand.timer.finish_step(False)
        stand.nodes = stand.accepted = 0
        for _ in range(steps):
            stand.step()
        seconds = stand.timer.finish_step(True)
        catch_up = 0.0 if drafts else stand.catch_up()
    each = requests * steps
    parts = {part: 1e6 * seconds.get(part, 0.0) / each for part in PARTS}
    return Overhead(requests, drafts, stand.nodes / each, stand.accepted / each, parts, catch_up)


def show_overhead(settings: OverheadSettings) -> list[Overhead]:
    """Measure, print a table, and write JSON."""
    found = [
        time_overhead(count, drafts, settings.steps)
        for count in settings.requests
        for drafts in (True, False)
    ]
    table = Table(title="Speculation's own Python, microseconds per request and step")
    for name in ("requests", "nodes", "accepted", *PARTS, "all", "catch-up (ms)"):
        table.add_column(name, justify="right")
    for o in found:
        numbers = (f"{value:.2f}" for value in (o.nodes, o.accepted, *o.parts.values(), o.total, o.catch_up))
        table.add_row(str(o.requests), *numbers)
    print_table(table)
    if settings.output is not None:
        write_result(
            settings.output, "overhead.json", {"results": [{**asdict(o), "total": o.total} for o in found]}
        )
    return found
