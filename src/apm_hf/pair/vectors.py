"""Write one vector per photo to a file: parquet, NumPy or safetensors, in flat memory, resumable.

    write_vectors(apm, find_photos(["photos"]), "vectors.parquet", folder="photos")

Photos are embedded part by part. Complete parts lie, checksummed, in `vectors.parquet.parts` until the file is written
from them; the same call goes on from those that are there, and computes a part again where its photos have changed.

    .parquet       columns `path` and, as lists of F float32, `student`, `teacher`; facts in the schema's metadata
    .npy           (N, F) float32 of one source; paths and facts in a .json file of the same name
    .safetensors   `student`, `teacher`, each (N, F) float32; paths and facts in a .json file of the same name

Legend: N readable photos, n of a part, F feature width.
"""

import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers.utils import logging
from transformers.utils.logging import tqdm

from ..data.images import decode_image, eight_bit_rgb
from ..runs.files import atomic_file, remove, safetensors_header, write_atomically
from ..runs.identity import images_digest
from ..runs.provenance import versions
from ..runs.run import RUN, Run
from ..runs.stopping import RunStopped, StopRequests, ignore_stop_requests
from ..teachers.licenses import public_name
from ..teachers.text import check_finite
from .apm import APM

logger = logging.get_logger(__name__)

SOURCES = ("student", "teacher")
PART_PHOTOS = 512  # n: seconds to minutes of work to lose, and row groups of parquet of about a megabyte


@dataclass(frozen=True)
class Vectors:
    """Say what was written.

    Args:
        file: with the vectors.
        paths: of the photos in it, in order.
        feature_size: F.
        sources: whose vectors they are.
        unreadable: `{"photo", "message"}` of those that were left out.
    """

    file: Path
    paths: list[str]
    feature_size: int
    sources: list[str]
    unreadable: list[dict[str, str]]


def write_vectors(
    apm: APM,
    photos: Sequence[str],
    output: str | os.PathLike[str],
    *,
    folder: str | os.PathLike[str] | None = None,
    sources: Sequence[str] | None = None,
    normalize: bool = False,
    batch_size: int = 32,
    num_workers: int = 0,
    overwrite: bool = False,
) -> Vectors:
    """Embed photos as [`APM.encode`] does, and write the vectors with the photos' paths to a file.

    Args:
        photos: image files, each once; see [`apm_hf.data.folders.find_photos`].
        output: a `.parquet`, `.npy` or `.safetensors` file, which is there as a whole or not at all.
        folder: to which paths are written relative; by default they are written as given.
        sources: `"student"`, `"teacher"` or both; by default as [`APM.embedding_source`].
        normalize: whether vectors are scaled to length 1.
        batch_size: photos per batch.
        num_workers: processes that read photos.
        overwrite: replace files that are there, and begin anew.

    Raises:
        ValueError: as [`check_output`], for parts that another model or other options made, no readable photo, or
            vectors that are not finite.
        ImportError: as [`check_output`].
        RunStopped: after SIGTERM or SIGINT; complete parts stay.
    """
    from ..runs.processes import process_state

    if batch_size < 1:
        raise ValueError(f"batch_size: expected a positive number, got {batch_size}")
    target, sources = Path(output), list(sources or [apm.embedding_source])
    check_output(target, sources, overwrite=overwrite)
    parts = target.with_name(f"{target.name}.parts")
    state = process_state()
    if state.num_processes > 1:
        raise ValueError(f"expected one process, got {state.num_processes}; give each a folder and a file of its own")
    reading = _Reading(list(photos), {source: apm.preprocessing(source) for source in sources})
    names = [_name(photo, folder) for photo in photos]
    models = _identities(apm)
    facts = {
        "apm_hf": versions().get("apm_hf"),
        "sources": sources,
        "feature_size": apm.feature_size,
        "normalized": normalize,
        **{who: model and {"name": model["name"], "sha256": model["weights"]} for who, model in models.items()},
    }
    with Run(parts, state).locked() as run, StopRequests() as requests:
        if overwrite:
            remove(parts / RUN)
            remove(run.parts)
        _claim(run, {**facts, **models})
        plan = list(_parts(reading.photos, names))
        found = {part: run.load(part.name) for part in plan}
        contents = {part: content for part, content in found.items() if content and content["digest"] == part.digest}
        missing = [part for part in plan if part not in contents]
        if contents:
            logger.info(f"{parts}: {len(contents)} of {len(plan)} parts are there")
        batches = reading.batches(missing, batch_size, num_workers)
        embed = _Embedder(run, apm, photos, names, normalize, requests)
        with tqdm(total=sum(len(part.rows) for part in missing), desc="vectors", unit="photo") as progress:
            for part in missing:
                contents[part] = embed(part, batches, progress)
        paths = [contents[part]["paths"] for part in plan]
        unreadable = [entry for part in plan for entry in contents[part]["unreadable"]]
        if not any(paths):
            raise ValueError(f"expected a readable photo, got {len(photos)} others; {unreadable[0]['message']}")
        files = [run.tensors(part.name) for part in plan]
        _WRITERS[target.suffix](target, files, paths, {**facts, "unreadable": unreadable})
    shutil.rmtree(parts)
    return Vectors(target, list(chain.from_iterable(paths)), apm.feature_size, sources, unreadable)


