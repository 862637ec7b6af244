"""What `pip install` puts on a machine, from the wheel and from the source distribution."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

import clover_vllm

ROOT = Path(__file__).parents[2]
THIS_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
PARTS = [
    "clover_vllm/py.typed",
    "clover_vllm/attention/cpu/tree_attention.cpp",
    "clover_vllm/attention/cpu/tree_attention.h",
    *(
        f"clover_vllm/bench/prompts/{file}"
        for file in ("families.jsonl.gz", "text-heavy.jsonl.gz", "prompt-heavy.jsonl.gz", "NOTICES.txt")
    ),
    *(
        f"clover_vllm/shipped/{head}/{file}"
        for head in ("smollm2-135m-clover2", "smollm2-135m-eagle1")
        for file in ("config.json", "model.safetensors")
    ),
]
REPORT = """
import ctypes, importlib.metadata, json, pathlib
import clover_vllm
from clover_vllm.base.paths import shipped_head
folder = pathlib.Path(clover_vllm.__file__).parent
(library,) = folder.glob("attention/cpu/_native*.so")
levels = ctypes.CDLL(str(library)).clover_levels
levels.restype = ctypes.c_char_p
print(json.dumps({
    "folder": str(folder),
    "version": importlib.metadata.version("clover-vllm"),
    "weights": (shipped_head() / "model.safetensors").stat().st_size,
    "levels": levels().decode().split(),
    "plugins": [e.value for e in importlib.metadata.entry_points(group="vllm.general_plugins")],
}))
"""


def run(*command: str | Path, cwd: Path) -> str:
    """Standard output of a command that must not see this checkout's modules."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The wheel and the source distribution, built from a copy without compiled files."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    shutil.copytree(
        ROOT / "clover_vllm", source / "clover_vllm", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    for kind in ("sdist", "wheel"):
        run(
            sys.executable,
            "-c",
            f"import sys, setuptools.build_meta as b; b.build_{kind}(sys.argv[1])",
            out,
            cwd=source,
        )
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return {"wheel": wheel, "sdist": sdist}


def interpreter(version: str) -> str:
    """A Python of this version that starts; the test is skipped where there is none."""
    if version == THIS_PYTHON:
        return sys.executable
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))  # its shims on the PATH may not start
    on_path = shutil.which(f"python{version}")
    for found in (on_path, *sorted(pyenv.glob(f"versions/{version}.*/bin/python"))):
        if found is not None and subprocess.run([found, "-c", ""], capture_output=True).returncode == 0:
            return str(found)
    pytest.skip(f"there is no python{version} that starts, on the PATH or of pyenv")


def test_the_wheel_and_the_sdist_hold_weights_sources_and_type_marker(built: dict[str, Path]) -> None:
    with zipfile.ZipFile(built["wheel"]) as wheel:
        in_wheel = set(wheel.namelist())
    with tarfile.open(built["sdist"]) as sdist:
        in_sdist = {name.partition("/")[2] for name in sdist.getnames()}
    assert set(PARTS) <= in_wheel
    assert {*PARTS, "pyproject.toml", "LICENSE"} <= in_sdist


def test_one_wheel_serves_every_python_version(built: dict[str, Path]) -> None:
    assert f"clover_vllm-{clover_vllm.__version__}-cp311-abi3-" in built["wheel"].name


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
@pytest.mark.parametrize("version", ["3.11", "3.12"])
def test_installs_with_heads_and_kernel(
    kind: str, version: str, built: dict[str, Path], tmp_path: Path
) -> None:
    run(interpreter(version), "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv/bin/python"
    site = Path(
        run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
    )
    ours = Path(sysconfig.get_path("purelib"))
    tools = tmp_path / "tools"  # setuptools is Python only: this one serves the other versions
    tools.mkdir()
    for package in (ours / "_distutils_hack", *ours.glob("setuptools*")):
        (tools / package.name).symlink_to(package)
    (site / "tools.pth").write_text(f"{tools}\n")
    pip: list[str | Path] = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
    ]
    run(*pip, "--no-build-isolation", built[kind], cwd=tmp_path)
    report: dict[str, Any] = json.loads(run(python, "-I", "-c", REPORT, cwd=tmp_path))
    assert Path(report["folder"]).is_relative_to(tmp_path)
    assert report["version"] == clover_vllm.__version__
    assert report["weights"] > 1e7, "a pointer to a large file, not the weights"
    assert report["levels"]
    assert report["plugins"] == ["clover_vllm.engine.plugin:register"]
    if version != THIS_PYTHON:
        return
    (site / "torch.pth").write_text(f"{ours}\n")
    code = "import clover_vllm.attention as a; print(a.__file__, a.native_kernel().__name__)"
    file, kernel = run(python, "-I", "-c", code, cwd=tmp_path).split()
    assert Path(file).is_relative_to(tmp_path)
    assert kernel == f"clover_tree_attention_{report['levels'][-1]}"


@pytest.mark.parametrize(("compiler", "fails"), [("true", True), ("no-such-compiler", False)])
def test_make_setup_fails_where_a_compiler_did_not_build_the_kernel(
    compiler: str, fails: bool, tmp_path: Path
) -> None:
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin/python"  # one that finds no kernel
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    command = ["make", "check-kernel", f"VENV={tmp_path}", f"CXX={compiler}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode != 0) == fails, done.stderr
    assert ("kernel was not built although there is a C++ compiler" in done.stdout) == fails
