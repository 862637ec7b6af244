"""One engine of a benchmark, in a process of its own.

Reads one JSON object per line on stdin and answers with one on stdout. The first is
`{"llm": {...}}`, arguments of vllm.LLM; then each `{"requests": [...], "concurrency": c}` is a run, and each
`{"requests": [...], "phases": [...], "seconds": s}` a load that changes. Both take turns with those of other
engines: `{"turn": "over"}` is an answer too, after which `{"turn": "yours"}` has it go on.
The engine core lives in this process, so that its times can be read.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

from clover_vllm.launch.in_process import add_request, core_of, runner_of, until_idle
from clover_vllm.launch.process import Parent

TURN = 2.0
"""Seconds that an engine computes before those that it is compared with have their turns: a machine that others share
is faster in one minute than in the next, by more than methods differ."""


class Clock:
    """Seconds in which it was this engine's turn."""

    def __init__(self, wait: Callable[[], None] | None = None) -> None:
        """wait: until the next turn; without it all time is this engine's."""
        self._wait = wait
        self._waited = 0.0
        self._begun = time.perf_counter()

    def __call__(self) -> float:
        return time.perf_counter() - self._waited

    def pause(self) -> None:
        """Between two steps: wait, if the turn is over."""
        now = time.perf_counter()
        if self._wait is not None and now - self._begun >= TURN:
            self._wait()
            self._begun = time.perf_counter()
            self._waited += self._begun - now


