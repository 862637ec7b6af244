"""An engine core of this process, with scripted arrivals and scripted trees."""

from __future__ import annotations

import random
import re
from typing import Any

from clover_vllm.launch.in_process import add_request, core_of

Json = dict[str, Any]


def drive(llm: Any, requests: list[Json]) -> Json:
    """Run requests until all are done.

    Args:
        llm: a vllm.LLM whose engine core lives in this process.
        requests: [{"prompt": token ids, "params": SamplingParams arguments, "step": arrives before this
            engine step (0), "abort": aborted at this step (never), "priority": (0)}].

    Returns:
        {"outputs": [[{"tokens", "text", "finish", "stop", "logprobs", "prompt_logprobs"} per sequence] per
        request], "stats": {"steps", "preempted", "cached_tokens", "leaked_blocks"}}.
    """
    engine, core = llm.llm_engine, core_of(llm)
    waiting, step = set(range(len(requests))), 0
    aborts = {str(i): r["abort"] for i, r in enumerate(requests) if r.get("abort") is not None}
    outputs: list[list[Json]] = [[] for _ in requests]
    preempted = cached = 0
    while waiting or engine.has_unfinished_requests():
        for i in sorted(waiting):
            request = requests[i]
            if request.get("step", 0) > step and engine.has_unfinished_requests():
                continue
            waiting.discard(i)
            params = sampling_arguments(request["params"])
            add_request(llm, str(i), request["prompt"], params, priority=request.get("priority", 0))
        for name in [name for name, at in aborts.items() if at <= step]:
            del aborts[name]
            engine.abort_request([name])
        for done in engine.step():
            cached += done.num_cached_tokens or 0
            outputs[int(done.request_id)] = [
                {
                    "tokens": list(o.token_ids),
                    "text": o.text,
                    "finish": o.finish_reason,
                    "stop": o.stop_reason,
                    "logprobs": _logprobs(o.logprobs),
                    "prompt_logprobs": _logprobs(done.prompt_logprobs),
                }
                for o in done.outputs
            ]
        preempted = max(preempted, sum(r.num_preemptions for r in core.scheduler.requests.values()))
        step += 1
    pool = core.scheduler.kv_cache_manager.block_pool
    stats = {
        "steps": step,
        "preempted": preempted,
        "cached_tokens": cached,
        "leaked_blocks": pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(),
    }
    return {"outputs": outputs, "stats": stats}


def sampling_arguments(params: Json) -> Json:
    """Arguments of vLLM's `SamplingParams` from what JSON can hold."""
    from vllm.sampling_params import RepetitionDetectionParams, StructuredOutputsParams

    made = dict(params)
    if "logit_bias" in made:
        made["logit_bias"] = {int(token): bias for token, bias in made["logit_bias"].items()}
    if "structured_outputs" in made:
        made["structured_outputs"] = StructuredOutputsParams(**made["structured_outputs"])
    if "repetition_detection" in made:
        made["repetition_detection"] = RepetitionDetectionParams(**made["repetition_detection"])
    return made


def _logprobs(found: Any) -> list[list[tuple[int, float, int]]] | None:
    """Per position (token, logprob, rank), sampled token first."""
    if found is None:
        return None
    return [[(t, v.logprob, v.rank) for t, v in (position or {}).items()] for position in found]


class ScriptedTrees:
    """Replaces a runner's drafts by trees that hide known continuations in scattered rows."""

    def __init__(self, runner: Any, seed: int, share: float, rest: float = 0.0) -> None:
        """
        Args:
            runner: a `CloverRunner`.
            seed: of the trees' shapes.
            share: how many drafts are replaced; the others stay the head's.
            rest: share of the steps for which nothing is drafted.
        """
        self._known: list[list[list[int]]] = []
        self._rng = random.Random(seed)
        self._runner = runner
        self._share, self._rest = share, rest
        self._original = runner._remember
        runner._remember = self._remember

    def know(self, answers: list[list[list[int]]]) -> None:
        """Hide these from now on.

        Args:
            answers: by request of `drive`, by sequence, its tokens.
        """
        self._known = answers

    def _remember(self, trees: Any, requests: int) -> Any:
        from clover_vllm.tree import Tree

        runner, rng = self._runner, self._rng
        if self._rest and rng.random() < self._rest:
            return self._original({}, requests)
        vocab = runner.model_config.get_vocab_size()
        made: dict[int, Tree] = dict(trees)
        for r in runner.speculation.going:
            if rng.random() >= self._share:
                continue
            name = runner.input_batch.req_ids[r]
            right = rest_of(self._known, name, len(runner.requests[name].output_token_ids))
            nodes = rng.randrange(runner.num_spec_tokens + 1)
            if runner.drafter.options.tree == "chain":  # such an engine masks nothing
                made[r] = Tree.chain(hide_in_chain(rng, right, nodes, vocab))
            else:
                made[r] = Tree(*hide(rng, right, nodes, vocab))
        return self._original(made, requests)


