"""Runs an evaluation: sharded over processes, resumable, and with the same bytes however it was cut.

The images of every cell are taken in batches that depend on nothing but the plan; processes share the batches out.
A finished batch is a file of its own, renamed into place, so what is killed loses the batches in work and no more. At
the end the files are joined in the plan's order into `results.jsonl`; times and memory, which no two runs share, go
into `costs.jsonl`, and what was run into `run.json`.

Legend: B images of a batch, K classes, F width of the teacher's embeddings.
"""

import json
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from PIL.Image import Image
from safetensors.torch import load_file, save
from torch import Tensor
from transformers.utils import logging
from transformers.utils.logging import tqdm

from ...data.corruptions import corrupt_image, imagenet_crop
from ...runs import provenance
from ...runs.files import write_atomically
from ...runs.processes import process_state
from ...runs.stopping import LOCK, only_writer
from ...runs.unreadable_images import SKIPPED
from ...teachers import Teacher, load_teacher
from ..methods.registry import make_methods
from ..methods.task import ImageBatch, Method, MethodOutput, ZeroShotTask
from ..methods.views import view_encoder
from ..plan import Cell, Sweep, describe, short_name
from .benchmarks import LabelledImages, load_benchmark
from .label_maps import check_label_map

logger = logging.get_logger(__name__)