@dataclass
class Run:
    """One measurement (filled by `run_requests`)."""

    seconds: float = 0.0
    tokens: int = 0
    answered: int = 0  # tokens of the answers that began meanwhile, whole; 0 where that is not known
    steps: int = 0
    decode_steps: int = 0  # those that compute no token of a prompt
    decode_seconds: float = 0.0
    decode_tokens: float = 0.0
    drafts: int = 0  # drafts verified, one per request and step
    draft_tokens: int = 0
    accepted: int = 0
    accepted_by_depth: list[int] = field(default_factory=list)
    ttft: list[float] = field(default_factory=list)  # seconds, per request
    tpot: list[float] = field(default_factory=list)  # seconds per output token after the first
    itl: list[float] = field(default_factory=list)  # seconds between outputs, any request
    parts: dict[str, float] = field(default_factory=dict)  # seconds by part of decode steps, Clover only
    foretold: list[float] = field(
        default_factory=list
    )  # predicted over observed seconds of steps, Clover only
    outputs: list[list[int]] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Tokens per second, had every answer that began while the clock ran come whole in that time, and no token of others.

        The clock cuts answers at both ends. Tokens that came too late add the time that they take in a step that only
        decodes; tokens of answers begun before take it off.
        """
        if not self.tokens:
            return 0.0
        usual = self.seconds / self.tokens
        price = min(usual, self.decode_seconds / self.decode_tokens) if self.decode_tokens else usual
        answered = self.answered or self.tokens
        return answered / (self.seconds + (answered - self.tokens) * price)


def serve(parent: Parent) -> None:
    """Answer commands until there are no more."""
    from vllm import LLM

    commands = parent.commands()
    llm = LLM(**next(commands)["llm"])
    parent.say({"ready": True})

    def wait() -> None:
        parent.say({"turn": "over"})
        command = next(commands, None)
        if command is None:
            sys.exit()  # nobody asks any more
        assert command == {"turn": "yours"}, command

    for command in commands:
        if "phases" in command:
            made = run_phases(llm, command["requests"], command["phases"], command["seconds"], Clock(wait))
            parent.say({"moments": [asdict(moment) for moment in made]})
        else:
            run = run_requests(
                llm, command["requests"], command["concurrency"], command.get("known"), Clock(wait)
            )
            parent.say(asdict(run))


@dataclass
class _Answer:
    """What a request got so far, and when."""

    arrived: float
    first: float = 0.0  # while the clock ran
    last: float = 0.0
    tokens: list[int] = field(default_factory=list)
    timed: int = 0  # tokens while the clock ran
    at_first: int = 0  # of these, those that came at `first`
    began: bool = False  # while the clock ran


def run_requests(
    llm: Any,
    requests: list[dict[str, Any]],
    concurrency: int,
    known: list[list[int]] | None = None,
    clock: Clock | None = None,
) -> Run:
    """Keep `concurrency` requests running, and time the steady part.

    The first requests, as many as run at a time, are given answers of different lengths, so that later ones begin one
    by one. The clock runs from the end of as many requests as run at a time until no request is left to fill a free place. So all that is
    timed happens at the stated concurrency; neither the batch that fills nor the one that drains is part of it. What
    still runs then is finished, so that `outputs` are whole. See `Run.rate` for answers that the clock cuts.

    Args:
        llm: a vllm.LLM with its engine core in this process.
        requests: [{"prompt": token ids, "params": SamplingParams arguments, with `max_tokens`}], more than
            `concurrency`.
        concurrency: requests at a time.
        known: their answers, for a run that chooses nodes in hindsight (`bench.hindsight`).
        clock: by which it is timed, and which may pause it.
    """
    from clover_vllm.bench.hindsight import knowing

    clock = clock or Clock()
    name = str(time.perf_counter())
    answers = {f"{name}-{i}": answer for i, answer in enumerate(known or ())}
    with (
        nullcontext() if known is None else knowing(runner_of(llm), answers),
        _leaving(core_of(llm), clock) as left,
        _foretelling(runner_of(llm)) as foretold,
    ):
        return _run_timed(llm, requests, concurrency, name, left, foretold, clock)


@contextmanager
def _leaving(core: Any, clock: Clock) -> Iterator[list[float]]:
    """When the outputs of the latest step were there, in a list of one.

    The engine of a server sends them off and then drafts (`EngineCoreProc._process_engine_step`); in this process
    `LLM` gets them after drafting, though nobody could see that in a server.
    """
    left, original = [0.0], core.post_step

    def post_step(*args: Any, **kwargs: Any) -> Any:
        left[0] = clock()
        return original(*args, **kwargs)

    core.post_step = post_step
    try:
        yield left
    finally:
        del core.post_step


@contextmanager
def _foretelling(runner: Any) -> Iterator[list[float]]:
    """Predicted over observed seconds of the steps from now on; nothing where nobody predicts."""
    found: list[float] = []
    if not _is_clovers(runner):
        yield found
        return
    counters: Any = runner.counters
    original = counters.count_reckoning

    def count_reckoning(expected: float, observed: float, asleep: float) -> None:
        found.append(expected / observed)
        original(expected, observed, asleep)

    counters.count_reckoning = count_reckoning
    try:
        yield found
    finally:
        del counters.count_reckoning


def _run_timed(
    llm: Any,
    requests: list[dict[str, Any]],
    concurrency: int,
    name_of: str,
    left: list[float],
    foretold: list[float],
    clock: Clock,
) -> Run:
    assert len(requests) > concurrency, (len(requests), concurrency)
    _forget(llm)
    engine, run = llm.llm_engine, Run()
    core = core_of(llm)
    before, parts = _counters(llm), _parts(llm)
    answers: dict[str, _Answer] = {}
    queue = list(enumerate(requests))[::-1]
    running, ended, prefilled, timing = 0, 0, False, False
    started = 0.0
    while queue or running:
        if core.batch_queue is None:  # under async scheduling a step is always under way
            clock.pause()
        begun = clock()
        while queue and running < concurrency:
            i, request = queue.pop()
            name, params = f"{name_of}-{i}", request["params"]
            if i < concurrency:
                params = {**params, "max_tokens": -(-params["max_tokens"] * (i + 1) // concurrency)}
            # A client asks again when the answer before has left, not when the drafting behind it is done.
            answers[name] = _Answer(left[0] if ended else clock())
            add_request(llm, name, request["prompt"], params, whole=False)
            running += 1
        prefills = is_prefilling(core.scheduler)
        came = 0
        for output in engine.step():
            answer = answers[output.request_id]
            came += len(output.outputs[0].token_ids)
            _take(answer, output.outputs[0].token_ids, left[0], run if timing else None)
            running -= output.finished
            ended += output.finished
        if not timing:
            prefilled = prefills
            if ended >= concurrency and queue and not started:
                timing, started = True, clock()
                before, parts = _counters(llm), _parts(llm)
                foretold.clear()
            continue
        run.steps += 1
        # Under async scheduling a step waits for the forward of the one before.
        if not prefills and not (prefilled and core.batch_queue is not None):
            run.decode_steps += 1
            run.decode_seconds += clock() - begun
            run.decode_tokens += came
        prefilled = prefills
        if not queue and running < concurrency:
            timing = False
            run.seconds = clock() - started
            run.foretold = foretold[:]
            _count(run, before, _counters(llm))
            run.parts = {name: value - parts.get(name, 0.0) for name, value in _parts(llm).items()}
    if not started:
        raise ValueError(f"{len(requests)} requests do not keep {concurrency} running")
    run.tokens = sum(a.timed for a in answers.values())
    run.answered = sum(len(a.tokens) for a in answers.values() if a.began)
    run.tpot = [(a.last - a.first) / (a.timed - a.at_first) for a in answers.values() if a.timed > a.at_first]
    run.outputs = [a.tokens for a in answers.values()]
    return run


@dataclass
class Moment:
    """A step of a load that changes."""

    second: float  # at its end, since the load began
    running: int  # requests at a time that the load asks for
    tokens: int  # that came out
    nodes: int  # that were verified
    asleep: bool  # whether the head drafted for nobody because it would not pay


def run_phases(
    llm: Any,
    requests: list[dict[str, Any]],
    phases: Sequence[int],
    seconds: float,
    clock: Clock | None = None,
) -> list[Moment]:
    """Keep as many requests running as each phase says, one phase after the other, by the clock.

    Where a phase has fewer than the one before, the youngest are aborted: the load is the same for every method,
    however fast it is.

    Args:
        llm: a vllm.LLM with its engine core in this process.
        requests: as for `run_requests`; they go round.
        phases: requests at a time.
        seconds: length of a phase.
        clock: by which phases are timed, and which may pause the load.
    """
    clock = clock or Clock()
    _forget(llm)
    core = core_of(llm)
    engine = llm.llm_engine
    runner = runner_of(llm)
    sizer = runner.speculation.sizer if _is_clovers(runner) else None
    nodes = [0]
    watch = _nodes_of(runner, nodes)
    running: list[str] = []
    moments: list[Moment] = []
    asked, started = 0, clock()
    with watch:
        while (now := clock() - started) < seconds * len(phases):
            wanted = phases[int(now / seconds)]
            while len(running) > wanted:
                engine.abort_request([running.pop()])
            while len(running) < wanted:
                request, name = requests[asked % len(requests)], f"{started}-{asked}"
                asked += 1
                add_request(llm, name, request["prompt"], request["params"], whole=False)
                running.append(name)
            nodes[0] = 0
            outputs = engine.step()
            for output in outputs:
                if output.finished and output.request_id in running:
                    running.remove(output.request_id)
            tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
            asleep = sizer is not None and sizer.asleep
            moments.append(Moment(clock() - started, wanted, tokens, nodes[0], asleep))
            if core.batch_queue is None:
                clock.pause()
        for name in running:
            engine.abort_request([name])
        for _ in until_idle(llm):
            pass
    return moments


@contextmanager
def _nodes_of(runner: Any, nodes: list[int]) -> Iterator[None]:
    """Add the draft tokens of every step to `nodes`."""
    original = runner.execute_model

    def execute_model(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        nodes[0] += sum(map(len, scheduler_output.scheduled_spec_decode_tokens.values()))
        return original(scheduler_output, *args, **kwargs)

    runner.execute_model = execute_model
    try:
        yield
    finally:
        del runner.execute_model


def is_prefilling(scheduler: Any) -> bool:
    """Whether a request of vLLM's scheduler has prompt tokens to compute before its next step.

    A prompt may take several steps (chunks), wait for room, or be computed again after a preemption.
    """
    return any(r.num_computed_tokens < r.num_prompt_tokens for r in scheduler.requests.values())


def _take(answer: _Answer, tokens: Sequence[int], now: float, run: Run | None) -> None:
    """Add tokens to an answer; their times too, while a run's clock runs."""
    if not tokens:
        return
    if run is not None:
        if answer.timed:
            run.itl.append(now - answer.last)
        else:
            answer.first, answer.at_first = now, len(tokens)
            answer.began = not answer.tokens
            if answer.began:
                run.ttft.append(now - answer.arrived)
        answer.last = now
        answer.timed += len(tokens)
    answer.tokens += tokens


