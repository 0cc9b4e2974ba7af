"""Write the checkpoints of a training run atomically, and verify them before they are used.

    OUTPUT_DIR/checkpoints/step_00000500/
        model.safetensors, optimizer.bin, random_states_0.pkl, ...   what `Accelerator.save_state` writes
        progress.json                                                where the run stands, and its settings
        manifest.json                                                size and SHA-256 of all of these; written last

A checkpoint is written under another name, brought to the disk, given its manifest and renamed: those under
their final names are complete, whenever a run is killed. The manifest detects later damage. All processes share the
folder.
"""

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.utils import logging

from .checksums import file_facts, file_faults, read_checksummed, write_checksummed
from .files import PARTIAL, remove, sync
from .provenance import versions
from .run import PREVIOUS

logger = logging.get_logger(__name__)

FOLDER = "checkpoints"
MANIFEST, PROGRESS = "manifest.json", "progress.json"


class Checkpoints:
    """Write, verify and prune the checkpoints of one run.

    Args:
        output_dir: the run's folder; checkpoints are in its folder `checkpoints`.
        keep: how many complete ones stay on the disk.
    """

    def __init__(self, output_dir: Path, *, keep: int) -> None:
        self.folder, self.keep = output_dir / FOLDER, keep

    def names(self) -> list[str]:
        """Return the names of all checkpoints, oldest first, verified or not."""
        paths = self.folder.glob("step_*")  # copies with other names are ignored
        return sorted(path.name for path in paths if re.fullmatch(r"step_\d{8,}", path.name) and path.is_dir())

    def newest(self) -> Path:
        """Return the newest complete checkpoint; what is wrong with newer ones is logged.

        Raises:
            FileNotFoundError: where there is none.
            ValueError: where all are damaged.
        """
        names = self.names()
        if not names:
            there = f"; the run before it lies in {PREVIOUS}" if (self.folder.parent / PREVIOUS).exists() else ""
            raise FileNotFoundError(
                f"resume: found no checkpoint in {self.folder}; start the run without resume{there}"
            )
        for name in reversed(names):
            found = faults(self.folder / name)
            if not found:
                return self.folder / name
            logger.warning(f"checkpoint {name} is damaged, the one before it is tried: {'; '.join(found)}")
        raise ValueError(
            f"resume: expected a complete checkpoint in {self.folder}, got {len(names)} damaged; of {name}: {found[0]}"
        )

    def save(self, accelerator: Any, step: int, progress: Mapping[str, Any]) -> None:
        """Write a checkpoint; called by all processes, after an optimiser step.

        Args:
            accelerator: whose state is saved.
            progress: kept as JSON.

        Raises:
            OSError: on a disk that is full or fails; checkpoints that were there stay.
        """
        final = self.folder / f"step_{step:08d}"
        partial = final.with_name(final.name + PARTIAL)
        if accelerator.is_main_process:
            self.sweep()
        accelerator.wait_for_everyone()
        with self._explained(final.name, partial):
            accelerator.save_state(str(partial))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            with self._explained(final.name, partial):
                (partial / PROGRESS).write_text(json.dumps(progress), encoding="utf-8")
                write_manifest(partial, step=step, num_processes=accelerator.num_processes)
            if final.exists():
                self._discard(final)
            partial.rename(final)
            sync(self.folder)
            self._prune()
        accelerator.wait_for_everyone()

    def sweep(self) -> None:
        """Delete what a run that was killed left half written, or half removed."""
        for path in self.folder.glob(f"*{PARTIAL}"):
            remove(path)

    def _prune(self) -> None:
        """Delete all but the newest `keep` complete ones; they are verified, so that a damaged one does not count."""
        complete = 0
        for name in reversed(self.names()):
            path = self.folder / name
            if complete == self.keep:
                self._discard(path)
            elif found := faults(path):
                logger.warning(f"checkpoint {name} is damaged and removed: {'; '.join(found)}")
                self._discard(path)
            else:
                complete += 1

    @contextmanager
    def _explained(self, name: str, partial: Path) -> Iterator[None]:
        """Turn the errors of all libraries that write into one message, and delete the partial checkpoint."""
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:
            # Of a full disk torch reports only its position in the file.
            torn = isinstance(error, RuntimeError) and "inline_container" in str(error)
            if isinstance(error, RuntimeError) and not torn:
                raise
            free = shutil.disk_usage(self.folder).free
            shutil.rmtree(partial, ignore_errors=True)
            reason = "a file was cut off" if torn else getattr(error, "strerror", None) or str(error)
            names = self.names()
            raise OSError(
                f"checkpoint {name}: cannot write it to {self.folder}, {free / 2**20:,.1f} MiB are free: {reason}; "
                + (f"{names[-1]} is there" if names else "there is none before it")
            ) from error

    def _discard(self, path: Path) -> None:
        """Rename first, so that no half of it is ever left under its name."""
        old = path.rename(path.with_name(f"{path.name}.old{PARTIAL}"))
        remove(old)


def progress_of(checkpoint: Path) -> dict[str, Any]:
    """Return the `progress` that [`Checkpoints.save`] was given."""
    return json.loads((checkpoint / PROGRESS).read_text(encoding="utf-8"))


def manifest_of(checkpoint: Path) -> dict[str, Any]:
    """Return `step`, `num_processes`, `versions` (by package) and `files` (name -> `size` in bytes and `sha256`).

    Raises:
        ValueError: for a manifest that is not as it was written.
        FileNotFoundError: where there is none.
    """
    return read_checksummed(checkpoint / MANIFEST)


def write_manifest(folder: Path, *, step: int, num_processes: int) -> None:
    """Bring all files of a folder to the disk, and write their manifest."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    for path in (*paths, *{path.parent for path in paths}):
        sync(path)
    files = file_facts(folder, [path.relative_to(folder).as_posix() for path in paths])
    facts = {"step": step, "num_processes": num_processes, "versions": versions(), "files": files}
    write_checksummed(folder / MANIFEST, facts)
    sync(folder)


def faults(checkpoint: Path) -> list[str]:
    """Return what is wrong with a checkpoint: file, what was expected, what was found; empty for a complete one."""
    try:
        return file_faults(checkpoint, manifest_of(checkpoint)["files"])
    except ValueError as error:
        return [str(error)]
    except OSError as error:
        return [f"{MANIFEST}: expected a file, found {error.strerror}"]
