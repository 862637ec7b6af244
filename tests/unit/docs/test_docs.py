"""README, docs, CONTRIBUTING and examples say what is there."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from types import ModuleType

import click
import pytest
import typer
from length import FULL

from clover_vllm.check.tiny import make_tiny_pair
from clover_vllm.cli import app
from clover_vllm.engine.options import split_options
from clover_vllm.eval.render import BLOCK

ROOT = Path(__file__).parents[3]
PAGES = sorted(
    [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(ROOT / folder / "README.md" for folder in ("serving", "patches", "examples")),
        *(ROOT / "docs").glob("*.md"),
    ]
)
USERS_HOME = os.environ.get("CLOVER_HOME")  # before the fixtures give every test another one
VLLMS_OPTIONS = ("method", "model", "num_speculative_tokens")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    language: str
    text: str
    is_tested: bool  # it follows a line `<!-- test -->`

    def __str__(self) -> str:
        return f"{self.page.name}:{self.text.splitlines()[0][:40]}"


def blocks(page: Path) -> Iterator[Block]:
    fence = re.compile(r"^( *)(<!-- test -->\n *)?```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
    for found in fence.finditer(page.read_text(encoding="utf-8")):
        yield Block(page, found[3], found[4], found[2] is not None)


BLOCKS = [block for page in PAGES for block in blocks(page)]
TESTED = [block for block in BLOCKS if block.is_tested]


def commands(text: str) -> Iterator[list[str]]:
    """Command lines of a shell text, split into words; `&&` and `|` end one."""
    for line in text.replace("\\\n", " ").splitlines():
        words: list[str] = []
        for word in shlex.split(line, comments=True):
            if word in ("&&", "|"):
                yield words
                words = []
            else:
                words.append(word)
        yield words


def clover_commands() -> Iterator[tuple[Path, list[str]]]:
    """Every `clover-vllm ...` of shell blocks, and of inline code that gives options."""
    for block in BLOCKS:
        if block.language == "bash":
            yield from (
                (block.page, words[1:]) for words in commands(block.text) if "clover-vllm" in words[:1]
            )
    for page in PAGES:
        for code in re.findall(r"`clover-vllm ([a-z]+ --[^`]*)`", prose(page)):
            yield page, shlex.split(code)


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Fragments of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def shell(command: str, folder: Path = ROOT, seconds: float = 120) -> subprocess.CompletedProcess[str]:
    """Run bash, in the repository's root if not told, with this Python's scripts and the user's targets."""
    environment = {name: value for name, value in os.environ.items() if name != "CLOVER_HOME"}
    if USERS_HOME is not None:
        environment["CLOVER_HOME"] = USERS_HOME
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    environment["PYTHONPATH"] = str(ROOT)
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=seconds,
    )