class ScriptedSlots:
    """The same for vLLM's V2 runner, where the trees of a batch lie in tensors.

    Attributes:
        share: how many drafts are replaced from now on; the others stay the head's.
    """

    def __init__(self, runner: Any, seed: int, share: float) -> None:
        """
        Args:
            runner: a `CloverV2Runner`, whose trees may from now on be as deep as they have nodes.
            seed: of the trees' shapes.
            share: how many drafts are replaced; the others stay the head's.
        """
        self._known: list[list[list[int]]] = []
        self._rng = random.Random(seed)
        self._runner = runner
        self.share = share
        self._original = runner.speculator.propose
        runner.speculator.propose = self._propose
        runner.speculator.deepest = runner.num_speculative_steps

    def know(self, answers: list[list[list[int]]]) -> None:
        """As `ScriptedTrees.know`."""
        self._known = answers

    def _propose(self, batch: Any, *args: Any, dummy_run: bool = False, **kwargs: Any) -> Any:
        import torch

        from clover_vllm.tree import ROOT, TreeBatch
        from clover_vllm.tree.batch import PADDING

        drafts = self._original(batch, *args, dummy_run=dummy_run, **kwargs)
        runner, rng = self._runner, self._rng
        chosen = [r for r in range(batch.num_reqs) if rng.random() < self.share]
        if dummy_run or not chosen:
            return drafts
        requests, nodes = drafts.shape
        slots = torch.full((requests,), -1)
        tokens, parents = torch.full((requests, nodes), PADDING), torch.full((requests, nodes), ROOT)
        for r in chosen:
            slots[r] = slot = int(batch.idx_mapping_np[r])
            done = int(runner.req_states.total_len.gpu[slot]) - int(runner.req_states.prompt_len.np[slot])
            right = rest_of(self._known, runner.req_states.index_to_req_id[slot], done)
            count, vocab = rng.randrange(nodes + 1), runner.vocab_size
            if runner.speculator.options.tree == "chain":
                chain = hide_in_chain(rng, right, count, vocab)
                own = chain, list(range(-1, len(chain) - 1))
            else:
                own = hide(rng, right, count, vocab)
            tokens[r, : len(own[0])] = torch.tensor(own[0])
            parents[r, : len(own[1])] = torch.tensor(own[1])
        on_device = (part.to(drafts.device) for part in (slots, tokens, parents))
        slots, tokens, parents = on_device
        runner.trees.put(slots, TreeBatch(tokens, parents, torch.zeros(tokens.shape)), drafts)
        return drafts


def rest_of(known: list[list[list[int]]], request_id: str, done: int) -> list[int]:
    """What a request of `drive` says after `done` tokens, by the name that vLLM gives it: [sequence_]index-random."""
    match = re.match(r"(?:(\d+)_)?(\d+)-", request_id)
    if match is None or int(match[2]) >= len(known):  # not one of `drive`
        return []
    sequences, sequence = known[int(match[2])], int(match[1] or 0)
    return sequences[sequence][done:] if sequence < len(sequences) else []


def hide_in_chain(rng: random.Random, right: list[int], nodes: int, vocab: int) -> list[int]:
    """Some of the right tokens, then random ones: `nodes` in all."""
    good = rng.randrange(min(len(right), nodes) + 1)
    return right[:good] + [rng.randrange(vocab) for _ in range(nodes - good)]


def hide(rng: random.Random, right: list[int], nodes: int, vocab: int) -> tuple[list[int], list[int]]:
    """A random tree of at most `nodes` nodes, on one path of which lie some of the right tokens.

    Returns:
        tokens and parents of its nodes, parents first.
    """
    good = rng.randrange(min(len(right), nodes) + 1)
    plan = [True] * good + [False] * (nodes - good)
    rng.shuffle(plan)
    tokens: list[int] = []
    parents: list[int] = []
    place: dict[tuple[int, int], int] = {}
    tip, done = -1, 0
    for is_right in plan:
        if is_right:
            parent, token = tip, right[done]
        else:
            parent, token = rng.randrange(-1, len(tokens)), rng.randrange(vocab)
        if (parent, token) not in place:
            place[parent, token] = len(tokens)
            tokens.append(token)
            parents.append(parent)
        if is_right:
            tip, done = place[parent, token], done + 1
    return tokens, parents
