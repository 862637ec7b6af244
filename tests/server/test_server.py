"""`vllm serve` with Clover-2: chat, streaming, stop strings, metrics, and refusals."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from compared import assert_compared
from length import length
from openai import APIError, OpenAI
from typer.testing import CliRunner
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
from watched import ForkedServer, WatchedServer

from clover_vllm.base.paths import shipped_head
from clover_vllm.bench import through_server
from clover_vllm.bench.through_server import COUNTERS
from clover_vllm.cli import app
from clover_vllm.launch.server import Server

FLAGS = ["--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "8", "--dtype", "float32"]
FLAGS += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
QUESTIONS = [
    "Why is the sky blue?",
    "Name three fruits.",
    "What is 7 times 8?",
    "Write a haiku about rain.",
    "Who wrote Hamlet?",
    "How do I boil an egg?",
]


@pytest.fixture(scope="module")
def started(smollm2: Path) -> Iterator[WatchedServer]:
    with ForkedServer(str(smollm2), {"model": str(shipped_head())}, FLAGS, "small") as running:
        running.wait(600)
        running.pause()
        yield running


@pytest.fixture
def server(started: Server) -> Iterator[Server]:
    """With trees, asleep between tests: idle servers use a core too."""
    with awake(started):
        yield started


@pytest.fixture(scope="module")
def plain_server(smollm2: Path, started: Server) -> Iterator[Server]:
    """Plain vLLM with the same flags, asleep where it is not asked."""
    del started
    with ForkedServer(str(smollm2), None, FLAGS, "small") as running:
        running.wait(600)
        running.pause()
        yield running


@contextmanager
def awake(server: Server) -> Iterator[None]:
    server.resume()
    try:
        yield
    finally:
        server.pause()


@pytest.fixture
def client(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none")


def ask(client: OpenAI, question: str, **params: Any) -> Any:
    values = {"temperature": 0, "max_tokens": 48, **params}
    return client.chat.completions.create(
        model="small", messages=[{"role": "user", "content": question}], **values
    )


@pytest.mark.parametrize(
    "params", [{}, {"temperature": 0.7, "top_p": 0.9, "seed": 3}], ids=["greedy", "seeded"]
)
def test_streamed_text_equals_that_of_plain_vllm(
    server: Server, plain_server: Server, client: OpenAI, params: dict[str, Any]
) -> None:
    """Whole from plain vLLM, one request at a time; streamed from trees, all at once."""

    def streamed(question: str) -> str:
        events = ask(client, question, stream=True, **params)
        return "".join(event.choices[0].delta.content or "" for event in events if event.choices)

    plain = OpenAI(base_url=f"{plain_server.url}/v1", api_key="none")
    with awake(plain_server):
        alone = [ask(plain, question, **params).choices[0].message.content for question in QUESTIONS]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(streamed, QUESTIONS))
    assert together == alone
    counted = server.counters()
    assert counted[COUNTERS["drafts"]] > 0
    assert 0 < counted[COUNTERS["accepted"]] < counted[COUNTERS["draft_tokens"]]


def test_stop_strings_cut_where_they_first_occur(server: Server, client: OpenAI) -> None:
    """Once at each word of an answer, up to where the word first occurs: most lie behind accepted drafts, and
    `test_stops_lie_inside_accepted_paths` of the engine's tests has those with accepted drafts behind them."""
    whole = ask(client, QUESTIONS[0]).choices[0].message.content
    words = list(dict.fromkeys(whole.split()))[3:13]
    before = server.counters()
    with ThreadPoolExecutor(5) as pool:
        cuts = list(pool.map(lambda word: ask(client, QUESTIONS[0], stop=[word]).choices[0], words))
    after = server.counters()
    for word, cut in zip(words, cuts, strict=True):
        assert cut.finish_reason == "stop"
        assert cut.message.content == whole[: whole.index(word)]
    accepted, drafts = (
        after[name] - before[name] for name in ("clover:accepted_depth_total", "clover:tree_nodes_count")
    )
    assert drafts > 0
    assert accepted > 0


def test_several_samples_and_logprobs(client: OpenAI) -> None:
    answer = ask(client, QUESTIONS[1], n=3, temperature=0.8, seed=1, logprobs=True, top_logprobs=2)
    assert len(answer.choices) == 3
    assert sum(len(choice.logprobs.content) for choice in answer.choices) == answer.usage.completion_tokens
    for choice in answer.choices:
        text = "".join(token.token for token in choice.logprobs.content)
        assert text.startswith(choice.message.content)
        assert all(token.logprob <= 0 for token in choice.logprobs.content)


