"""A core for each worker, marks by folder, and fixtures: a small random target, answers for it, a home."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if worker := os.environ.get("PYTEST_XDIST_WORKER"):  # before torch counts the cores
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
from length import FULL

if TYPE_CHECKING:  # imported where they are used, since the process that hands out tests needs none of them
    from clover_vllm.heads.clover2 import Clover2DraftModel
    from clover_vllm.target.frozen import FrozenTarget

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") else ["interpreted"]
"""Triton decides when it is imported whether kernels are compiled or interpreted: these have a process of their own."""
collect_ignore += [] if FULL else ["cluster/test_ray_serve.py"]

FOLDERS = {
    "engine": "engine",
    "server": "server",
    "check": "engine",
    "cluster": "engine",
    "packaging": "slow",
}
"""Marks of the tests in a folder."""
LONGEST = [
    "test_engine_exact.py",
    "test_server.py",
    "test_v2.py",
    "test_features.py",
    "test_train.py",
    "test_bench.py",
    "test_engine.py",
    "test_sessions.py",
    "test_starts.py",
    "test_torture.py",
    "test_other_heads.py",
    "test_target.py",
    "test_hooks.py",
    "test_triton.py",
    "test_head_vllm.py",
    "test_v2_windows.py",
    "test_ranks.py",
    "test_packaging.py",
    "test_gpu_engines.py",
    "test_adaptive.py",
    "test_distribution.py",
    "test_ray.py",
    "test_shipped.py",
    "test_data.py",
    "test_patches.py",
    "test_llama3_shape.py",
    "test_scorer.py",
    "test_batch_engine.py",
    "test_train_serve.py",
    "test_eagle_vllm.py",
    "test_eval.py",
    "test_compare.py",
    "test_prometheus.py",
]
"""Files, the longest first, so that none is taken up last, while the other worker has no more to do."""


def pytest_configure() -> None:
    """Tests of this checkout over the code of another, whose `make setup` used the same environment, would say nothing."""
    found, tree = find_spec("clover_vllm"), Path(__file__).resolve().parents[1]
    if found is None or found.origin is None or tree not in Path(found.origin).resolve().parents:
        place = found.origin if found is not None else "nowhere"
        raise pytest.UsageError(
            f"clover_vllm would be imported from {place}, not from {tree}: install it from there."
        )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks; long files go first. A file's tests share its fixtures, hence a worker (`--dist loadfile`)."""
    places: dict[str, int] = {}
    for item in items:
        room = item.path.relative_to(Path(__file__).parent).parts[0]
        if room in FOLDERS:
            item.add_marker(FOLDERS[room])
        name = item.path.name
        places.setdefault(name, LONGEST.index(name) if name in LONGEST else len(LONGEST))
    items.sort(key=lambda item: places[item.path.name])


@pytest.fixture(autouse=True)
def _own_environment() -> Iterator[None]:
    """What a test, or what it calls, sets in the environment ends with it."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def clover_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLOVER_HOME of commands that tests start; targets are shared with the user's, which are checked."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def _own_home(clover_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOVER_HOME", str(clover_home))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real target, in the user's CLOVER_HOME: made once per machine."""
    from clover_vllm.target.make import make_target

    return make_target("smollm2-135m")


@pytest.fixture(scope="session")
def tiny_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from small import tiny_llama

    return tiny_llama(tmp_path_factory.mktemp("tiny") / "target")


@pytest.fixture(scope="session")
def spoken_target(tmp_path_factory: pytest.TempPathFactory, tiny_target: Path) -> Path:
    """The tiny target with a tokenizer of one word per token, and without a chat template."""
    from small import add_tokenizer

    folder = tmp_path_factory.mktemp("spoken") / "target"
    shutil.copytree(tiny_target, folder)
    add_tokenizer(folder)
    (folder / "chat_template.jinja").unlink()
    return folder


@pytest.fixture(scope="session")
def prompt_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 prompts of the words of `spoken_target`."""
    from small import write_prompts

    return write_prompts(tmp_path_factory.mktemp("prompts") / "prompts.jsonl")


@pytest.fixture(scope="session")
def frozen(tiny_target: Path) -> FrozenTarget:
    import torch

    from clover_vllm.target.frozen import FrozenTarget

    return FrozenTarget(tiny_target, torch.float32)


@pytest.fixture(scope="session")
def tiny_answers(tmp_path_factory: pytest.TempPathFactory, frozen: FrozenTarget) -> Path:
    from small import write_answers

    return write_answers(tmp_path_factory.mktemp("answers") / "answers.jsonl", frozen, 60)


@pytest.fixture
def head() -> Clover2DraftModel:
    """A random head of the golden checkpoint's sizes."""
    import torch

    from clover_vllm.heads.clover2 import Clover2Config, Clover2DraftModel

    torch.manual_seed(0)
    model = Clover2DraftModel(Clover2Config(num_key_value_heads=2))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def fitting_head(frozen: FrozenTarget) -> Clover2DraftModel:
    """An untrained head for the tiny target."""
    from small import head_for

    return head_for(frozen)