def _claim(run: Run, identity: Mapping[str, Any]) -> None:
    try:
        run.claim(identity)
    except ValueError as error:
        raise ValueError(f"{error}; --overwrite begins anew") from error


def check_output(
    output: str | os.PathLike[str], sources: Sequence[str] | None = None, *, overwrite: bool = False
) -> None:
    """Refuse what [`write_vectors`] could not write, before models are loaded for it.

    Raises:
        ValueError: for another kind of file, a file that is there, unknown or repeated sources, or two of them for one
            array.
        ImportError: where the library that writes it is missing.
    """
    target, sources = Path(output), sources or ()
    if target.suffix not in _WRITERS:
        raise ValueError(f"output: expected a file that ends in {', '.join(_WRITERS)}, got {os.fspath(output)!r}")
    if unknown := [source for source in sources if source not in SOURCES]:
        raise ValueError(f"sources: expected some of {', '.join(SOURCES)}, got {unknown[0]!r}")
    if len(set(sources)) < len(sources):
        raise ValueError(f"sources: expected each once, got {', '.join(sources)}")
    if target.suffix == ".npy" and len(sources) > 1:
        raise ValueError("output: expected .parquet or .safetensors for two sources, got .npy, which holds one array")
    if target.suffix == ".parquet":
        import pyarrow  # noqa: F401
    made = [target] if target.suffix == ".parquet" else [target, target.with_suffix(".json")]
    if there := [path for path in made if path.exists() and not overwrite]:
        raise ValueError(f"output: expected a new file, got {there[0]}, which is there; --overwrite replaces it")


@dataclass(frozen=True)
class _Part:
    name: str
    rows: range  # of photos
    digest: str  # of these photos and their names


def _parts(photos: Sequence[str], names: Sequence[str]) -> Iterator[_Part]:
    for number, start in enumerate(range(0, len(photos), PART_PHOTOS)):
        rows = range(start, min(start + PART_PHOTOS, len(photos)))
        digest = hashlib.sha256("\n".join(names[start : rows.stop]).encode())
        digest.update(images_digest([{"image": photos[row]} for row in rows], "image").encode())
        yield _Part(f"{number:05d}", rows, digest.hexdigest())