RESULTS, COSTS, RUN, PARTS = "results.jsonl", "costs.jsonl", "run.json", "parts"
CHECKED_BY = "zero_shot"  # whose predictions say whether the labels fit the classes


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How a plan is run.

    Args:
        output_dir: of the results; a run that was interrupted goes on there.
        data: name in the plan -> folder, file or Hub name to read that benchmark from.
        batch_size: images at a time; methods that use the batch's statistics depend on it.
        num_views: of methods that look at several views.
        max_bad_images: so many different images that cannot be read are left out, for every method, and listed in
            `skipped_images.jsonl`.
        model: folder or name of a distilled APM, for the methods that start from one.
        command: what the report says made it.
        allow_chance: do not refuse labels that the teacher's predictions have nothing to do with.
    """

    output_dir: str
    data: dict[str, str]
    batch_size: int = 16
    num_views: int = 16
    max_bad_images: int = 0
    model: str | None = None
    command: str = ""
    allow_chance: bool = False

    def __post_init__(self) -> None:
        if self.max_bad_images < 0:
            raise ValueError(f"max_bad_images: expected 0 or more, got {self.max_bad_images}")
        for name in ("batch_size", "num_views"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")


def run_evaluation(sweeps: Sequence[Sweep], config: EvaluationConfig) -> Path:
    """Run every cell of the sweeps that is not there yet, on all processes, and join the results.

    Returns:
        The folder with `results.jsonl`, `costs.jsonl` and `run.json`, complete once every process has returned.

    Raises:
        ValueError: for a folder that holds another run or that one is writing, unknown names, methods that the
            teacher cannot serve, labels that do not belong to the classes, or more images that cannot be read than
            `config.max_bad_images`.
    """
    state = process_state()
    run = _Run(sweeps, config, state)
    with only_writer(Path(config.output_dir), state):
        return run()


class _Run:
    def __init__(self, sweeps: Sequence[Sweep], config: EvaluationConfig, state: Any):
        self.config, self.state = config, state
        self.folder = Path(config.output_dir)
        self.cells = [cell for sweep in sweeps for cell in sweep.cells()]
        _check_unique(self.cells)
        self.names = list(dict.fromkeys(name for sweep in sweeps for name in sweep.methods))
        self.methods = {seed: self._make_methods(seed) for seed in dict.fromkeys(cell.seed for cell in self.cells)}
        self.benchmarks: dict[str, LabelledImages] = {}
        self.sweeps = sweeps
        self.teacher: Teacher | None = None
        self.tasks: dict[str, ZeroShotTask] = {}
        for cell in self.cells:  # what is missing is found before anything is computed
            self._images(cell.benchmark)

    def __call__(self) -> Path:
        self._claim_folder()
        # Clean images come first: their predictions say whether labels and classes belong together.
        for clean in (True, False):
            cells = [cell for cell in self.cells if cell.clean == clean]
            self._predict(cells)
            self.state.wait_for_everyone()
            self._predict_in_order(cells)
            self.state.wait_for_everyone()
            if clean and self.state.is_main_process:
                self._check_labels(cells)
            self.state.wait_for_everyone()
        if self.state.is_main_process:
            self._join()
        self.state.wait_for_everyone()
        return self.folder

    # Before

    def _make_methods(self, seed: int, teacher: Teacher | None = None) -> dict[str, Method]:
        options: dict[str, Any] = {
            "num_views": self.config.num_views,
            "model": self.config.model,
            "seed": seed,
            "teacher": teacher,
        }
        return {method.name: method for method in make_methods(self.names, **options)}

    def _images(self, name: str) -> LabelledImages:
        if name not in self.benchmarks:
            self.benchmarks[name] = load_benchmark(name, data=self.config.data.get(name))
        return self.benchmarks[name]

    def _claim_folder(self) -> None:
        """Write `run.json`, or go on with the run that it describes.

        Raises:
            ValueError: another run's folder; says what differs.
        """
        methods = self.methods[self.cells[0].seed]
        description = describe(self.sweeps, methods, batch_size=self.config.batch_size)
        description["benchmarks"] = {
            short_name(name): {
                "title": images.title,
                "num_classes": len(images.class_names),
                "num_images": len(images),
                "class_names": list(images.class_names),
            }
            for name, images in self.benchmarks.items()
        }
        description["teachers"] = list(dict.fromkeys(short_name(cell.teacher) for cell in self.cells))
        description = json.loads(json.dumps(description))  # as it will be read
        path = self.folder / RUN
        if path.exists():
            found = json.loads(path.read_text())
            if changed := sorted(key for key in description if found.get(key) != description[key]):
                raise ValueError(
                    f"output_dir: expected an empty folder or the same run, got another run in {self.folder}, "
                    f"which differs in {', '.join(changed)}"
                )
        elif any(found.name != LOCK for found in self.folder.iterdir()):
            raise ValueError(f"output_dir: expected an empty folder or a run to go on with, got {self.folder}")
        self.state.wait_for_everyone()  # every process has looked before one writes
        if self.state.is_main_process and not path.exists():
            facts = {
                "command": self.config.command,
                "commit": provenance.commit(),
                "versions": provenance.versions(),
                "machine": provenance.machine(),
            }
            write_atomically(path, json.dumps(facts | description, indent=1) + "\n")
        self.state.wait_for_everyone()

    def _task(self, cell: Cell) -> ZeroShotTask:
        if self.teacher is None or self.teacher.name != cell.teacher:
            self.teacher, self.tasks = load_teacher(cell.teacher), {}
            self._make_methods(cell.seed, self.teacher)  # says what this teacher cannot serve
        if cell.benchmark not in self.tasks:
            images = self._images(cell.benchmark)
            self.tasks[cell.benchmark] = ZeroShotTask.build(
                self.teacher,
                images.class_names,
                templates=images.templates,
                ensemble_templates=images.ensemble_templates,
            )
        return self.tasks[cell.benchmark]

    # Predicting

    def _batches(self, cell: Cell) -> list[list[int]]:
        indices = cell.indices(len(self._images(cell.benchmark)))
        size = self.config.batch_size
        return [indices[start : start + size] for start in range(0, len(indices), size)]

    def _part(self, cell: Cell, name: str) -> Path:
        return self.folder / PARTS / cell.folder / name

    def _in_order(self, cell: Cell) -> list[Method]:
        methods = self.methods[cell.seed]
        return [methods[name] for name in cell.methods if methods[name].sequential]

    def _predict(self, cells: list[Cell]) -> None:
        """Every batch that is not there yet and is this process's share, methods that need an order aside."""
        everything = [(cell, number, batch) for cell in cells for number, batch in enumerate(self._batches(cell))]
        todo = [entry for entry in everything if not self._part(entry[0], f"{entry[1]:06d}.jsonl").exists()]
        self.state.wait_for_everyone()  # so that all share out the same list
        mine = todo[self.state.process_index :: self.state.num_processes]
        if cells and self.state.is_main_process:
            there, shared = len(everything) - len(todo), f"{self.state.num_processes} processes"
            logger.info(f"{there} of {len(everything)} batches are there, the others are for {shared}.")
        total, quiet = sum(len(batch) for *_, batch in mine), not self.state.is_main_process
        with tqdm(total=total, desc="evaluate", unit="image", disable=quiet) as progress:
            for cell, number, indices in mine:
                progress.set_postfix_str(f"{cell.benchmark} {cell.corruption} {cell.severity}")
                self._predict_batch(cell, number, indices)
                progress.update(len(indices))

    def _predict_batch(self, cell: Cell, number: int, indices: list[int]) -> None:
        task, data = self._task(cell), self._images(cell.benchmark)
        images, indices = self._readable(cell, number, indices)
        if not cell.clean:
            crop = imagenet_crop if data.constants == "imagenet" else (lambda image: image)
            images = [
                corrupt_image(
                    crop(image),
                    cell.corruption,
                    severity=cell.severity,
                    seed=cell.image_seed(index, f"{cell.corruption}-{cell.severity}"),
                    constants=data.constants,
                )
                for image, index in zip(images, indices, strict=True)
            ]
        seeds = [cell.image_seed(index) for index in indices]
        batch = ImageBatch(images, indices, seeds, view_encoder(task.teacher))
        labels = [data.label(index) for index in indices]
        own = self.methods[cell.seed]
        methods = [own[name] for name in cell.methods if not own[name].sequential]
        lines, costs = self._answers(cell, task, batch, labels, methods)
        if self._in_order(cell):
            embeds, seconds = torch.empty(0, task.teacher.feature_size), 0.0
            if indices:
                embeds, seconds = batch.embeds()[:, 0].contiguous().cpu(), batch.view_seconds[0]
            kept = save(
                {
                    "images": torch.tensor(indices, dtype=torch.int64),
                    "image_embeds": embeds,
                    "seconds": torch.tensor(seconds, dtype=torch.float64),
                }
            )
            write_atomically(self._part(cell, f"{number:06d}.safetensors"), kept)
        write_atomically(self._part(cell, f"{number:06d}.costs.jsonl"), costs)
        # Last: this file says that the batch is done.
        write_atomically(self._part(cell, f"{number:06d}.jsonl"), lines)

    def _readable(self, cell: Cell, number: int, indices: list[int]) -> tuple[list[Image], list[int]]:
        """The images of a batch that can be read, and which they are; the others are listed.

        Raises:
            ValueError: for more in the whole run than the limit.
        """
        data, images, good, bad = self._images(cell.benchmark), [], [], []
        for index in indices:
            try:
                images.append(data.image(index))
            except ValueError as error:
                if not self.config.max_bad_images:
                    raise
                bad.append({"benchmark": short_name(cell.benchmark), "image": index, "reason": str(error)})
                logger.warning(f"skipped {error}")
            else:
                good.append(index)
        if bad:
            lines = (json.dumps(line) + "\n" for line in bad)
            write_atomically(self._part(cell, f"{number:06d}.{SKIPPED}"), lines)
            if len(skipped := self._skipped()) > self.config.max_bad_images:
                raise ValueError(
                    f"max_bad_images: expected at most {self.config.max_bad_images} unreadable images, got "
                    f"{len(skipped)}, the last of them {bad[-1]['reason']}"
                )
        return images, good

    def _skipped(self) -> list[dict[str, Any]]:
        """What all processes have left out so far, an image once, in order."""
        texts = (path.read_text() for path in (self.folder / PARTS).glob(f"*/*.{SKIPPED}"))
        lines = [json.loads(line) for text in texts for line in text.splitlines()]
        found = {(line["benchmark"], line["image"]): line for line in lines}
        return [found[key] for key in sorted(found)]

    def _predict_in_order(self, cells: list[Cell]) -> None:
        """Methods that need the images before: every cell by one process, from the embeddings kept."""
        todo = [cell for cell in cells if self._in_order(cell) and not self._part(cell, "stream.jsonl").exists()]
        self.state.wait_for_everyone()
        for cell in todo[self.state.process_index :: self.state.num_processes]:
            task, data = self._task(cell), self._images(cell.benchmark)
            earlier = torch.empty(0, task.teacher.feature_size, device=task.teacher.device)
            all_lines, all_costs = [], []
            for number in range(len(self._batches(cell))):
                kept = load_file(self._part(cell, f"{number:06d}.safetensors"))
                indices = kept["images"].tolist()
                embeds, seconds = kept["image_embeds"].to(task.teacher.device), [kept["seconds"].item()]
                seeds = [cell.image_seed(index) for index in indices]
                batch = ImageBatch([], indices, seeds, _no_other_view, earlier, seconds, _views=[embeds])
                labels = [data.label(index) for index in indices]
                lines, costs = self._answers(cell, task, batch, labels, self._in_order(cell))
                all_lines.append(lines)
                all_costs.append(costs)
                earlier = torch.cat([earlier, embeds])
            write_atomically(self._part(cell, "stream.costs.jsonl"), "".join(all_costs))
            write_atomically(self._part(cell, "stream.jsonl"), "".join(all_lines))

    @staticmethod
    def _answers(
        cell: Cell, task: ZeroShotTask, batch: ImageBatch, labels: list[int], methods: list[Method]
    ) -> tuple[str, str]:
        """Lines of results and of costs."""
        lines, costs = [], []
        for method in methods if batch.indices else ():
            with PeakMemory(task.teacher.device) as memory:
                output, seconds = batch.timed(method, task)
            _check_output(method, output, len(batch.indices), len(task.class_names))
            for row in _rows(output):
                position = row.pop("position")
                index = {"method": method.name, "image": batch.indices[position], "label": labels[position]}
                lines.append(json.dumps(cell.labels() | index | row) + "\n")
            cost = {"images": len(labels), "seconds": seconds, "peak_bytes": memory.peak_bytes}
            costs.append(json.dumps(cell.labels() | {"method": method.name} | cost) + "\n")
        return "".join(lines), "".join(costs)

    # After

    def _lines(self, cell: Cell, suffix: str) -> Iterator[str]:
        for number in range(len(self._batches(cell))):
            yield self._part(cell, f"{number:06d}{suffix}").read_text()
        if self._in_order(cell):
            yield self._part(cell, f"stream{suffix}").read_text()

    def _check_labels(self, cells: list[Cell]) -> None:
        for cell in cells:
            if CHECKED_BY not in cell.methods:
                continue
            rows = [json.loads(line) for text in self._lines(cell, ".jsonl") for line in text.splitlines()]
            rows = [row for row in rows if row["method"] == CHECKED_BY]
            try:
                check_label_map(
                    [row["label"] for row in rows],
                    [row["top5"][0] for row in rows],
                    self._images(cell.benchmark).class_names,
                    allow_chance=self.config.allow_chance,
                )
            except ValueError as error:
                raise ValueError(f"{cell.benchmark}: {error}") from error

    def _join(self) -> None:
        for name, suffix in ((RESULTS, ".jsonl"), (COSTS, ".costs.jsonl")):
            write_atomically(self.folder / name, (text for cell in self.cells for text in self._lines(cell, suffix)))
        if skipped := self._skipped():
            write_atomically(self.folder / SKIPPED, (json.dumps(line) + "\n" for line in skipped))