def example(name: str) -> ModuleType:
    """An example as a module, not run."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_is_a_front_page() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    targets = set(re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z][\w-]*)", text))
    assert {"demo", "test", "setup"} <= named <= targets


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, fragment = link.partition("#")
        goal = page.parent / path if path else page
        assert goal.exists(), f"{page.name} links to {link}"
        if fragment:
            assert fragment in anchors(goal), f"{page.name} links to {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_paths_in_prose_exist(page: Path) -> None:
    rooms = "clover_vllm|tests|docs|examples|serving|patches|requirements"
    for path in re.findall(rf"`((?:{rooms})/[^`\s]*)`", prose(page)):
        assert (ROOT / path).exists(), f"{page.name} names {path}"


def test_tests_named_in_pages_exist() -> None:
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    defined = set(re.findall(r"def (test_\w+)", sources))
    # Pages name a test without its file, except where a path says which.
    named = {name for page in PAGES for name in re.findall(r"`(test_\w+)(?:\[[^`]*)?`", prose(page))}
    assert "test_feature" in named
    examples = {"test_seeded_output_equals_plain_vllm"}
    assert examples <= defined
    assert not named - defined


def test_commands_are_as_the_command_line_takes_them() -> None:
    group = typer.main.get_command(app)
    assert isinstance(group, click.Group) or hasattr(group, "commands")
    found = list(clover_commands())
    assert {words[0] for _, words in found} >= {"target", "data", "train", "eval", "bench", "torture"}
    for page, words in found:
        arguments = [word for word in words[1:] if word != "--help"]
        if "--help" in words:
            assert words[0] in group.commands
            continue
        try:
            group.commands[words[0]].make_context(words[0], arguments)
        except Exception as error:
            pytest.fail(f"{page.name}: clover-vllm {shlex.join(words)}: {error}")


def test_speculative_configurations_are_as_clover_takes_them() -> None:
    found = 0
    sources = [block.text for block in BLOCKS if block.language == "bash"]
    sources.append((ROOT / "examples" / "batch.sh").read_text(encoding="utf-8"))
    for source in sources:
        for words in commands(source):
            if "--speculative-config" in words:
                given = json.loads(words[words.index("--speculative-config") + 1])
                assert given["model"] in ("$HEAD", "run/head")
                split_options(given, VLLMS_OPTIONS)
                found += 1
    assert found >= 4


def test_gpu_users_are_told_how_little_has_run_there() -> None:
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    before, after = readme.split("[cuda,train]")
    assert "GPU support is experimental" in before
    assert "its speed was never measured" in after[:200]
    assert "On GPUs its speed is unknown" in after
    assert "4 of its 288 tokens" in after


def test_the_readme_has_figures_that_are_generated_and_a_command_that_is_run() -> None:
    readme = ROOT / "README.md"
    assert BLOCK.search(readme.read_text(encoding="utf-8"))
    (block,) = [block for block in TESTED if block.page == readme]
    assert "clover-vllm" in block.text
    assert "--help" not in block.text


@pytest.mark.parametrize(
    "block",
    [pytest.param(b, marks=pytest.mark.slow if b.page.name == "README.md" else ()) for b in TESTED],
    ids=str,
)
@pytest.mark.usefixtures("smollm2")
def test_marked_blocks_run(block: Block) -> None:
    done = shell(block.text)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


if FULL:  # `tests/engine/test_train_serve.py` trains in the short form

    @pytest.mark.slow
    def test_the_readme_trains_a_head(tmp_path: Path) -> None:
        """Its block as it stands, on a tiny target; what serves the head is left out."""
        target, _ = make_tiny_pair(tmp_path)
        config = json.loads((target / "config.json").read_text())
        (target / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 2048}))
        (block,) = (b for b in blocks(ROOT / "README.md") if "clover-vllm train" in b.text)
        text = "".join(line for line in block.text.splitlines(True) if not line.startswith("vllm serve"))
        text = text.replace("MODEL", str(target)).replace("32768", "128")
        words = ["the cat", "a dog sat", "one two three", "who is there", "red and blue", "up the hill"]
        lines = [json.dumps({"prompt": " ".join(chosen)}) for chosen in product(words, repeat=3)]
        (tmp_path / "train_prompts.jsonl").write_text("\n".join(lines))
        done = shell(text, tmp_path, 900)
        assert done.returncode == 0, done.stderr[-3000:]
        assert (tmp_path / "run" / "head" / "model.safetensors").exists()
        assert list((tmp_path / "run" / "eval").iterdir())


@pytest.mark.usefixtures("smollm2")
def test_the_environment_of_the_quick_start_names_a_target_and_its_head() -> None:
    done = shell("set +u; source examples/environment.sh; cat $TARGET/config.json $HEAD/config.json")
    assert done.returncode == 0, done.stderr
    decoder = json.JSONDecoder()
    target, end = decoder.raw_decode(done.stdout)
    head, _ = decoder.raw_decode(done.stdout[end:].lstrip())
    assert target["hidden_size"] == head["hidden_size"]
    assert head["model_type"] == "clover2"


def test_python_in_pages_compiles() -> None:
    found = [block for block in BLOCKS if block.language == "python"]
    assert found
    for block in found:
        compile(block.text, str(block), "exec")


def test_examples_take_their_arguments() -> None:
    assert example("offline").parse(["--max-tokens", "5"]).max_tokens == 5
    assert example("client").parse(["Why?"]).question == "Why?"


def test_shell_examples_are_whole_and_fit_the_batch() -> None:
    for script in (ROOT / "examples").glob("*.sh"):
        assert shell(f"bash -n {shlex.quote(str(script))}").returncode == 0
    script_text = (ROOT / "examples" / "batch.sh").read_text(encoding="utf-8")
    lines = (ROOT / "examples" / "batch.jsonl").read_text(encoding="utf-8").splitlines()
    requests = [json.loads(line) for line in lines]
    assert len({request["custom_id"] for request in requests}) == len(requests)
    for request in requests:
        assert f"--served-model-name {request['body']['model']}" in script_text
