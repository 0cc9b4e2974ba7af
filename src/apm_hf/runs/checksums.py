"""Detect whether files on a disk are as they were written: JSON with its own checksum, sizes and SHA-256 of files."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .files import write_atomically


def write_checksummed(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON with its own checksum, atomically."""
    write_atomically(path, _checksummed(content))


def read_checksummed(path: Path) -> dict[str, Any]:
    """Read what [`write_checksummed`] wrote, and verify it.

    Raises:
        ValueError: for a file that is not as it was written.
        FileNotFoundError: where there is none.
    """
    text = path.read_bytes()
    try:
        content = json.loads(text)
        del content["checksum"]
    except (ValueError, KeyError, TypeError):
        content = None
    if content is None or _checksummed(content) != text:
        raise ValueError(f"{path}: expected text that fits its checksum, found another: it is damaged or was edited")
    return content


def file_facts(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return `size` (bytes) and `sha256` of files in a folder, by name; [`file_faults`] compares them later."""
    return {name: {"size": (folder / name).stat().st_size, "sha256": _digest(folder / name)} for name in names}


def file_faults(folder: Path, facts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return which files differ from what [`file_facts`] noted: name, what was expected, what was found."""
    found = ((name, fault_of(folder / name, **expected)) for name, expected in facts.items())
    return [f"{name}: {fault}" for name, fault in found if fault]


def fault_of(path: Path, size: int, sha256: str | None) -> str | None:
    """Return what is wrong with a file, or None. Without a checksum only its size is compared."""
    try:
        actual = path.stat().st_size
        if actual != size:
            return f"expected {size} bytes, found {actual}"
        digest = _digest(path) if sha256 else None
    except OSError as error:
        return f"expected a file, found {error.strerror}"
    return None if digest == sha256 else f"expected SHA-256 {str(sha256)[:12]}..., found {str(digest)[:12]}..."


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checksummed(content: Mapping[str, Any]) -> bytes:
    checksum = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**content, "checksum": checksum}, sort_keys=True, indent=1) + "\n").encode()
