"""A run: an output folder that one program writes at a time, and whose parts are complete and checksummed.

    OUTPUT_DIR/
        .lock              held while a run writes
        run.json           what the run is, where it comes from, and its own checksum
        parts/NAME.json    the results of one part, with their own checksum; large tensors lie beside it
        manifest.json      size and SHA-256 of the finished results

A run that is started again in its folder reads the parts that are there, verifies them, and computes only what is
missing or damaged. A folder that holds another run, or other things, is refused.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from transformers.utils import logging

from .checksums import fault_of, file_facts, file_faults, read_checksummed, write_checksummed
from .files import PARTIAL, move_files, remove, sync, writable_folder, write_atomically
from .provenance import commit, computer, versions

logger = logging.get_logger(__name__)

LOCK, RUN, PARTS, MANIFEST = ".lock", "run.json", "parts", "manifest.json"
PREVIOUS = "previous"  # where a run that is replaced lies until the new one has saved something
DIGESTS = ("weights", "weights_bfloat16", "fingerprint")  # hashes: where they differ, their names are printed alone
LOCK_PATIENCE = 6.0  # seconds: processes that load images for a run that was killed hold its lock for up to five more


@contextmanager
def only_writer(output_dir: Path, state: Any) -> Iterator[None]:
    """Hold the folder, which is made, so that no other run writes there; the lock dies with its process.

    Args:
        state: [`apm_hf.runs.processes.process_state`]; the main process holds the lock for all.

    Raises:
        ValueError: in all processes, where another run holds it.
    """
    from accelerate.utils import broadcast_object_list
    from filelock import FileLock, Timeout

    lock, refused = FileLock(output_dir / LOCK), [False]
    if state.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=LOCK_PATIENCE, poll_interval=0.2)
        except Timeout:
            refused = [True]
    try:
        if broadcast_object_list(refused)[0]:
            raise ValueError(
                f"output_dir: expected a folder that no other run writes, got {output_dir}, where one does; wait for "
                "its end, or give another folder"
            )
        yield
    finally:
        lock.release()


class Run:
    """An output folder, claimed by one run.

    Args:
        folder: of the run; it is made.
        state: [`apm_hf.runs.processes.process_state`].
        parts: folder of the parts within it.
    """

    def __init__(self, folder: str | os.PathLike[str], state: Any, *, parts: str = PARTS) -> None:
        self.folder, self.state = Path(folder), state
        self.parts = self.folder / parts

    @contextmanager
    def locked(self) -> Iterator["Run"]:
        """Hold the folder for this run, see [`only_writer`]."""
        with only_writer(self.folder, self.state):
            yield self

    def claim(self, identity: Mapping[str, Any], *, facts: Mapping[str, Any] | None = None) -> None:
        """Write `run.json`, or check that it is this run's; called by all processes, under the lock.

        Args:
            identity: everything that decides about the results, as JSON; weights and data by their contents.
            facts: what else is worth knowing, beside the commit, versions and computer; it may differ.

        Raises:
            ValueError: for a folder with another run, which is named with all that differs, a damaged `run.json`, or
                a folder with other things in it.
        """
        identity = json.loads(json.dumps(identity))  # as it will be read
        path = self.folder / RUN
        if path.exists():
            found = differences(read_checksummed(path).get("identity", {}), identity)
            if found:
                raise ValueError(
                    f"output_dir: expected an empty folder or the same run, got another run in {self.folder}, which "
                    f"differs in {', '.join(found)}"
                )
        elif any(not there.name.startswith(".") for there in self.folder.iterdir()):
            raise ValueError(f"output_dir: expected an empty folder or an earlier run to resume, got {self.folder}")
        self.state.wait_for_everyone()  # every process has looked before one writes
        if self.state.is_main_process and not path.exists():
            known = {"commit": commit(), "versions": versions(), "computer": computer()}
            write_checksummed(path, {**(facts or {}), **known, "identity": identity})
        self.state.wait_for_everyone()

    def set_aside(self, made: Collection[str], *, overwrite: bool) -> None:
        """Make room for a new run in a folder that holds one; called by the main process.

        Args:
            made: names of what a run makes; other files are left alone.
            overwrite: move what the earlier run made into the folder `previous`, instead of refusing;
                [`Run.forget_previous`] deletes it.

        Raises:
            ValueError: without `overwrite`; says what the folder holds.
        """
        there = sorted(name for name in made if (self.folder / name).exists())
        if not overwrite:
            raise ValueError(
                f"output_dir: expected a folder without a run, got {self.folder}, which holds {', '.join(there)}; "
                "--resume goes on with a run, --overwrite replaces it"
            )
        previous = self.folder / PREVIOUS
        previous.mkdir(exist_ok=True)
        for name in there:  # those that are not there were moved by a process that was killed here
            remove(previous / name)
            (self.folder / name).rename(previous / name)
        logger.warning(f"{self.folder}: the run before lies in {PREVIOUS} until the new one has saved something")

    def forget_previous(self, made: Collection[str]) -> None:
        """Delete these files of the run that was replaced, and the folder they are in, if nothing else is there."""
        previous = self.folder / PREVIOUS
        for name in made:
            remove(previous / name)
        with suppress(OSError):
            previous.rmdir()

    def save(self, name: str, content: Mapping[str, Any], *, tensors: bytes | None = None) -> None:
        """Write a part; it is there as a whole or not at all.

        Args:
            name: of the part; may hold folders.
            content: as JSON.
            tensors: a safetensors file that belongs to it, see [`Run.tensors`].
        """
        beside = None
        if tensors is not None:
            write_atomically(self.tensors(name), tensors)
            beside = {"size": len(tensors), "sha256": hashlib.sha256(tensors).hexdigest()}
        write_checksummed(self._path(name), {"content": content, "tensors": beside})
        sync(self._path(name).parent)

    def load(self, name: str) -> dict[str, Any] | None:
        """Return the content of a part, verified; None where it is missing or, with a warning, damaged."""
        try:
            noted, fault = self.noted(name), None
            if noted["tensors"] is not None:
                fault = fault_of(self.tensors(name), **noted["tensors"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, OSError) as error:
            fault = str(error)
        if fault:
            logger.warning(f"{self._path(name).name} is damaged and computed again: {fault}")
            return None
        return noted["content"]

    def noted(self, name: str) -> dict[str, Any]:
        """Return `content` and `tensors` (None, or `size` in bytes and `sha256`) of a part; its tensors are not read.

        Raises:
            FileNotFoundError, ValueError: where it is missing, or damaged.
        """
        return read_checksummed(self._path(name))

    def tensors(self, name: str) -> Path:
        """Return where the tensors of a part lie."""
        return self.parts / f"{name}.safetensors"

    def finish(self, names: Iterable[str]) -> None:
        """Write the manifest of those finished files that are there, so that [`check_manifest`] can tell damage."""
        there = [name for name in names if (self.folder / name).exists()]
        write_checksummed(self.folder / MANIFEST, {"files": file_facts(self.folder, there)})

    @contextmanager
    def finished_files(self, *, last: str, keep: bool = False) -> Iterator[Path]:
        """Yield a folder to fill; its files then replace the run's of these names, with a manifest of what they are.

        Args:
            last: name of the file that is moved last: where it is, all others are.
            keep: the manifest goes on to name the finished files that are not replaced.

        Raises:
            ValueError: with `keep`, for a damaged manifest.
        """
        before = _manifest(self.folder) if keep else {}
        beside = self.folder / f".finished{PARTIAL}"
        shutil.rmtree(beside, ignore_errors=True)  # of a process that was killed
        beside.mkdir(parents=True)
        yield beside
        names = sorted(path.name for path in beside.iterdir())
        write_checksummed(beside / MANIFEST, {"files": before | file_facts(beside, names)})
        move_files(beside, self.folder, last=last)

    def _path(self, name: str) -> Path:
        return self.parts / f"{name}.json"


def _manifest(folder: Path) -> dict[str, Any]:
    """Return the facts of finished files by name; none without a manifest."""
    try:
        return read_checksummed(folder / MANIFEST)["files"]
    except FileNotFoundError:
        return {}


def manifest_faults(folder: Path) -> list[str]:
    """List the finished files of a run that are not as it wrote them; none for a folder without a manifest."""
    try:
        return [f"{folder}: {fault}" for fault in file_faults(folder, _manifest(folder))]
    except ValueError as error:
        return [str(error)]


def check_manifest(folder: Path) -> None:
    """Verify the finished files of an evaluation; folders without a manifest pass.

    Raises:
        ValueError: for a file that is not as it was written; says which, and how to repair it.
    """
    for fault in manifest_faults(folder):
        raise ValueError(f"{fault}; run the evaluation again in this folder to write it anew")


def own_folder(output_dir: str | os.PathLike[str], **others: Any) -> Path:
    """Make an output folder and try to write there; refuse one that is, or lies in, a folder that is read.

    Args:
        **others: names or folders by option, one or several, e.g. `teacher="runs/teacher"`; Hub names are no folders.

    Raises:
        ValueError: names both; or for an empty name, which would mean the current folder.
        OSError: for a folder that cannot be written to.
    """
    folder = Path(output_dir).resolve()
    for name, given in others.items():
        for other in given if isinstance(given, list | tuple) else [given]:
            is_folder = isinstance(other, str | os.PathLike) and os.path.isdir(other)
            if is_folder and folder.is_relative_to(Path(other).resolve()) and os.fspath(output_dir).strip():
                raise ValueError(
                    f"output_dir: expected a folder of its own, got {os.fspath(output_dir)!r}, which lies in the "
                    f"folder of --{name}"
                )
    return writable_folder(output_dir)


def differences(there: Mapping[str, Any], wanted: Mapping[str, Any], within: str = "") -> list[str]:
    """List where two descriptions differ: `teacher.name (expected a, got b)`; digests by their name alone."""
    found = []
    for name in {**wanted, **there}:
        got, expected = there.get(name), wanted.get(name)
        if got == expected:
            continue
        if isinstance(got, dict) and isinstance(expected, dict):
            found += differences(got, expected, f"{within}{name}.")
        elif name in DIGESTS or max(len(str(got)), len(str(expected))) > 200:
            found.append(f"{within}{name}")
        else:
            found.append(f"{within}{name} (expected {expected}, got {got})")
    return found
