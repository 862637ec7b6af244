"""Runs requests through vLLM's engine in a process of its own: `python run_engine.py SPEC OUT`.

SPEC and OUT are JSON files. The engine core lives in this process, so that a test may look inside;
which requests share a step then depends on nothing but the requests. Keys of SPEC:

    llm: arguments of vllm.LLM.
    requests: [{"prompt": token ids, "params": SamplingParams arguments, "step": arrives before this
        engine step (0), "abort": aborted at this step (never), "lora": folder of an adapter (none),
        "embeds": give the prompt as embeddings of this .pt file (no), "priority": (0)}].
    scripted: {"continuations": {prompt as text: tokens}, "seed": int}: trees are not drafted but hide
        the given continuation among random siblings in random shapes and sizes.
    check_cache: compare the target's cache rows of finished requests with a prefill of the same tokens.

Stats: engine steps, preemptions, prompt tokens found in the prefix cache, cache blocks not given back.

OUT: {"outputs": [[{"tokens", "text", "finish", ...} per sequence] per request], "stats": {...}}.
"""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ["HF_HUB_OFFLINE"] = "1"

Json = dict[str, Any]


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    import torch
    from vllm import LLM, SamplingParams
    from vllm.inputs import EmbedsPrompt, TokensPrompt
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    llm = LLM(**{"disable_log_stats": True, **spec["llm"]})
    engine = llm.llm_engine
    core = engine.engine_core.engine_core
    runner = core.model_executor.driver_worker.worker.model_runner
    if "scripted" in spec:
        script(runner, spec["scripted"])
    probe = CacheProbe(runner) if spec.get("check_cache") else None
    requests, waiting, step = spec["requests"], set(range(len(spec["requests"]))), 0
    aborts = {str(i): r["abort"] for i, r in enumerate(requests) if "abort" in r}
    outputs: list[list[Json]] = [[] for _ in requests]
    preempted = cached = 0
    while waiting or engine.has_unfinished_requests():
        for i in sorted(waiting):
            if requests[i].get("step", 0) <= step or not engine.has_unfinished_requests():
                waiting.discard(i)
                params = dict(requests[i]["params"])
                if "logit_bias" in params:
                    params["logit_bias"] = {int(k): v for k, v in params["logit_bias"].items()}
                if "structured_outputs" in params:
                    params["structured_outputs"] = StructuredOutputsParams(**params["structured_outputs"])
                prompt: Any = TokensPrompt(prompt_token_ids=requests[i]["prompt"])
                if "embeds" in requests[i]:
                    prompt = EmbedsPrompt(prompt_embeds=torch.load(requests[i]["embeds"]))
                lora = requests[i].get("lora")
                engine.add_request(
                    str(i),
                    prompt,
                    SamplingParams(**params, output_kind=RequestOutputKind.FINAL_ONLY),
                    lora_request=LoRARequest(lora, len(lora), lora) if lora else None,
                    priority=requests[i].get("priority", 0),
                )
        due = [i for i, at in aborts.items() if at <= step]
        for i in due:
            del aborts[i]
            engine.abort_request([i])
        for done in engine.step():
            cached += done.num_cached_tokens or 0
            outputs[int(done.request_id)] = [
                {
                    "tokens": list(o.token_ids),
                    "text": o.text,
                    "finish": o.finish_reason,
                    "stop": o.stop_reason,
                    "logprobs": logprobs(o.logprobs),
                    "prompt_logprobs": logprobs(done.prompt_logprobs),
                }
                for o in done.outputs
            ]
        if probe is not None:
            probe.look()
        preempted = max(preempted, sum(r.num_preemptions for r in core.scheduler.requests.values()))
        step += 1
    pool = core.scheduler.kv_cache_manager.block_pool
    free = pool.get_num_free_blocks()
    stats: Json = {
        "steps": step,
        "preempted": preempted,
        "cached_tokens": cached,
        "leaked_blocks": pool.num_gpu_blocks - 1 - free,
        "fallbacks": fallbacks(runner),
        "trees": getattr(runner, "tests_trees", None),
        "worker": type(core.model_executor.driver_worker.worker).__name__,
    }
    if probe is not None:
        stats["cache_error"] = probe.error(llm)
        stats["cache_rows"] = probe.rows
    Path(sys.argv[2]).write_text(json.dumps({"outputs": outputs, "stats": stats}))


def fallbacks(runner: Any) -> dict[str, float]:
    """By reason, those that happened."""
    from clover_vllm.engine.metrics import REASONS

    if not hasattr(runner, "counters"):
        return {}
    found = dict(zip(REASONS, runner.counters.fallbacks.tolist(), strict=True))
    return {reason: count for reason, count in found.items() if count}


