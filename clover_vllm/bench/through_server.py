"""Methods through `vllm serve`, loaded by vLLM's own `vllm bench serve`."""

from __future__ import annotations

import gc
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from io import StringIO
from itertools import accumulate
from pathlib import Path
from typing import Any

from clover_vllm.base.errors import UserError
from clover_vllm.bench.loop import Request
from clover_vllm.bench.methods import Method
from clover_vllm.bench.worker import Run
from clover_vllm.launch.server import Server

COUNTERS = {
    "drafts": "vllm:spec_decode_num_drafts_total",
    "draft_tokens": "vllm:spec_decode_num_draft_tokens_total",
    "accepted": "vllm:spec_decode_num_accepted_tokens_total",
}


class BenchServer:
    """A server with one method, stopped (SIGSTOP) while others are loaded; used as a context manager."""

    def __init__(self, method: Method, llm: dict[str, Any]) -> None:
        """
        Args:
            method: how it decodes.
            llm: engine settings, as arguments of vllm.LLM.
        """
        from transformers import AutoTokenizer

        self._model = llm["model"]
        self._tokenizer: Any = AutoTokenizer.from_pretrained(self._model)
        self._server = Server(self._model, method.speculative, _flags(llm))

    def turns(self, requests: Sequence[Request], concurrency: int) -> Iterator[Run]:
        """Load the server, in a single turn: the load generator's clock does not stand still.

        Raises:
            UserError: the load generator failed.
        """
        texts = [self._tokenizer.decode(request["prompt"]) for request in requests]
        self._server.resume()
        try:
            with tempfile.TemporaryDirectory() as folder:
                data = Path(folder) / "prompts.jsonl"
                lengths = [request["params"]["max_tokens"] for request in requests]
                rows = [
                    {"prompt": text, "output_tokens": length}
                    for text, length in zip(texts, lengths, strict=True)
                ]
                data.write_text("".join(json.dumps(row) + "\n" for row in rows))
                run = serve_load(self._server, self._model, data, requests, concurrency)
        finally:
            self._server.pause()
        yield run

    def __enter__(self) -> BenchServer:
        try:
            self._server.wait()
        except BaseException:
            self._server.stop()
            raise
        self._server.pause()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop()


def _flags(llm: dict[str, Any]) -> list[str]:
    # Prompts share the system prompt, and may repeat; offline the prefix cache is emptied before each run.
    flags = ["--no-enable-log-requests", "--no-enable-prefix-caching"]
    for name, value in llm.items():
        flag = f"--{name.replace('_', '-')}"
        if name in ("model", "disable_log_stats"):
            continue
        if isinstance(value, bool):
            flags += [flag] if value else []
        else:
            flags += [flag, str(value)]
    return flags


def serve_load(server: Server, model: str, data: Path, requests: Sequence[Request], concurrency: int) -> Run:
    """One run of `vllm bench serve`, with what vLLM counted meanwhile.

    Speed is that of `steady_part`; counters are those of the whole run.

    Raises:
        UserError: the load generator failed, or requests were not answered.
    """
    temperature, count = requests[0]["params"]["temperature"], len(requests)
    before = server.counters()
    result = data.with_name("result.json")
    flags = [
        "--backend", "openai", "--endpoint", "/v1/completions", "--base-url", server.url,
        "--model", server.name, "--tokenizer", model,
        "--dataset-name", "custom", "--dataset-path", str(data), "--skip-chat-template",
        "--disable-shuffle", "--custom-output-len", "-1", "--num-prompts", str(count),
        "--max-concurrency", str(concurrency), "--temperature", str(temperature), "--disable-tqdm",
        "--save-result", "--save-detailed", "--result-dir", str(data.parent), "--result-filename", result.name,
    ]  # fmt: skip
    if temperature:
        flags += ["--extra-body", json.dumps({"seed": 0})]
    _bench_serve(flags)
    found = json.loads(result.read_text())
    result.unlink()
    if found["completed"] != count:
        raise UserError(f"Only {found['completed']} of {count} requests were answered.")
    after = server.counters()
    run = steady_part(found, concurrency)
    for name, counter in COUNTERS.items():
        setattr(run, name, int(after.get(counter, 0) - before.get(counter, 0)))
    by_depth = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
    depth = 0
    while f"{by_depth}[{depth}]" in after:
        key = f"{by_depth}[{depth}]"
        run.accepted_by_depth.append(int(after[key] - before.get(key, 0)))
        depth += 1
    steps = "vllm:iteration_tokens_total_count"
    run.steps = int(after.get(steps, 0) - before.get(steps, 0)) or 1
    run.ttft = found["ttfts"]
    run.itl = [x for own in found["itls"] for x in own]
    run.tpot = [
        sum(own) / (length - 1)
        for own, length in zip(found["itls"], found["output_lens"], strict=True)
        if length > 1
    ]
    run.outputs = [[ord(c) for c in text] for text in found["generated_texts"]]
    return run


def _bench_serve(flags: list[str]) -> None:
    """`vllm bench serve`, in this process: its own would import vLLM for each run.

    Raises:
        UserError: it failed.
    """
    from vllm.benchmarks.serve import add_cli_args, main
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    with redirect_stdout(StringIO()) as said:
        try:
            main(parser.parse_args(flags))
        except (Exception, SystemExit) as error:
            print("\n".join(said.getvalue().splitlines()[-15:]), file=sys.stderr)
            raise UserError(
                f"vllm bench serve failed ({type(error).__name__}: {error}); its last lines are above."
            ) from error
        finally:
            gc.unfreeze()  # it freezes all that there is, each time


def steady_part(found: dict[str, Any], concurrency: int) -> Run:
    """What happened at the stated concurrency, as far as a load generator can tell.

    The clock starts when as many requests have ended as run at a time, and stops when the first request ends after the
    last has begun: as in `worker.run_requests`, neither the batch that fills nor the one that drains is part of it. Of an
    answer that is cut as large a share of its tokens counts as of its pieces. A step that only decodes is taken to last
    as long as the median of the gaps between pieces; where most steps read prompts too, that is too long.

    Args:
        found: a detailed result of `vllm bench serve`: lists `start_times`, `ttfts`, `itls` (seconds between
            the pieces of an answer), `latencies` and `output_lens`, a value per request.
        concurrency: requests at a time.
    """
    begins = found["start_times"]
    ends = sorted(begin + latency for begin, latency in zip(begins, found["latencies"], strict=True))
    start, stop = ends[concurrency - 1], ends[-concurrency]
    run, tokens = Run(seconds=stop - start), 0.0
    gaps: list[float] = []
    behind = 0.0  # tokens that came with them
    for begin, ttft, itl, count in zip(
        begins, found["ttfts"], found["itls"], found["output_lens"], strict=True
    ):
        pieces = [begin + at for at in accumulate(itl, initial=ttft)]
        tokens += count * sum(start < at <= stop for at in pieces) / len(pieces)
        run.answered += count if start < pieces[0] <= stop else 0
        timed = [gap for gap, at in zip(itl, pieces[1:], strict=True) if start < at <= stop]
        gaps += timed
        behind += (count - 1) * len(timed) / max(1, len(itl))
    run.tokens = round(tokens)
    if gaps:
        run.decode_seconds = statistics.median(gaps)
        run.decode_tokens = concurrency * behind / len(gaps)
    return run
