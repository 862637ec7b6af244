"""`clover-vllm trees`: the shipped head at work on a few prompts, offline."""

from __future__ import annotations

from typing import Any

import torch
from rich.console import Console
from rich.text import Text
from rich.tree import Tree as Drawing
from transformers import AutoModelForCausalLM, AutoTokenizer

from clover_vllm.base.paths import shipped_head
from clover_vllm.base.show import print_table
from clover_vllm.eval.evaluate import Answer, Evaluator, accepted_nodes, best_first, replay
from clover_vllm.eval.report import Evaluation, table
from clover_vllm.heads.clover2.checkpoint import load_head
from clover_vllm.target.frozen import FrozenTarget
from clover_vllm.target.make import make_target
from clover_vllm.tree import ROOT, Tree

PROMPTS = [
    "Explain in three sentences why the sky is blue.",
    "Write a Python function that returns the n-th Fibonacci number.",
    "A train travels 60 miles in 1.5 hours. What is its average speed?",
    "How do I make a cup of green tea?",
    "Write a short story about a lighthouse keeper.",
    "List five healthy snacks for school children.",
]
"""Written for demonstrations, so in no training set."""

NODES = 8


def show_trees(num_prompts: int, max_tokens: int, steps: int) -> None:
    """Answer prompts with the target, draft along, print both.

    Raises:
        UserError: the target cannot be made.
    """
    console = Console()
    console.print("[bold]1. Target[/bold]  SmolLM2-135M-Instruct (made on first use)")
    folder = make_target("smollm2-135m")
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    target = FrozenTarget(str(folder), torch.bfloat16)
    head = load_head(shipped_head())
    evaluator = Evaluator(target, head)
    console.print(f"[bold]2. Head[/bold]    Clover-2, {_millions(head)} M parameters (shipped)\n")
    prompts = PROMPTS[:num_prompts]
    growth = best_first(NODES)
    replays = []
    for prompt, answer in zip(prompts, _greedy(folder, tokenizer, prompts, max_tokens), strict=True):
        prepared = evaluator.prepare(answer)
        trees, continuation = evaluator.trees(prepared, growth), prepared.continuation.tolist()
        found = replay(trees, continuation, answer.category)
        replays.append(found)
        console.rule(f"[bold]{prompt}")
        console.print(Text(tokenizer.decode(answer.answer_ids, skip_special_tokens=True), style="dim"))
        console.print(
            f"{found.tokens} tokens in {found.steps} steps: "
            f"[bold]{found.tokens_per_step:.2f} tokens per step[/bold]\n"
        )
        _show(console, tokenizer, trees, continuation, answer, steps)
    console.rule("[bold]All prompts")
    print_table(table([Evaluation("shipped Clover-2", growth.name, replays)]))
    console.print(
        "Greedy decoding. A step verifies one tree in one forward of the target; plain decoding "
        "emits 1 token per step."
    )


def _millions(head: torch.nn.Module) -> str:
    return f"{sum(p.numel() for p in head.parameters()) / 1e6:.1f}"


def _greedy(folder: Any, tokenizer: Any, prompts: list[str], max_tokens: int) -> list[Answer]:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    tokenizer.padding_side = "left"
    chats = [[{"role": "user", "content": p}] for p in prompts]
    batch = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**batch, max_new_tokens=max_tokens, do_sample=False)
    answers = []
    for row in range(len(prompts)):
        prompt_ids = batch["input_ids"][row][batch["attention_mask"][row].bool()]
        answer_ids = out[row, batch["input_ids"].shape[1] :]
        ends = (answer_ids == tokenizer.eos_token_id).nonzero()
        if len(ends):
            answer_ids = answer_ids[: int(ends[0]) + 1]
        answers.append(Answer("demo", prompt_ids, answer_ids))
    return answers


def _show(
    console: Console, tokenizer: Any, trees: list[Tree], continuation: list[int], answer: Answer, steps: int
) -> None:
    """Draw the first trees; accepted nodes are green, then what the target added itself."""
    position = 0
    for _ in range(steps):
        if position >= len(continuation):
            return
        tree = trees[position]
        path = accepted_nodes(tree, continuation[position:])
        drawing = Drawing(Text(f"after {tokenizer.decode(answer.answer_ids[position])!r}"))
        branches = {ROOT: drawing}
        for node, (token, parent) in enumerate(zip(tree.tokens, tree.parents, strict=True)):
            label = Text(repr(tokenizer.decode(token)))
            label.append(f"  {tree.probabilities[node]:.0%}", style="dim")
            if node in path:
                label.stylize("bold green")
            branches[node] = branches[parent].add(label)
        console.print(drawing)
        said = continuation[position : position + len(path) + 1]
        console.print(
            f"target said {[tokenizer.decode(t) for t in said]}: "
            f"{len(path)} drafted tokens accepted, then its own\n",
            markup=False,
        )
        position += len(path) + 1