def logprobs(found: Any) -> list[list[tuple[int, float, int]]] | None:
    """Per position (token, logprob, rank), sampled token first."""
    if found is None:
        return None
    return [[(t, v.logprob, v.rank) for t, v in (position or {}).items()] for position in found]


def script(runner: Any, wanted: Json) -> None:
    """Replace drafting by trees that hide the right continuation in scattered rows."""
    from clover_vllm.engine.step import RequestTree

    rng = random.Random(wanted["seed"])
    known = {tuple(json.loads(k)): v for k, v in wanted["continuations"].items()}
    vocab = runner.model_config.get_vocab_size()
    runner.tests_trees = {"nodes": 0, "branching": 0}

    def host_trees(trees: Any, drafting: list[int]) -> list[RequestTree]:
        del trees
        made = []
        for r in drafting:
            state = runner.requests[runner.input_batch.req_ids[r]]
            answer = known.get(tuple(state.prompt_token_ids or ()), [])
            nodes = rng.randrange(runner.num_spec_tokens + 1)
            made.append(RequestTree.make(*hide(rng, answer[len(state.output_token_ids) :], nodes, vocab)))
            runner.tests_trees["nodes"] += len(made[-1].tokens)
            runner.tests_trees["branching"] += not made[-1].is_chain
        return made

    runner._host_trees = host_trees


def hide(
    rng: random.Random, right: list[int], nodes: int, vocab: int
) -> tuple[list[int], list[int], list[int]]:
    """A random tree of at most `nodes` nodes, on one path of which lie some of the right tokens."""
    good = rng.randrange(min(len(right), nodes) + 1)
    plan = [True] * good + [False] * (nodes - good)
    rng.shuffle(plan)
    tokens: list[int] = []
    parents: list[int] = []
    depths: list[int] = []
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
            depths.append(1 if parent < 0 else depths[parent] + 1)
        if is_right:
            tip, done = place[parent, token], done + 1
    return tokens, parents, depths


class CacheProbe:
    """Reads the target's key/value rows of running requests, and again after a plain prefill."""

    def __init__(self, runner: Any) -> None:
        self.runner = runner
        drafts = getattr(getattr(runner, "drafter", None), "_draft_attn_layer_names", set())
        context = runner.compilation_config.static_forward_context
        self.layers = [context[name] for name in sorted(context) if name not in drafts]
        self.seen: dict[str, tuple[list[int], Any]] = {}
        self.rows = 0

    def look(self) -> None:
        """Remember each running request's tokens and cached rows, as of now."""
        for request_id, state in self.runner.requests.items():
            if request_id in self.runner.input_batch.req_id_to_index:
                tokens = [*state.prompt_token_ids, *state.output_token_ids]
                if state.output_token_ids:
                    cached = tokens[:-1]  # the last token's row is computed in the next step
                    self.seen[request_id] = (cached, self.read(state.block_ids[0], len(cached)))

    def read(self, blocks: list[int], count: int) -> Any:
        """[layers, count, 2, kv heads, D]."""
        import torch

        found = []
        for layer in self.layers:
            kv = layer.kv_cache
            n, heads, block, double = kv.shape
            pages = kv.view(n, heads, 2, -1)[torch.tensor(blocks)]
            keys = pages[:, :, 0].unflatten(-1, (double // 2, block)).permute(0, 3, 1, 2).flatten(0, 1)
            values = pages[:, :, 1].unflatten(-1, (block, double // 2)).permute(0, 2, 1, 3).flatten(0, 1)
            found.append(torch.stack([keys[:count], values[:count]], dim=1))
        return torch.stack(found)

    def error(self, llm: Any) -> float:
        """Largest difference to the rows that a prefill of the same tokens computes, relative to the
        largest value if that is above 1."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        seen, self.seen, worst = self.seen, {}, 0.0
        for request_id, (tokens, rows) in seen.items():
            name = f"again-{request_id}"
            llm.llm_engine.add_request(
                name, TokensPrompt(prompt_token_ids=tokens), SamplingParams(temperature=0, max_tokens=2)
            )
            again = None
            while llm.llm_engine.has_unfinished_requests():
                llm.llm_engine.step()
                state = next((s for k, s in self.runner.requests.items() if k.startswith(name)), None)
                if state is not None and state.output_token_ids and again is None:
                    again = self.read(state.block_ids[0], len(tokens))
            assert again is not None
            worst = max(worst, float((rows - again).abs().max() / again.abs().max().clamp(min=1)))
            self.rows += len(tokens)
        return worst


if __name__ == "__main__":
    main()