class _Reading(Dataset):
    """Read and prepare photos one by one; a photo that cannot be read is the message that says why.

    Args:
        photos: files.
        preprocessing: source -> name of an input -> see [`APM.preprocessing`].
    """

    def __init__(
        self, photos: list[str], preprocessing: Mapping[str, Mapping[str, Callable[[list[Image.Image]], Tensor]]]
    ) -> None:
        self.photos, self.preprocessing = photos, preprocessing

    def __getitem__(self, row: int) -> dict[str, dict[str, Tensor]] | str:
        try:
            photo = [eight_bit_rgb(decode_image(self.photos[row]))]
            return {
                source: {name: prepare(photo) for name, prepare in inputs.items()}
                for source, inputs in self.preprocessing.items()
            }
        except ValueError as error:
            return str(error)

    def batches(self, parts: Sequence[_Part], batch_size: int, num_workers: int) -> Iterator["_Batch"]:
        """Yield all photos of these parts; workers read ahead over the ends of parts, batches end there."""
        rows = [
            list(part.rows[start : start + batch_size])
            for part in parts
            for start in range(0, len(part.rows), batch_size)
        ]
        loader = DataLoader(
            self,
            batch_sampler=rows,
            collate_fn=_collate,
            num_workers=num_workers,
            worker_init_fn=ignore_stop_requests,
        )
        for these, (problems, inputs) in zip(rows, loader, strict=True):
            yield _Batch(these, problems, inputs)


@dataclass(frozen=True)
class _Batch:
    rows: list[int]
    problems: list[str | None]  # of every row, None for those that were read
    inputs: dict[str, dict[str, Tensor]]  # of the others, by source; empty where there are none


def _collate(
    samples: list[dict[str, dict[str, Tensor]] | str],
) -> tuple[list[str | None], dict[str, dict[str, Tensor]]]:
    read = [sample for sample in samples if not isinstance(sample, str)]
    inputs = {
        source: {name: torch.cat([sample[source][name] for sample in read]) for name in read[0][source]}
        for source in (read[0] if read else ())
    }
    return [sample if isinstance(sample, str) else None for sample in samples], inputs


@dataclass(frozen=True)
class _Embedder:
    """Embed the photos of a part, which come next in `batches`, and save it."""

    run: Run
    apm: APM
    photos: Sequence[str]
    names: Sequence[str]
    normalize: bool
    requests: StopRequests

    def __call__(self, part: _Part, batches: Iterator[_Batch], progress: Any) -> dict[str, Any]:
        """Return what is saved beside the vectors: the part's digest, paths and unreadable photos.

        Raises:
            RunStopped: where that was asked for.
        """
        content: dict[str, Any] = {"digest": part.digest, "paths": [], "unreadable": []}
        embeds: dict[str, list[Tensor]] = {}
        done = part.rows.start
        while done < part.rows.stop:
            batch = next(batches)
            if self.requests.received:
                raise RunStopped(f"stopped by {self.requests.received} after {done} of {len(self.names)} photos")
            paths = []
            for row, problem in zip(batch.rows, batch.problems, strict=True):
                if problem is None:
                    paths.append(self.names[row])
                else:
                    content["unreadable"].append(self._unreadable(row, problem))
            for source, inputs in batch.inputs.items():
                embeds.setdefault(source, []).append(self._embed(source, inputs, paths))
            content["paths"] += paths
            done = batch.rows[-1] + 1
            progress.update(len(batch.rows))
        tensors = {source: torch.cat(values) for source, values in embeds.items()}
        self.run.save(part.name, content, tensors=safetensors.torch.save(tensors))
        return content

    def _embed(self, source: str, inputs: Mapping[str, Tensor], paths: Sequence[str]) -> Tensor:
        try:
            values = self.apm.embed(inputs, source=source)
        except ValueError as error:  # names images by their place in the batch
            raise ValueError(f"{paths[0]} to {paths[-1]}: {error}") from error
        check_finite(values, f"vectors of the {source}", paths)
        return torch.nn.functional.normalize(values, dim=1) if self.normalize else values

    def _unreadable(self, row: int, problem: str) -> dict[str, str]:
        photo, name = self.photos[row], self.names[row]
        for path, written in ((repr(photo), repr(name)), (photo, name)):  # files that travel name no local folders
            problem = problem.replace(path, written)
        logger.warning(f"left out {name}: {problem}")
        return {"photo": name, "message": problem}