def _count(run: Run, before: dict[str, Any], after: dict[str, Any]) -> None:
    """What vLLM counted in between."""
    for name in ("drafts", "draft_tokens", "accepted"):
        setattr(run, name, after[name] - before[name])
    run.accepted_by_depth = [
        a - b for a, b in zip(after["by_depth"], before["by_depth"] or [0] * 99, strict=False)
    ]


def _counters(llm: Any) -> dict[str, Any]:
    """vLLM's own counters of speculation."""
    names = {
        "vllm:spec_decode_num_drafts": "drafts",
        "vllm:spec_decode_num_draft_tokens": "draft_tokens",
        "vllm:spec_decode_num_accepted_tokens": "accepted",
    }
    found: dict[str, Any] = {"drafts": 0, "draft_tokens": 0, "accepted": 0, "by_depth": []}
    for metric in llm.get_metrics():
        if metric.name in names:
            found[names[metric.name]] += metric.value
        elif metric.name == "vllm:spec_decode_num_accepted_tokens_per_pos":
            found["by_depth"] = list(metric.values)
    return found


def _parts(llm: Any) -> dict[str, float]:
    """Seconds by part of a step from Clover's runner, nothing from others."""
    runner = runner_of(llm)
    return dict(runner.timer.seconds) if _is_clovers(runner) else {}


def _forget(llm: Any) -> None:
    """No run gains from what earlier ones have left: prompts in the cache, answers to draft from."""
    llm.reset_prefix_cache()
    runner = runner_of(llm)
    cache = getattr(getattr(runner, "drafter", None), "suffix_cache", None)
    if cache is not None:
        runner.drafter.suffix_cache = type(cache)(cache.max_tree_depth, cache.max_cached_requests)
    if _is_clovers(runner):
        runner.speculation.begin_retrieval()


def _is_clovers(runner: Any) -> bool:
    """Whether it is our V1 runner, which learns and counts more than vLLM's and our V2 runner."""
    return "CloverRunner" in {kind.__name__ for kind in type(runner).__mro__}


if __name__ == "__main__":
    serve(Parent())
