"""What lies on a disk is as it was written, or somebody says so: sealed JSON, and SHA-256 of files."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .files import write_atomically


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """JSON with a checksum of its own, there whole or not at all."""
    write_atomically(path, _sealed(content))


def read_sealed(path: Path) -> dict[str, Any]:
    """What [`write_sealed`] was given.

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
    if content is None or _sealed(content) != text:
        raise ValueError(f"{path}: expected text that fits its checksum, found {len(text)} bytes that do not")
    return content


def digest_of(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fault_of(path: Path, size: int, sha256: str | None) -> str | None:
    """What is wrong with a file, or None. Without a checksum its size alone is looked at."""
    try:
        actual = path.stat().st_size
        if actual != size:
            return f"expected {size} bytes, found {actual}"
        digest = digest_of(path) if sha256 else None
    except OSError as error:
        return f"expected a file, found {error.strerror}"
    return None if digest == sha256 else f"expected SHA-256 {str(sha256)[:12]}..., found {str(digest)[:12]}..."


def _sealed(content: Mapping[str, Any]) -> bytes:
    checksum = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**content, "checksum": checksum}, sort_keys=True, indent=1) + "\n").encode()