def test_beam_search_equals_that_of_plain_vllm(server: Server, plain_server: Server, client: OpenAI) -> None:
    """Beams ask for one token at a time, so nothing is drafted for them; other requests keep their trees."""
    beams = {"n": 3, "max_tokens": 10, "extra_body": {"use_beam_search": True}}
    plain = OpenAI(base_url=f"{plain_server.url}/v1", api_key="none")
    with awake(plain_server):
        alone = ask(plain, QUESTIONS[0], **beams)
    before = server.counters()
    undisturbed = ask(client, QUESTIONS[0], **beams)
    after = server.counters()
    drafts, requests = COUNTERS["drafts"], "vllm:request_success_total"
    assert after[drafts] == before[drafts]
    assert after[requests] - before[requests] > 2 * 10  # several beams for each of the ten tokens
    for _ in range(5):  # how much is drafted depends on what other requests have found out
        with ThreadPoolExecutor(3) as pool:
            others = [pool.submit(ask, client, question) for question in QUESTIONS[1:3]]
            found = ask(client, QUESTIONS[0], **beams)
            assert all(other.result().choices[0].message.content for other in others)
        if server.counters()[drafts] > after[drafts]:
            break
    assert server.counters()[drafts] > after[drafts]
    texts = [[choice.message.content for choice in answer.choices] for answer in (found, undisturbed, alone)]
    assert texts[0] == texts[1] == texts[2]
    assert len(set(texts[0])) == 3


def test_streamed_tool_call_equals_that_of_plain_vllm(
    server: Server, plain_server: Server, client: OpenAI
) -> None:
    """With drafts several tokens of the arguments come at once."""
    parameters = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "days": {"type": "integer"}},
        "required": ["city", "days"],
    }
    tool = {
        "type": "function",
        "function": {"name": "forecast", "parameters": parameters, "strict": True},
    }
    wanted = {"type": "function", "function": {"name": "forecast"}}
    asked = {"tools": [tool], "tool_choice": wanted, "max_tokens": 200}

    def streamed(asker: OpenAI) -> tuple[str, str, int, int]:
        """The tool's name, its arguments, in how many pieces those came, and of how many tokens."""
        options = {"include_usage": True}
        events = list(ask(asker, "Will it rain in Paris?", stream=True, stream_options=options, **asked))
        usage = next(event.usage for event in reversed(events) if event.usage)
        deltas = [call for e in events if e.choices for call in e.choices[0].delta.tool_calls or []]
        parts = [delta.function for delta in deltas if delta.function]
        pieces = [part.arguments for part in parts if part.arguments]
        name = "".join(part.name or "" for part in parts)
        return name, "".join(pieces), len(pieces), usage.completion_tokens

    with awake(plain_server):
        plain = streamed(OpenAI(base_url=f"{plain_server.url}/v1", api_key="none"))
    before = server.counters()[COUNTERS["accepted"]]
    for _ in range(5):  # one may find drafting asleep
        drafted = streamed(client)
        assert drafted[:2] == plain[:2]
        if server.counters()[COUNTERS["accepted"]] > before:
            break
    assert server.counters()[COUNTERS["accepted"]] > before
    assert 1 < drafted[2] < drafted[3]
    assert plain[0] == "forecast"
    assert json.loads(plain[1]).keys() == {"city", "days"}


