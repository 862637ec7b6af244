"""`vllm serve` with Clover-2: chat, streaming, stop strings, metrics, and refusals."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from clover_vllm.bench.online import COUNTERS
from clover_vllm.bench.server import Server
from clover_vllm.errors import UserError
from clover_vllm.home import shipped_head

FLAGS = ["--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "8", "--dtype", "float32"]
QUESTIONS = [
    "Why is the sky blue?",
    "Name three fruits.",
    "What is 7 times 8?",
    "Write a haiku about rain.",
    "Who wrote Hamlet?",
    "How do I boil an egg?",
]


@pytest.fixture(scope="module")
def server(smollm2: Path) -> Iterator[Server]:
    with Server(str(smollm2), {"model": str(shipped_head())}, FLAGS, "small") as running:
        running.wait(300)
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none")


def ask(client: OpenAI, question: str, **params: Any) -> Any:
    values = {"temperature": 0, "max_tokens": 48, **params}
    return client.chat.completions.create(
        model="small", messages=[{"role": "user", "content": question}], **values
    )


def test_streamed_text_equals_whole_text_at_any_load(server: Server, client: OpenAI) -> None:
    def streamed(question: str) -> str:
        events = ask(client, question, stream=True)
        return "".join(event.choices[0].delta.content or "" for event in events if event.choices)

    alone = [ask(client, question).choices[0].message.content for question in QUESTIONS]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(streamed, QUESTIONS))
    assert together == alone
    counted = server.counters()
    assert counted[COUNTERS["drafts"]] > 0
    assert 0 < counted[COUNTERS["accepted"]] < counted[COUNTERS["draft_tokens"]]


def test_stop_strings_cut_inside_an_accepted_path(client: OpenAI) -> None:
    whole = ask(client, QUESTIONS[0]).choices[0].message.content
    stop = whole.split()[6]
    cut = ask(client, QUESTIONS[0], stop=[stop]).choices[0]
    assert cut.finish_reason == "stop"
    assert whole.startswith(cut.message.content)
    assert stop not in cut.message.content


def test_several_samples_and_logprobs(client: OpenAI) -> None:
    answer = ask(client, QUESTIONS[1], n=3, temperature=0.8, seed=1, logprobs=True, top_logprobs=2)
    assert len(answer.choices) == 3
    assert sum(len(choice.logprobs.content) for choice in answer.choices) == answer.usage.completion_tokens
    for choice in answer.choices:
        text = "".join(token.token for token in choice.logprobs.content)
        assert text.startswith(choice.message.content)
        assert all(token.logprob <= 0 for token in choice.logprobs.content)


def test_structured_output_is_valid_beside_trees(client: OpenAI) -> None:
    """The request with a grammar gets a chain; the others keep their trees."""
    choices = ["apple", "pear"]
    with ThreadPoolExecutor(4) as pool:
        plain = [pool.submit(ask, client, question) for question in QUESTIONS[2:5]]
        body = {"structured_outputs": {"choice": choices}}
        constrained = pool.submit(ask, client, "Which fruit is red?", extra_body=body)
        assert constrained.result().choices[0].message.content in choices
        assert all(future.result().choices[0].message.content for future in plain)


def test_unknown_options_end_the_start_with_one_sentence(
    smollm2: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    wrong = {"method": "clover2", "model": str(shipped_head()), "draft_deepness": 3}
    with Server(str(smollm2), wrong, FLAGS) as server, pytest.raises(UserError):
        server.wait(300)
    shown = capfd.readouterr().err
    assert "'draft_deepness' does not exist for Clover-2" in shown
    assert "Known options" in shown
