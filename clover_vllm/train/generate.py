"""`clover-vllm data`: the target's own answers, generated with vLLM under continuous batching.

The prompts are dealt into shards of fixed size. A shard is generated in one go, from an empty
prefix cache and with a seed per request, and written through a rename. The engine runs in this
process, so that which requests share a step does not depend on timing. So a kill costs at most one
shard, and a resumed run gives the shards that an unbroken one would have given. The price is an engine that
empties at the end of a shard: in bfloat16 answers depend on what shares their steps, so shards must not. Larger
shards lose less, and so does one engine per processor or GPU (`cluster.generation`), which share the shards.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from clover_vllm.base.errors import UserError
from clover_vllm.base.files import (
    check_same_settings,
    expand,
    files_key,
    make_folder,
    open_text,
    peak_memory_gib,
    whole_file,
    write_json,
)
from clover_vllm.base.progress import Work
from clover_vllm.base.prompts import Prompt, read_prompts, token_ids
from clover_vllm.launch.in_process import add_request, until_idle
from clover_vllm.target.frozen import check_loadable
from clover_vllm.train.settings import DataSettings
from clover_vllm.train.tasks import Exchange, make_tasks


@dataclass(frozen=True)
class _Request:
    prompt: Prompt
    prompt_ids: list[int]
    temperature: float
    seed: int


Write = Callable[[DataSettings, Mapping[Path, Sequence["_Request"]]], Iterator[tuple[int, int]]]
"""Writes shards, in any order, until `seconds` are over. Gives numbers of new answers and of their tokens as they come;
first, where it can tell that engines run, zeros."""


def generate(settings: DataSettings, write: Write | None = None) -> dict[str, Any]:
    """Generate what is missing.

    Args:
        settings: what is asked for.
        write: how shards are written; by default by one engine in this process.

    Returns:
        the summary, also written to `output/summary.json`.

    Raises:
        UserError: anything that the user can mend, before the engine starts where possible.
    """
    _check(settings)
    engine_options(settings.flags)  # refuses what is wrong
    every = read_prompts(settings.prompts)
    prompts = [p for p in every if p.held_out == settings.held_out]
    selected = len(prompts)
    prompts = prompts[settings.skip :]
    if settings.limit is not None:
        prompts = prompts[: settings.limit]
    if not prompts:
        which = "held out (about 1 in 50 is)" if settings.held_out else "not held out"
        raise UserError(
            f"No prompt is left: of {len(every)} read, {selected} are {which}, and --skip is {settings.skip}."
        )
    tokenizer = check_loadable(settings.target)
    if settings.tasks:
        prompts += make_tasks(
            prompts, _exchanges(settings, tokenizer, prompts), settings.tasks, settings.seed
        )
    requests, too_long = _requests(settings, tokenizer, prompts)
    fields = _plain(settings)
    for name in ("output", "seconds", "ray", "replicas", "replica_cpus", "replica_gpus"):
        del fields[name]
    make_folder(settings.output)
    stamp = settings.output / "settings.json"
    if not any(settings.output.glob("answers-*.jsonl.gz")):
        stamp.unlink(missing_ok=True)  # left by a start that failed
    contents: dict[str, Any] = {
        "prompts": files_key(settings.prompts),
        "task_answers": settings.task_answers and files_key(settings.task_answers),
    }
    check_same_settings(stamp, fields | contents)
    for stale in settings.output.glob(".answers-*.tmp"):
        stale.unlink()
    shards = [
        (settings.output / f"answers-{start // settings.shard_size:05d}.jsonl.gz", start)
        for start in range(0, len(requests), settings.shard_size)
    ]
    parts = {path: requests[start : start + settings.shard_size] for path, start in shards}
    missing = {path: part for path, part in parts.items() if not _is_whole(path, len(part))}
    summary: dict[str, Any] = {
        "prompts_read": len(every),
        "prompts_held_out" if not settings.held_out else "prompts_not_held_out": len(every) - selected,
        "shards": len(shards),
        "shards_generated_now": len(missing),
        "prompts_too_long": too_long,
    }
    if missing:
        summary |= _run(settings, missing, write or _write_here)
    summary |= _totals(path for path in parts if path.exists())
    write_json(settings.output / "summary.json", summary | {"settings": _plain(settings)})
    return summary


def _check(settings: DataSettings) -> None:
    if not 0 <= settings.greedy_share <= 1:
        raise UserError(f"--greedy-share {settings.greedy_share} must lie between 0 and 1.")
    if not 0 < settings.min_temperature <= settings.max_temperature <= 2:
        raise UserError("--min-temperature and --max-temperature must satisfy 0 < min <= max <= 2.")
    for name in ("max_tokens", "shard_size", "max_num_seqs", "limit"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value} must be 1 or more.")
    if settings.dtype not in ("auto", "bfloat16", "float16", "float32"):
        raise UserError(f"--dtype {settings.dtype} is not known; use auto, bfloat16, float16 or float32.")
    if settings.skip < 0:
        raise UserError(f"--skip {settings.skip} must not be negative.")
    if settings.max_tokens >= settings.max_model_len:
        raise UserError("--max-tokens leaves no room for a prompt within --max-model-len.")
    if settings.held_out and settings.tasks:
        raise UserError("--tasks makes nothing from held-out prompts; leave out --held-out or --tasks.")
    if settings.task_answers and not settings.tasks:
        raise UserError("--task-answers is read for --tasks only; give --tasks too, or leave it out.")


def _plain(settings: DataSettings) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(settings), default=str))  # type: ignore[no-any-return]


def _requests(settings: DataSettings, tokenizer: Any, prompts: list[Prompt]) -> tuple[list[_Request], int]:
    """Tokenise all prompts before the engine starts; those that leave no room are left out.

    Returns:
        requests, and how many prompts were too long.
    """
    longest = settings.max_model_len - settings.max_tokens
    requests: list[_Request] = []
    for prompt in prompts:
        ids = token_ids(prompt, tokenizer)
        if len(ids) <= longest:
            requests.append(_request(settings, prompt, ids))
    if not requests:
        raise UserError(
            f"Every prompt is longer than the {longest} tokens that --max-model-len leaves beside "
            "--max-tokens."
        )
    return requests, len(prompts) - len(requests)


def _exchanges(settings: DataSettings, tokenizer: Any, prompts: list[Prompt]) -> list[Exchange]:
    """The prompts that `task_answers` answers, with their answers as text.

    Raises:
        UserError: a line is no answer (names it).
    """
    if not settings.task_answers:
        return []
    known = {tuple(token_ids(prompt, tokenizer)): prompt for prompt in prompts}
    found: list[Exchange] = []
    for file in expand(settings.task_answers):
        for number, line in enumerate(open_text(file), 1):
            try:
                row = json.loads(line)
                prompt, ids, finish = known.get(tuple(row["prompt_ids"])), row["answer_ids"], row["finish"]
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{file}, line {number}: not an answer of `clover-vllm data`.") from error
            if prompt is not None and finish == "stop":
                found.append(Exchange(prompt, tokenizer.decode(ids, skip_special_tokens=True)))
    return found


def _run(settings: DataSettings, missing: dict[Path, list[_Request]], write: Write) -> dict[str, Any]:
    Console(stderr=True).print("Starting vLLM; this takes up to a minute.")
    coming = write(settings, missing)
    next(coming)
    started, tokens = time.monotonic(), 0
    with Work("answers", sum(map(len, missing.values()))) as work:
        for answers, new in coming:
            tokens += new
            work.doing(f"{tokens / (time.monotonic() - started):,.0f} tokens/s")
            work.advance(answers)
    seconds = time.monotonic() - started
    return {
        "tokens_per_second": round(tokens / seconds, 1),
        "seconds_of_last_start": round(seconds, 1),
        "peak_memory_gib": round(_peak_memory_with_children(), 2),
    }


def _write_here(
    settings: DataSettings, missing: Mapping[Path, Sequence[_Request]]
) -> Iterator[tuple[int, int]]:
    writer = ShardWriter(settings)
    yield 0, 0
    started = time.monotonic()
    for path, requests in missing.items():
        if settings.seconds is not None and time.monotonic() - started > settings.seconds:
            break
        yield from writer.write(path, requests)


class ShardWriter:
    """An engine that answers whole shards and writes them."""

    def __init__(self, settings: DataSettings) -> None:
        """
        Raises:
            UserError: vLLM refuses the target or the options.
        """
        ours = {
            "max_num_seqs": settings.max_num_seqs,
            "max_model_len": settings.max_model_len,
            "dtype": settings.dtype,
            # vLLM 0.32 on CPU dies of a seeded request whose prompt is prefilled in chunks ("CPU
            # Generator does not use offset"), so prompts stay whole.
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(settings.max_model_len, 4096),
        }
        self._engine = start_engine(settings.target, **{**ours, **engine_options(settings.flags)})
        self._max_tokens = settings.max_tokens

    def write(self, path: Path, requests: Sequence[_Request]) -> Iterator[tuple[int, int]]:
        """One shard, from an empty prefix cache, so that it does not depend on the shards before; written at the end.

        Returns:
            one answer after the other, as `Write` counts them.

        Raises:
            UserError: it cannot be written.
        """
        lines: dict[int, dict[str, Any]] = {}
        for index, completion in _complete(self._engine, requests, self._max_tokens):
            lines[index] = _line(requests[index], completion)
            yield 1, len(completion.token_ids)
        _write_shard(path, [lines[i] for i in range(len(requests))])


def engine_options(flags: Sequence[str]) -> dict[str, Any]:
    """Arguments of vllm.LLM by flags of `vllm serve`; ends the command as argparse does where they are wrong.

    Raises:
        UserError: they name another target.
    """
    if not flags:
        return {}
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(prog="clover-vllm data"))
    usual, given = vars(parser.parse_args([])), vars(parser.parse_args(list(flags)))
    changed = {name: value for name, value in given.items() if value != usual[name]}
    if "model" in changed:
        raise UserError("--model is not taken here; --target names the model.")
    return changed


def start_engine(target: str, **options: Any) -> Any:
    """A vLLM engine whose core runs in this process, with the settings of `engine.environment`.

    Raises:
        UserError: vLLM refuses the target or the options.
    """
    from clover_vllm.launch.environment import prepare

    prepare()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM

    try:
        return LLM(
            model=target,
            disable_log_stats=True,
            **({"enable_prefix_caching": True} | options),
        )
    except (ValueError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"vLLM does not start with target {target} ({reason}).") from error


def _request(settings: DataSettings, prompt: Prompt, ids: list[int]) -> _Request:
    digest = hashlib.sha256(f"{settings.seed} {prompt.text}".encode()).digest()
    greedy, share, seed = (int.from_bytes(digest[i : i + 4], "little") / 2**32 for i in (0, 4, 8))
    temperature = 0.0
    if greedy >= settings.greedy_share:
        span = settings.max_temperature - settings.min_temperature
        temperature = round(settings.min_temperature + share * span, 2)
    return _Request(prompt, ids, temperature, int(seed * 2**31))


def _complete(llm: Any, requests: Sequence[_Request], max_tokens: int) -> Iterator[tuple[int, Any]]:
    """Run requests together; yields (index, completion) as they finish."""
    llm.reset_prefix_cache()
    for index, request in enumerate(requests):
        params = {
            "temperature": request.temperature,
            "seed": request.seed,
            "max_tokens": max_tokens,
            "detokenize": False,
        }
        add_request(llm, str(index), request.prompt_ids, params)
    for output in until_idle(llm):
        if output.finished:
            yield int(output.request_id), output.outputs[0]


def _line(request: _Request, completion: Any) -> dict[str, Any]:
    return {
        "source": request.prompt.source,
        "temperature": request.temperature,
        "prompt_ids": request.prompt_ids,
        "answer_ids": list(completion.token_ids),
        "finish": completion.finish_reason,
    }


def _write_shard(path: Path, lines: list[dict[str, Any]]) -> None:
    try:
        with (
            whole_file(path) as fresh,
            open(fresh, "wb") as raw,
            gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as file,
        ):
            for line in lines:
                file.write((json.dumps(line, separators=(",", ":")) + "\n").encode())
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}).") from error


def _is_whole(path: Path, answers: int) -> bool:
    """Whether a shard can be read to its end and holds all its answers."""
    try:
        return path.exists() and sum(1 for _ in open_text(path)) == answers
    except UserError:
        return False


def _totals(shards: Iterable[Path]) -> dict[str, int]:
    counts = [len(json.loads(line)["answer_ids"]) for path in shards for line in open_text(path)]
    return {"answers": len(counts), "answer_tokens": sum(counts)}


def _peak_memory_with_children() -> float:
    """Peak GiB of this process plus that of the largest engine process still alive."""
    import psutil

    children = 0.0
    for child in psutil.Process().children(recursive=True):
        try:
            status = Path(f"/proc/{child.pid}/status").read_text()
        except OSError:
            continue
        peak = next((line for line in status.splitlines() if line.startswith("VmHWM")), None)
        if peak:
            children += int(peak.split()[1]) / 2**20
    return peak_memory_gib() + children
