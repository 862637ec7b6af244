"""Runs requests through vLLM's engine in a process of its own; `engines.run_engine` starts it.

The engine core lives in this process, so that a test may look inside; which requests share a step then
depends on nothing but the requests. Keys of what `main` takes:

    llm: arguments of vllm.LLM.
    requests: see `clover_vllm.check.scripted.drive`; also with "lora": folder of an adapter, and "embeds": a .pt file
        of embeddings that stand for the prompt.
    scripted: {"answers": tokens by request and sequence, "seed": int, "share": of the drafts (1), "rest": share
        of the steps without drafts (0)}: trees are not drafted but hide those answers among random siblings in
        random shapes and sizes.
    restless: seed: adaptive drafting sleeps, wakes and sizes trees at random.
    wrong_scorer: a rule of `wrong_scorers.py` by which drafts are accepted instead.
    check_seams: say how Clover is tied to vLLM.
    check_head: folder of the head: compare all that it computes with the reference model.
    check_trees: folder of a head of any method: compare the trees that it drafts with the reference model's.
    threads: that compute; by default as many as the process has cores.
    check_cache: compare the target's cache rows of finished requests with a prefill of the same tokens.

It returns what `drive` returns, with more statistics; "verified" and "accepted" are of drafts;
"verified_by_request" has [chains, branching trees] by index, and "own_drafts" what the drafter made.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

Json = dict[str, Any]


def main(spec: Json) -> Json:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import torch
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs
    from wrong_scorers import WrongScorer

    from clover_vllm.check.restless import Restless
    from clover_vllm.check.scripted import ScriptedTrees, drive
    from clover_vllm.launch.in_process import runner_of
    from clover_vllm.tree.kinds import SOURCES

    if "threads" in spec:
        torch.set_num_threads(spec["threads"])
    llm = LLM(**{"disable_log_stats": True, **spec["llm"]})
    runner = runner_of(llm)
    scripted = None
    if "scripted" in spec:
        scripted = Remembered(runner)
        share, rest = spec["scripted"].get("share", 1.0), spec["scripted"].get("rest", 0.0)
        ScriptedTrees(runner, spec["scripted"]["seed"], share, rest).know(spec["scripted"]["answers"])
    restless = Restless(runner, spec["restless"]) if "restless" in spec else None
    labels = Labels(runner.speculation) if restless is not None else None
    if "wrong_scorer" in spec:
        WrongScorer(runner, spec["wrong_scorer"])
    probe = CacheProbe(runner, llm.llm_engine) if spec.get("check_cache") else None
    head = HeadProbe(runner, spec["check_head"]) if "check_head" in spec else None
    drafts = TreeProbe(runner, spec["check_trees"]) if "check_trees" in spec else None
    verified = Verified(runner)
    add_lora_and_embeds(llm.llm_engine, spec["requests"])
    result = drive(llm, [{"prompt": [], **request} for request in spec["requests"]])
    stats: Json = result["stats"]
    stats["verified"] = {"chains": verified.chains, "branching": verified.branching}
    stats["verified_by_request"], stats["own_drafts"] = verified.by_request, verified.own
    stats["tokens_before_last_draft"] = verified.before
    stats["emitted_by_last_draft"] = verified.emitted
    stats["accepted_in"] = verified.accepted_in
    stats["off_first_chain"] = verified.off_first_chain
    stats["grown"], stats["in_vain"] = verified.grown, verified.in_vain
    stats["sampled_by"] = verified.sampled_by
    stats["lookahead"] = llm.llm_engine.engine_core.engine_core.scheduler.num_lookahead_tokens
    if hasattr(runner, "counters"):
        stats["accepted"] = float(runner.counters.accepted.sum())
        stats["retrieves"] = runner.speculation.retrieval is not None
    stats["fallbacks"] = fallbacks(runner)
    if restless is not None:
        sizes = len(restless.sizes)
        stats["restless"] = {"slept": restless.slept, "asked": restless.asked, "sizes": sizes}
        stats["labels"] = labels and {"right": labels.right, "wrong": labels.wrong}
        stats["sources"] = {
            "nodes": dict(zip(SOURCES, runner.counters.nodes_of.tolist(), strict=True)),
            "accepted": dict(zip(SOURCES, runner.counters.accepted_of.tolist(), strict=True)),
        }
    stats["compiled"] = not runner.model_config.enforce_eager and runner.compilation_config.mode != 0
    stats["threads"] = torch.get_num_threads()
    stats["hooked"] = hasattr(EngineArgs.create_speculative_config, "clover_original")
    if spec.get("check_seams"):
        stats["seams"] = seams()
    stats["trees"] = scripted and {"nodes": scripted.nodes, "branching": scripted.branching}
    stats["worker"] = type(
        llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    ).__name__
    if head is not None:
        stats["head_errors"], stats["head_rows"] = head.errors, head.rows
    if drafts is not None:
        stats["tree_error"], stats["trees_compared"] = drafts.error, drafts.trees
    if probe is not None:
        stats["cache_error"] = probe.error(llm)
        stats["cache_rows"] = probe.rows
        stats["layouts"] = sorted({layer.isa for layer in probe.layers})
    return result


def seams() -> Json:
    """How Clover is tied to the vLLM of this process: what it replaces, and what the patches let it register."""
    import vllm.config.speculative
    from vllm import SamplingParams
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.worker import cpu_worker

    from clover_vllm.engine import hooks, plugin

    plugin.register()  # harmless if called again
    runner = cpu_worker.CPUModelRunner
    with hooks.making_runner(object):
        changed = cpu_worker.CPUModelRunner is not runner
    replaced = {
        "create_speculative_config": EngineArgs.create_speculative_config,
        "_validate_spec_decode": SamplingParams._validate_spec_decode,
        "num_lookahead_tokens": VllmConfig.num_lookahead_tokens.fget,
    }
    return {
        "replaced": [name for name, one in replaced.items() if hasattr(one, "clover_original")],
        "runner": changed,
        "registered": len(getattr(vllm.config.speculative, "speculative_config_factories", [])),
        "vllm": vllm.__file__,
    }


def fallbacks(runner: Any) -> dict[str, float]:
    """By reason, those that happened."""
    from clover_vllm.engine.metrics import REASONS

    if not hasattr(runner, "counters"):
        return {}
    found = dict(zip(REASONS, runner.counters.fallbacks.tolist(), strict=True))
    return {reason: count for reason, count in found.items() if count}


def add_lora_and_embeds(engine: Any, requests: list[Json]) -> None:
    """Make an engine take these of what `drive` does not know, by the requests' index."""
    import torch
    from vllm.inputs import EmbedsPrompt
    from vllm.lora.request import LoRARequest

    add = engine.add_request

    def add_with_more(name: str, prompt: Any, params: Any, **more: Any) -> None:
        request = requests[int(name)] if name.isdigit() else {}
        if "embeds" in request:
            prompt = EmbedsPrompt(prompt_embeds=torch.load(request["embeds"]))
        if lora := request.get("lora"):
            more["lora_request"] = LoRARequest(lora, len(lora), lora)
        add(name, prompt, params, **more)

    engine.add_request = add_with_more