def _rows(file: Path, source: str) -> np.ndarray:
    """Return the vectors of a part, `(n, F)` float32; n is 0 where no photo was readable."""
    with safe_open(file, framework="np") as tensors:
        return tensors.get_tensor(source) if source in tensors.keys() else np.empty((0, 0), np.float32)


def _name(photo: str, folder: str | os.PathLike[str] | None) -> str:
    """Return a path as it is written: UTF-8, with slashes."""
    path = photo if folder is None else os.path.relpath(photo, folder)
    return Path(path).as_posix().encode("utf-8", "backslashreplace").decode()


def _identities(apm: APM) -> dict[str, Any]:
    """Return what decides the vectors: configurations, weights by their SHA-256, image processors."""
    student, teacher = apm.model, apm.teacher
    return {
        "student": None if student is None else {"name": public_name(student.name_or_path), **apm.identity()},
        "teacher": None if teacher is None else teacher.identity(),
    }


def _write_parquet(
    target: Path, files: Sequence[Path], paths: Sequence[Sequence[str]], facts: Mapping[str, Any]
) -> None:
    import pyarrow
    from pyarrow import parquet

    width = facts["feature_size"]
    columns = [(source, pyarrow.list_(pyarrow.float32(), width)) for source in facts["sources"]]
    schema = pyarrow.schema([("path", pyarrow.string()), *columns], metadata={"apm_hf": _json(facts)})
    with atomic_file(target) as file, parquet.ParquetWriter(file, schema) as writer:
        for part, names in zip(files, paths, strict=True):
            arrays = [pyarrow.array(names, pyarrow.string())]
            for source, _ in columns:
                values = pyarrow.array(_rows(part, source).reshape(-1))
                arrays.append(pyarrow.FixedSizeListArray.from_arrays(values, width))
            if names:
                writer.write_table(pyarrow.table(arrays, schema=schema))


def _write_npy(target: Path, files: Sequence[Path], paths: Sequence[Sequence[str]], facts: Mapping[str, Any]) -> None:
    (source,) = facts["sources"]
    _write_paths(target, paths, facts)
    header = io.BytesIO()
    shape = (sum(map(len, paths)), facts["feature_size"])
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
    write_atomically(target, chain([header.getvalue()], _bytes(files, source)))


def _write_safetensors(
    target: Path, files: Sequence[Path], paths: Sequence[Sequence[str]], facts: Mapping[str, Any]
) -> None:
    _write_paths(target, paths, facts)
    shape = (sum(map(len, paths)), facts["feature_size"])
    header = safetensors_header({source: ("F32", shape, 4 * shape[0] * shape[1]) for source in facts["sources"]})
    values = chain.from_iterable(_bytes(files, source) for source in facts["sources"])
    write_atomically(target, chain([header], values))


def _bytes(files: Sequence[Path], source: str) -> Iterator[bytes]:
    for file in files:
        yield _rows(file, source).astype("<f4", copy=False).tobytes()


def _write_paths(target: Path, paths: Sequence[Sequence[str]], facts: Mapping[str, Any]) -> None:
    """Write what an array has no room for, before it: where the array is, its paths are."""
    content = {**facts, "paths": list(chain.from_iterable(paths))}
    write_atomically(target.with_suffix(".json"), _json(content) + "\n")


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=1, sort_keys=True)  # parts that were read have their keys sorted


_WRITERS: dict[str, Callable[..., None]] = {
    ".parquet": _write_parquet,
    ".npy": _write_npy,
    ".safetensors": _write_safetensors,
}

__all__ = ["SOURCES", "Vectors", "check_output", "write_vectors"]
