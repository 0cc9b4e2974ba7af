"""Write files and folders atomically."""

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

PARTIAL = ".partial"  # end of the name of what is not complete yet
MAX_TEXT_BYTES = 2**21  # of a file of labels or options: ImageNet-21k's names take a fifth


def writable_folder(path: str | os.PathLike[str]) -> Path:
    """Make the folder, and try it: what cannot be saved should not be computed first.

    Raises:
        ValueError: for an empty name, which would mean the current folder.
        OSError: a file is in the way, a disk that is full or read-only, missing rights; names the folder.
    """
    if not os.fspath(path).strip():
        raise ValueError(f"output_dir: expected a folder, got {os.fspath(path)!r}")
    folder = Path(path)
    probe = folder / f".probe.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            probe.write_bytes(b"0")
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        message = f"output_dir: cannot write to {os.fspath(path)!r}: {error.strerror}"
        raise type(error)(error.errno, message) from error
    return folder


def read_text(path: str | os.PathLike[str], what: str) -> str:
    """Read a UTF-8 text file of a sensible size.

    Args:
        what: the file contains, for messages, e.g. "labels".

    Raises:
        ValueError: for what is no regular file, more than `MAX_TEXT_BYTES`, and other encodings.
        OSError: for a file that is not there or cannot be read.
    """
    path = Path(path)
    if not path.is_file() and path.exists():  # a device or a pipe
        raise ValueError(f"Expected a text file of {what}, got {path}, which is no regular file.")
    if (size := path.stat().st_size) > MAX_TEXT_BYTES:
        raise ValueError(f"Expected at most {MAX_TEXT_BYTES:,} bytes of {what} in {path}, got {size:,}.")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"Expected UTF-8 text in {path}: {error}.") from error


def plain_name(text: str) -> str:
    """Turn any text into part of a file name: no separators, no `..`, not empty."""
    return re.sub(r"[^\w.\-]", "_", text).lstrip(".") or "_"


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file beside `path`, which is renamed to it when the block ends without an error; folders are made.

    Raises:
        OSError: names the file, also where the disk is full; what was there before is left as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(beside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(beside)):  # of another file
            raise
        raise type(error)(error.errno, error.strerror, str(path)) from error
    finally:
        beside.unlink(missing_ok=True)


def write_atomically(path: Path, content: str | bytes | Iterable[str | bytes]) -> None:
    """Write beside, then rename; folders are made. Text is UTF-8, and may come in parts.

    Raises:
        OSError: as [`atomic_file`] does.
    """
    parts = [content] if isinstance(content, str | bytes) else content
    with atomic_file(path) as file:
        for part in parts:
            file.write(part if isinstance(part, bytes) else part.encode())


def safetensors_header(
    tensors: Mapping[str, tuple[str, Sequence[int], int]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """Return what a safetensors file begins with, for tensors that are then written one after the other.

    Args:
        tensors: name -> dtype as safetensors names it, such as `"F32"`, shape, and number of bytes.
        metadata: beside the entry that says what wrote the file.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    start = 0
    for name, (dtype, shape, num_bytes) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, start + num_bytes]}
        start += num_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk: what was written or renamed outlives a loss of power."""
    if path.is_dir() and os.name == "nt":
        return  # where folders cannot be opened
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Delete a file, or a folder with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def move_files(source: Path, target: Path, *, last: str) -> None:
    """Move all files of a folder into another one on the same disk, and replace files of the same names.

    Args:
        last: name of the file that goes last, and whose namesake goes first: where it lies, all others do.
    """
    paths = sorted(source.iterdir(), key=lambda path: (path.name == last, path.name))
    for path in paths:
        sync(path)
    (target / last).unlink(missing_ok=True)
    for path in paths:
        os.replace(path, target / path.name)
    sync(target)
    source.rmdir()


@contextmanager
def atomic_folder(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `path`, which is renamed to it when the block ends without an error.

    Args:
        path: does not exist yet, or is an empty folder.
        overwrite: `path` may hold files: those of the same names are replaced, one after the other, others stay.

    Raises:
        ValueError: where `path` is empty, a file or, without `overwrite`, a folder that is not empty.
    """
    if not os.fspath(path).strip():
        raise ValueError(f"output_dir: expected a folder, got {os.fspath(path)!r}")
    target = Path(path).resolve()
    if target.exists() and not target.is_dir():
        raise ValueError(f"output_dir: expected a folder, got the file {os.fspath(path)!r}")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise ValueError(f"output_dir: expected a new or an empty folder, got {os.fspath(path)!r}")
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    beside.mkdir(parents=True)
    try:
        yield beside
        if target.is_dir() and any(target.iterdir()):
            for file in beside.iterdir():
                os.replace(file, target / file.name)
        else:
            if target.is_dir():
                target.rmdir()
            os.replace(beside, target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