def test_bench_loads_servers(
    server: Server, plain_server: Server, smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`clover-vllm bench --server`, which loads them by vLLM's own `vllm bench serve`; these run already."""
    started: list[list[str]] = []

    class Running:
        def __init__(self, model: str, speculative: dict[str, Any] | None, flags: list[str]) -> None:
            assert Path(model) == smollm2
            started.append(
                [model, *flags, *(["--speculative-config", json.dumps(speculative)] * bool(speculative))]
            )
            self._server = server if speculative else plain_server

        def __getattr__(self, name: str) -> Any:
            return getattr(self._server, name)

        def wait(self) -> None: ...

        def stop(self) -> None: ...

    monkeypatch.setattr(through_server, "Server", Running)
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "out"
    prompts.write_text("".join(json.dumps({"prompt": question}) + "\n" for question in QUESTIONS))
    command = [
        "bench",
        "--server",
        "--target",
        str(smollm2),
        "--prompts",
        str(prompts),
        "--methods",
        "clover",
    ]
    command += ["--concurrency", "2", "--repetitions", "1", "--num-prompts", "5", "--max-tokens", "12"]
    done = CliRunner().invoke(
        app, [*command, "--dtype", "float32", "--enforce-eager", "--output", str(output)]
    )
    assert done.exit_code == 0, done.output
    assert_compared(output)
    parser = make_arg_parser(FlexibleArgumentParser())
    asked = [parser.parse_args(arguments) for arguments in started]
    assert [args.speculative_config and args.speculative_config["method"] for args in asked] == [
        None,
        "clover2",
    ]
    assert all(args.enforce_eager and args.enable_prefix_caching is False for args in asked)
    assert {(args.dtype, args.max_num_seqs) for args in asked} == {("float32", 2)}


def test_structured_output_is_valid_beside_other_requests(client: OpenAI) -> None:
    """Who gets a chain and who a tree: `tests/engine/test_features.py`."""
    choices = ["apple", "pear"]
    with ThreadPoolExecutor(4) as pool:
        plain = [pool.submit(ask, client, question) for question in QUESTIONS[2:5]]
        body = {"structured_outputs": {"choice": choices}}
        constrained = pool.submit(ask, client, "Which fruit is red?", extra_body=body)
        assert constrained.result().choices[0].message.content in choices
        assert all(future.result().choices[0].message.content for future in plain)


def test_metrics_of_trees(server: Server, client: OpenAI) -> None:
    """vLLM's own say nodes and accepted tokens, ours what only a tree has."""
    before = server.counters()
    ask(client, QUESTIONS[0])
    found = {name: value - before.get(name, 0.0) for name, value in server.counters().items()}
    drafts = found[COUNTERS["drafts"]]
    # vLLM's scheduler leaves out a step in which a request ended before it heard of it.
    assert 0 < drafts <= found["clover:tree_nodes_count"] <= drafts + 1
    assert found["clover:tree_nodes_sum"] == pytest.approx(found[COUNTERS["draft_tokens"]], abs=16)
    assert found["clover:accepted_depth_total"] == pytest.approx(found[COUNTERS["accepted"]], abs=16)
    assert drafts <= found["clover:drafted_depth_total"] <= found["clover:tree_nodes_sum"]
    assert 0 < found["clover:first_node_accepted_total"] <= drafts
    assert 0 < found["clover:promised_tokens_total"] <= found["clover:tree_nodes_sum"]
    assert 0.2 < found["clover:promised_tokens_total"] / found[COUNTERS["accepted"]] < 5
    assert found["clover:step_seconds_total"] > 0
    assert "clover:fallbacks_total" in found


def test_the_dashboard_and_alerts_ask_for_metrics_that_exist(server: Server) -> None:
    serving = Path(__file__).parents[2] / "serving"
    text = "".join((serving / part).read_text() for part in ("grafana/clover.json", "prometheus/alerts.yml"))
    names = set(re.findall(r"\b(?:vllm|clover):\w+|\bprocess_start_\w+", text))
    assert len(names) > 10
    assert names <= server.counters().keys()


def broken_requests(rng: random.Random, count: int) -> list[tuple[str, str, bytes]]:
    """Method, path and body of requests that no server should answer as if they were good."""
    chat: dict[str, Any] = {
        "model": "small",
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 8,
    }
    changes: list[dict[str, Any]] = [
        {"messages": []},
        {"messages": "Hi"},
        {"messages": [{"role": "nobody", "content": 5}]},
        {"messages": [{"role": "user", "content": "word " * 3000}]},
        {"model": "large"},
        {"max_tokens": -3},
        {"max_tokens": "many"},
        {"max_tokens": 10**9},
        {"temperature": -1},
        {"temperature": "hot"},
        {"top_p": 3},
        {"top_k": -7},
        {"min_p": 9},
        {"n": 0},
        {"n": 10**6},
        {"seed": "x"},
        {"logprobs": True, "top_logprobs": 5000},
        {"logit_bias": {"9999999": 3}},
        {"logit_bias": {"x": 3}},
        {"stop": [""] * 3},
        {"stop_token_ids": ["a"]},
        {"bad_words": [7]},
        {"allowed_token_ids": [10**8]},
        {"allowed_token_ids": []},
        {"response_format": {"type": "json_schema"}},
        {"structured_outputs": {"regex": "(((("}},
        {"structured_outputs": {"json": {"type": "no such type"}}},
        {"structured_outputs": {"choice": []}},
        {"structured_outputs": {"grammar": "root ::= "}},
        {"structured_outputs": {"regex": "a", "choice": ["b"]}},
        {"presence_penalty": 77},
        {"repetition_penalty": 0},
        {"min_tokens": 99},
        {"priority": "first"},
        {"tools": [{"type": "hammer"}]},
        {"prompt_logprobs": -5},
        {"truncate_prompt_tokens": -9},
        {"stream": "perhaps"},
    ]
    raw = [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"model": ' * 500, b"x" * 100_000]
    found = []
    for _ in range(count):
        kind = rng.random()
        if kind < 0.75:
            body = json.dumps(chat | rng.choice(changes)).encode()
            found.append(("POST", "/v1/chat/completions", body))
        elif kind < 0.9:
            found.append(("POST", rng.choice(["/v1/chat/completions", "/v1/completions"]), rng.choice(raw)))
        else:
            method, path = rng.choice(
                [("GET", "/v1/chat/completions"), ("DELETE", "/v1/models"), ("POST", "/no/such/path")]
            )
            found.append((method, path, b"{}"))
    return found


def hang_up(server: Server, body: dict[str, Any]) -> None:
    """Start a stream and leave in the middle of it."""
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=60) as answer:
        for _ in zip(range(4), answer.iter_lines(), strict=False):
            pass


@pytest.mark.timeout(900)
def test_broken_requests_leave_good_ones_alone(server: Server, plain_server: Server, client: OpenAI) -> None:
    """Each gets the status that plain vLLM gives it; clients that leave free their cache blocks."""
    alone = [ask(client, question).choices[0].message.content for question in QUESTIONS]
    broken = broken_requests(random.Random(0), length(60, 200))
    story = {
        "model": "small",
        "messages": [{"role": "user", "content": "Tell a long story."}],
        "stream": True,
    }

    def send(to: Server, request: tuple[str, str, bytes]) -> int:
        method, path, body = request
        headers = {"Content-Type": "application/json"}
        return httpx.request(method, to.url + path, content=body, headers=headers, timeout=120).status_code

    # vLLM's engine compiles all grammars with the library that the first one needs: the same one in both.
    first = {"structured_outputs": {"choice": ["a"]}, "messages": [{"role": "user", "content": "Hi"}]}
    choice = ("POST", "/v1/chat/completions", json.dumps({"model": "small", **first}).encode())
    assert send(server, choice) == 200
    with ThreadPoolExecutor(8) as pool:
        bad = [pool.submit(send, server, request) for request in broken]
        left = [pool.submit(hang_up, server, {**story, "max_tokens": 400}) for _ in range(6)]
        good = [pool.submit(ask, client, question) for question in QUESTIONS * 3]
        statuses = [future.result() for future in bad]
        for future in left:
            future.result()
        answers = [future.result().choices[0].message.content for future in good]
    assert answers == alone * 3
    with awake(plain_server):
        assert send(plain_server, choice) == 200
        expected = [send(plain_server, request) for request in broken]
    unlike = [
        (status, wanted, request)
        for status, wanted, request in zip(statuses, expected, broken, strict=True)
        if status != wanted
    ]
    assert not unlike
    assert sum(400 <= status < 500 for status in statuses) > 0.75 * len(broken)
    until = time.monotonic() + 60
    while server.counters()["vllm:num_requests_running"] and time.monotonic() < until:
        time.sleep(0.2)
    found = server.counters()
    assert found["vllm:num_requests_running"] == 0
    assert found["vllm:kv_cache_usage_perc"] == 0


def test_a_killed_engine_ends_the_server(started: WatchedServer) -> None:
    """With vLLM's own error, soon, and without a hang. The last test of the file: the server is gone behind it."""
    started.resume()
    engines = [
        child for child in psutil.Process(started.pid).children() if child.children()
    ]  # with its worker
    assert len(engines) == 1
    client = OpenAI(base_url=f"{started.url}/v1", api_key="none", max_retries=0, timeout=60)
    stream = client.chat.completions.create(
        model="small",
        messages=[{"role": "user", "content": "Tell a long story."}],
        max_tokens=900,
        stream=True,
    )
    assert next(stream)
    engines[0].kill()
    with pytest.raises(APIError):
        list(stream)
    assert started.ended(60)
    engines[0].wait(10)
    assert "EngineDeadError" in started.log()