class Labels:
    """Whether calibration is told the text that followed: what a step accepts of a request's tree begins it.

    Attributes:
        right, wrong: trees with accepted nodes.
    """

    def __init__(self, speculation: Any) -> None:
        self.right = self.wrong = 0
        learn = speculation._learn

        def watched(sizer: Any, done: Any) -> None:
            if speculation._proposed is not None:
                forest, names = speculation._proposed
                outcomes = forest.outcomes

                def heard(said: Any) -> Any:
                    self._compare(done, dict(zip(names, said, strict=True)))
                    return outcomes(said)

                forest.outcomes = heard
            learn(sizer, done)

        speculation._learn = watched

    def _compare(self, done: Any, said: dict[str, Any]) -> None:
        for name, tree, nodes in zip(done.names, done.step.trees, done.step.accepted, strict=True):
            if nodes and said.get(name):
                path = [tree.tokens[node] for node in nodes]
                begins = list(said[name])[: len(path)] == path
                self.right += begins
                self.wrong += not begins


class Remembered:
    """Counts what a runner remembers as drafted.

    Attributes:
        nodes, branching: nodes so far, and trees that were no chains.
    """

    def __init__(self, runner: Any) -> None:
        self.nodes = self.branching = 0
        self._original = runner._remember
        runner._remember = self._remember

    def _remember(self, trees: Any, *args: Any) -> Any:
        self.nodes += sum(map(len, trees.values()))
        self.branching += sum(not tree.is_chain for tree in trees.values())
        return self._original(trees, *args)


