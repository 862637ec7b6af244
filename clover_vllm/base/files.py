"""Reading and writing files of text, without heavy imports."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import resource
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clover_vllm.base.errors import UserError


def expand(paths: Sequence[Path]) -> list[Path]:
    """Files named, and `*.jsonl` and `*.jsonl.gz` of folders named, sorted.

    Raises:
        UserError: a path does not exist, or a folder holds no such file.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_file():
            files.append(path)
        elif path.is_dir():
            found = sorted([*path.glob("*.jsonl"), *path.glob("*.jsonl.gz")])
            if not found:
                raise UserError(f"Folder {path} holds no *.jsonl or *.jsonl.gz file.")
            files.extend(found)
        else:
            raise UserError(f"{path} does not exist.")
    return files


def open_text(path: Path) -> Iterator[str]:
    """Lines of a text file, gzipped or not.

    Raises:
        UserError: it cannot be read to its end as UTF-8 text.
    """
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            yield from file
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read to its end ({error}).") from error


def files_key(paths: Sequence[Path]) -> str:
    """A digest of the files' content, in their order."""
    digest = hashlib.sha256()
    for path in expand(paths):
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write to in place of `path`, which it replaces when the block ends without an exception.

    A kill or a failure never leaves half a file under the name.
    """
    fresh = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield fresh
        with open(fresh, "rb") as file:
            os.fsync(file.fileno())
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A fresh folder that takes the place of `path` when the block ends without an exception.

    It does so by two renames; in the instant between them there is none. What killed processes left
    beside it is removed first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in path.parent.glob(f".{path.name}.*.tmp"):
        shutil.rmtree(stale, ignore_errors=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    old = path.with_name(f".{path.name}.{os.getpid()}.old.tmp")
    fresh.mkdir()
    try:
        yield fresh
        for file in fresh.iterdir():
            file.chmod(0o644)  # safetensors writes files that only their owner may read
        if path.is_dir():
            path.rename(old)
        fresh.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all."""
    with whole_file(path) as fresh:
        fresh.write_text(json.dumps(value, indent=1))


def make_folder(path: Path) -> None:
    """Create a folder and its parents.

    Raises:
        UserError: a file is in the way, or it may not be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"Folder {path} cannot be made ({error.strerror}).") from error


def check_same_settings(stamp: Path, now: dict[str, Any]) -> None:
    """Write a run's settings beside its results, or compare with those that are there.

    Raises:
        UserError: the folder was begun with other settings (names them).
    """
    now = json.loads(json.dumps(now, default=str))
    if stamp.exists():
        try:
            before = json.loads(stamp.read_text())
        except ValueError as error:
            raise UserError(f"{stamp} is damaged; name another --output.") from error
        changed = sorted(k for k in now.keys() | before.keys() if now.get(k) != before.get(k))
        if changed:
            raise UserError(
                f"{stamp.parent} was begun with other settings ({', '.join(changed)}); "
                "continue it with the same ones, or name another --output."
            )
    else:
        write_json(stamp, now)


def peak_memory_gib() -> float:
    """Largest resident size of this process so far, GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