def _check_unique(cells: list[Cell]) -> None:
    asked = Counter((*cell.labels().values(), name) for cell in cells for name in cell.methods)
    if repeated := [key for key, count in asked.items() if count > 1]:
        raise ValueError(f"sweeps: expected a method once under the same conditions, got twice {repeated[0]}")


def _rows(output: MethodOutput) -> Iterator[dict[str, Any]]:
    probabilities, ranked = output.logits.double().softmax(dim=1).sort(dim=1, descending=True, stable=True)
    top5, confidences = ranked[:, :5].tolist(), probabilities[:, 0].tolist()
    for position, (classes, confidence) in enumerate(zip(top5, confidences, strict=True)):
        # Six digits: the last bits of a float32 are noise.
        row: dict[str, Any] = {"position": position, "top5": classes, "confidence": float(f"{confidence:.6g}")}
        if output.steps is not None:
            row["steps"] = int(output.steps[position])
        if output.by_step is not None:
            row["by_step"] = {str(step): int(classes[position]) for step, classes in output.by_step.items()}
        yield row


def _check_output(method: Method, output: MethodOutput, num_images: int, num_classes: int) -> None:
    if output.logits.shape != (num_images, num_classes):
        raise ValueError(
            f"{method.name}: expected logits ({num_images}, {num_classes}), got {tuple(output.logits.shape)}"
        )
    if output.logits.isnan().any() or output.logits.isneginf().all(dim=1).any():
        raise ValueError(f"{method.name}: expected logits that name a class, got NaN or nothing but -inf")


def _no_other_view(batch: ImageBatch, view: int) -> Tensor:
    raise ValueError(f"expected a sequential method to look at the image itself alone, got view {view}")


class PeakMemory:
    """Bytes that a block of code took above its start: of the GPU's allocator, else of this process, sampled."""

    def __init__(self, device: torch.device, *, interval: float = 0.005):
        self.device, self.interval, self.peak_bytes = device, interval, 0

    def __enter__(self) -> "PeakMemory":
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.start = torch.cuda.memory_allocated(self.device)
            return self
        self.process, self.stop = psutil.Process(), threading.Event()
        self.start = self.process.memory_info().rss
        self.thread = threading.Thread(target=self._sample, daemon=True)
        self.thread.start()
        return self

    def _sample(self) -> None:
        while not self.stop.wait(self.interval):
            self._look()

    def _look(self) -> None:
        self.peak_bytes = max(self.peak_bytes, self.process.memory_info().rss - self.start)

    def __exit__(self, *error: Any) -> None:
        if self.device.type == "cuda":
            self.peak_bytes = torch.cuda.max_memory_allocated(self.device) - self.start
            return
        self.stop.set()
        self.thread.join()
        self._look()