class Verified:
    """Counts the drafts of steps as they are verified, and as they are grown.

    Attributes:
        chains, branching: drafts verified, by kind, of all requests.
        by_request: the same two, by the request's index in what `main` takes.
        own: drafts that the drafter made, though scripted ones may have replaced them, by the same index.
        before: output tokens that a request had before its last draft was verified, by the same index.
        emitted: tokens that its last draft gave, by the same index: the accepted ones and the bonus.
        accepted_in: branching trees, and chains, of which something was accepted, by kind.
        off_first_chain: accepted nodes that do not lie on their tree's path of first children.
        in_vain: drafts verified for a request with one token to go.
        grown: drafts grown.
        sampled_by: steps with drafts and without, by who sampled: our scorer, or vLLM's own sampler.
    """

    def __init__(self, runner: Any) -> None:
        self.sampled_by = {f"{who}, {what}": 0 for who in ("scorer", "vllm") for what in ("drafts", "none")}
        self.chains = self.branching = self.in_vain = self.grown = 0
        self.by_request: dict[int, list[int]] = {}
        self.own: Counter[int] = Counter()
        self.before: dict[int, int] = {}
        self.emitted: dict[int, int] = {}
        self.accepted_in = {"chains": 0, "branching": 0}
        self.off_first_chain = 0
        self._runner = runner
        if hasattr(runner, "_step"):
            self._original, self._grow, self._end = runner._step, runner.drafter.grow, runner._end_step
            self._grow_forest = runner.drafter.grow_forest
            runner._step, runner.drafter.grow, runner._end_step = self._step, self.grow, self._end_step
            runner.drafter.grow_forest = self.grow_forest
            self._kept, runner._remember = runner._remember, self._remember
            self._scored, self._score = False, runner.scorer.forward
            runner.scorer.forward = self.score

    def _remember(self, trees: Any, *args: Any) -> Any:
        names = self._runner.input_batch.req_ids
        self.own.update(self._index(names[r]) for r, tree in trees.items() if len(tree))
        return self._kept(trees, *args)

    def score(self, *args: Any) -> Any:
        self._scored = True
        return self._score(*args)

    def _step(self, *args: Any) -> Any:
        step = self._original(*args)
        for r, (name, tree) in enumerate(zip(self._runner.input_batch.req_ids, step.trees, strict=True)):
            if tree is None:
                continue
            self.chains += tree.is_chain
            self.branching += not tree.is_chain
            self.in_vain += step.endings[r].remaining < 2
            index = self._index(name)
            self.by_request.setdefault(index, [0, 0])[not tree.is_chain] += 1
            self.before[index] = len(self._runner.requests[name].output_token_ids)
        return step

    def _end_step(self, step: Any) -> None:
        drafted = any(tree is not None for tree in step.trees)
        self.sampled_by[f"{'scorer' if self._scored else 'vllm'}, {'drafts' if drafted else 'none'}"] += 1
        self._scored = False
        names = self._runner.input_batch.req_ids
        for name, tree, nodes in zip(names, step.trees, step.accepted, strict=True):
            if tree is None:
                continue
            self.emitted[self._index(name)] = len(nodes) + 1
            if nodes:
                self.accepted_in["chains" if tree.is_chain else "branching"] += 1
            self.off_first_chain += len(set(nodes) - first_chain(tree))
        self._end(step)

    def grow(self, g: Any, num_nodes: int) -> Any:
        self.grown += len(g)
        return self._grow(g, num_nodes)

    def grow_forest(self, accepted: Any, asked: Any, *more: Any) -> None:
        self.grown += len(asked)
        self._grow_forest(accepted, asked, *more)

    @staticmethod
    def _index(name: str) -> int:
        """Of a request that vLLM calls [sequence_]index-random."""
        return int(name.rpartition("-")[0].rpartition("_")[2])


def first_chain(tree: Any) -> set[int]:
    """The nodes of a tree's path of first children, which a method without trees would have drafted."""
    found: set[int] = set()
    current = -1
    for node, parent in enumerate(tree.parents):
        if parent == current:
            found.add(node)
            current = node
    return found


