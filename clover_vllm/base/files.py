"""Reading and writing files of text, without heavy imports."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import resource
from collections.abc import Iterator, Sequence
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


def write_json(path: Path, value: Any) -> None:
    """Write JSON through a rename, so that a kill never leaves half a file."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    fresh.write_text(json.dumps(value, indent=1))
    fresh.rename(path)


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