class HeadProbe:
    """Compares what vLLM's head computes, step by step, with `clover_vllm.heads.clover2.Clover2DraftModel`.

    Attributes:
        errors: largest difference, relative to the largest value if that is above 1, by what was computed:
            augmenting outputs of a prompt's beginning ("prefill"), of later parts of it ("chunk"), of accepted
            rows ("decode"), and what is drafted from them ("first", "expand").
        rows: compared, by what was computed.
    """

    def __init__(self, runner: Any, folder: str) -> None:
        from clover_vllm.heads.clover2.checkpoint import load_head

        self.runner = runner
        self.reference = load_head(Path(folder)).float()
        self.errors: dict[str, float] = {}
        self.rows: dict[str, int] = {}
        self._hidden: dict[tuple[int, ...], Any] = {}  # by the tokens up to the one behind it
        self._views: dict[int, int] = {}  # by block of the cache, where the view began of whoever wrote it
        self._head = runner.drafter.model
        self._original = {name: getattr(self._head, name) for name in ("forward", "first", "expand")}
        self._draft, self._grow_forest = runner.drafter.draft, runner.drafter.grow_forest
        for name in self._original:
            object.__setattr__(self._head, name, getattr(self, name))
        runner.drafter.draft, runner.drafter.grow_forest = self.draft, self.grow_forest

    def _compare(self, what: str, found: Any, expected: Any) -> None:
        error = float((found - expected).abs().max() / expected.abs().max().clamp(min=1))
        self.errors[what] = max(self.errors.get(what, 0.0), error)
        self.rows[what] = self.rows.get(what, 0) + len(found)

    def draft(self, accepted: Any, *more: Any) -> Any:
        made = self._draft(accepted, *more)
        self._check(accepted)
        return made

    def grow_forest(self, accepted: Any, *more: Any) -> None:
        self._grow_forest(accepted, *more)
        self._check(accepted)

    def _check(self, accepted: Any) -> None:
        import torch

        for i, r in enumerate(accepted.requests):
            request_id = self.runner.input_batch.req_ids[r]
            rows = range(accepted.starts[i], accepted.starts[i + 1])
            positions = accepted.positions[rows.start : rows.stop].tolist()
            state = self.runner.requests[request_id]
            tokens = [*state.prompt_token_ids, *state.output_token_ids]
            for row, p in zip(rows, positions, strict=True):
                self._hidden[tuple(tokens[: p + 2])] = accepted.hidden[row]
            table = self.runner.input_batch.block_table[0]
            first, blocks = accepted.skipped[i] * table.block_size, table.block_table.np[r]
            for p in positions:
                self._views[int(blocks[p // table.block_size])] = first
            count = positions[-1] + 1
            in_view = blocks[accepted.skipped[i] : -(-count // table.block_size)].tolist()
            if {self._views[block] for block in in_view} != {first}:
                continue  # who wrote a shared prefix saw more of it, or less
            own = torch.stack([self._hidden[tuple(tokens[: p + 2])] for p in range(first, count)])
            embeds = self._head.embed(torch.tensor(tokens[first + 1 : count + 1]))
            # At the positions of the whole text: float32 rounds the angles of large ones, the same in both.
            hook = self.reference.rotary.register_forward_pre_hook(
                lambda _, given, by=first: (given[0] + by,)
            )
            expected = self.reference.augment(own[None], embeds[None])[0, positions[0] - first :]
            hook.remove()
            prompt = len(state.prompt_token_ids)
            what = "decode" if positions[-1] >= prompt else "chunk" if positions[0] else "prefill"
            self._compare(what, self._g[rows.start : rows.stop], expected)

    def forward(self, *args: Any) -> Any:
        self._g = self._original["forward"](*args)
        return self._g

    def first(self, g: Any) -> Any:
        found = self._original["first"](g)
        self._check_candidates("first", found, self.reference.first(g))
        return found

    def expand(self, states: Any, tokens: Any) -> Any:
        found = self._original["expand"](states, tokens)
        expected, outputs = self.reference.advance(states, self._head.embed(tokens))
        self._compare("expand", found[0], expected)
        self._check_candidates("expand", found[1:], outputs)
        return found

    def _check_candidates(self, what: str, found: Any, states: Any) -> None:
        """Log-probabilities of the best tokens, and that those tokens have them."""
        import torch

        vocab = self.reference.draft_vocab
        if vocab is None:
            vocab = torch.arange(self.reference.config.vocab_size)
        log_probs = (states @ self._head.embed(vocab).T).log_softmax(-1)
        of_token = torch.full((len(states), self.reference.config.vocab_size), -torch.inf)
        of_token[:, vocab] = log_probs
        best, tokens = found
        self._compare(what, best, log_probs.topk(best.shape[1]).values)
        self._compare(what, best, of_token.gather(1, tokens))


class TreeProbe:
    """Compares the trees of one size that an engine's head drafts with those of its reference model.

    Attributes:
        error: largest difference between probabilities of the same node; 1 where a tree has other nodes.
        trees: compared.
    """

    def __init__(self, runner: Any, folder: str) -> None:
        from clover_vllm.heads.registry import kind_of

        self._runner, self._reference = runner, kind_of(Path(folder)).head_class().load(Path(folder))
        self._hidden: dict[tuple[int, ...], Any] = {}  # by the tokens up to the one behind it
        self._draft = runner.drafter.draft
        runner.drafter.draft = self.draft
        self.error, self.trees = 0.0, 0

    def draft(self, accepted: Any, drafting: Any, *more: Any) -> Any:
        made = self._draft(accepted, drafting, *more)
        texts = {}
        for i, r in enumerate(accepted.requests):
            state = self._runner.requests[self._runner.input_batch.req_ids[r]]
            texts[r] = [*state.prompt_token_ids, *state.output_token_ids]
            for row in range(accepted.starts[i], accepted.starts[i + 1]):
                p = int(accepted.positions[row])
                self._hidden[tuple(texts[r][: p + 2])] = accepted.hidden[row]
        for r, tree in zip(drafting, made, strict=True):
            self._compare(tree, texts[r])
        return made

    def _compare(self, tree: Any, text: list[int]) -> None:
        import torch

        from clover_vllm.heads.base import DraftTables, Prefix
        from clover_vllm.tree import grow_best_first

        drafter = self._runner.drafter
        model, options, nodes = drafter.model, drafter.options, drafter.num_speculative_tokens
        hidden = torch.stack([self._hidden[tuple(text[: p + 2])] for p in range(len(text) - 1)])
        vocab = self._reference.draft_vocab
        embed = model.embed(torch.arange(model.config.vocab_size))
        tables = DraftTables(embed, embed if vocab is None else embed[vocab], vocab)
        prefix = Prefix(hidden, self._runner.model.model.norm(hidden), embed[torch.tensor(text[1:])])
        start = self._reference.drafters(prefix, tables)(torch.tensor([len(hidden) - 1]))
        limits = options.rounds(nodes), options.width(nodes), options.candidates(nodes), options.cutoffs
        (expected,) = grow_best_first(start, nodes, *limits)
        self.trees += 1
        found, known = chances(tree), chances(expected)
        least = min(known.values(), default=0.0)
        for path in found.keys() | known.keys():  # the last nodes may be nearly as likely as those left out
            self.error = max(self.error, abs(found.get(path, least) - known.get(path, least)))


def chances(tree: Any) -> dict[tuple[int, ...], float]:
    """Probability by path of tokens."""
    paths: list[tuple[int, ...]] = []
    for token, parent in zip(tree.tokens, tree.parents, strict=True):
        paths.append((*paths[parent], token) if parent >= 0 else (token,))
    return dict(zip(paths, tree.probabilities, strict=True))


class CacheProbe:
    """Reads the target's key/value rows of running requests, and again after a plain prefill."""

    def __init__(self, runner: Any, engine: Any) -> None:
        self.runner = runner
        self._engine, self._engine_step = engine, engine.step
        engine.step = self._step
        drafts: set[str] = getattr(getattr(runner, "drafter", None), "_draft_attn_layer_names", set())
        context = runner.compilation_config.static_forward_context
        self.layers = [context[name] for name in sorted(context) if name not in drafts]
        self.seen: dict[str, tuple[list[int], Any]] = {}
        self.rows = 0

    def _step(self) -> Any:
        outputs = self._engine_step()
        self.look()
        return outputs

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

        from clover_vllm.attention.cpu.tree_attention import places

        found = []
        for layer in self.layers:
            kv = layer.kv_cache
            n, heads, block, double = kv.shape
            pages = kv.view(n, heads, 2, -1)[torch.tensor(blocks)].transpose(1, 2)
            rows = [
                pages[:, kind][:, :, at].transpose(1, 2).flatten(0, 1)
                for kind, at in enumerate(places(layer.isa, block, double // 2))
            ]
            found.append(torch.stack([own[:count] for own in rows], dim=1))
        return torch.stack(found)

    def error(self, llm: Any) -> float:
        """Largest difference to the rows that a prefill of the same tokens computes, relative to the
        largest value if that is above 1."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        self._engine.step = self._engine_step
        assert llm.reset_prefix_cache(), "rows would be compared with themselves"
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
