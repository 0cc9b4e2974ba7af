"""Run an evaluation: sharded over processes, resumable, with the same results for any number of processes.

The images of every cell are taken in batches that depend only on the plan; batches are divided among the processes.
A finished batch is a part of the [`apm_hf.runs.run.Run`]: an interrupted run loses only the batches in work, and
damaged parts are computed again. At the end the parts are joined in the plan's order into `results.jsonl`; times and
memory, which differ between runs, go into `costs.jsonl`.

Legend: B images of a batch, K classes, F width of the teacher's embeddings.
"""

import json
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate.utils import gather_object
from PIL.Image import Image
from safetensors.torch import load_file, save
from torch import Tensor
from transformers.utils import logging
from transformers.utils.logging import tqdm

from ...data.corruptions import corrupt_image, imagenet_crop
from ...pair import APM
from ...runs.files import write_atomically
from ...runs.processes import process_state
from ...runs.run import Run, own_folder
from ...runs.unreadable_images import SKIPPED, check_limit
from ...teachers import Teacher, load_teacher
from ..methods.registry import make_methods
from ..methods.task import ImageBatch, Method, MethodOutput, ZeroShotTask
from ..methods.views import view_encoder
from ..plan import Cell, Sweep, describe, short_name
from .benchmarks import LabelledImages, load_benchmark
from .label_maps import check_label_map

logger = logging.get_logger(__name__)

RESULTS, COSTS, STREAM = "results.jsonl", "costs.jsonl", "stream"
CHECKED_BY = "zero_shot"  # method whose predictions are used to check that labels fit the classes


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Configure how a plan is run.

    Args:
        output_dir: folder of the results; an interrupted run is resumed there.
        data: name in the plan -> folder, file or Hub name to read that benchmark from.
        batch_size: images per batch; methods that use the batch's statistics depend on it.
        num_views: views per image, for methods that use several.
        max_unreadable_images: maximum number of distinct unreadable images; they are skipped for every method and
            listed in `skipped_images.jsonl`.
        model: folder or name of a distilled APM, for the methods that start from one.
        command: command line shown in the report.
        allow_chance: accept labels that the teacher predicts no better than chance.
    """

    output_dir: str
    data: dict[str, str]
    batch_size: int = 16
    num_views: int = 16
    max_unreadable_images: int = 0
    model: str | None = None
    command: str = ""
    allow_chance: bool = False

    def __post_init__(self) -> None:
        if self.max_unreadable_images < 0:
            raise ValueError(f"max_unreadable_images: expected 0 or more, got {self.max_unreadable_images}")
        for name in ("batch_size", "num_views"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")


def run_evaluation(sweeps: Sequence[Sweep], config: EvaluationConfig) -> Path:
    """Run every cell of the sweeps that is not finished yet, on all processes, and join the results.

    Returns:
        The folder with `results.jsonl`, `costs.jsonl` and `run.json`, complete once every process has returned.

    Raises:
        ValueError: for a folder that holds another run or is being written by one, unknown names, methods that the
            teacher does not support, labels that do not fit the classes, or more unreadable images than
            `config.max_unreadable_images`.
    """
    state = process_state()
    data = [*config.data.values(), *(name for sweep in sweeps for name in sweep.benchmarks)]
    teachers = [name for sweep in sweeps for name in sweep.teachers]
    own_folder(config.output_dir, data=data, teacher=teachers, model=config.model)  # before anything is fetched
    evaluation = _Evaluation(sweeps, config, state)
    with evaluation.run.locked():
        return evaluation()


class _Evaluation:
    def __init__(self, sweeps: Sequence[Sweep], config: EvaluationConfig, state: Any):
        self.config, self.state = config, state
        self.folder, self.run = Path(config.output_dir), Run(config.output_dir, state)
        self.cells = [cell for sweep in sweeps for cell in sweep.cells()]
        _check_unique(self.cells)
        self.names = list(dict.fromkeys(name for sweep in sweeps for name in sweep.methods))
        self.methods = {seed: self._make_methods(seed) for seed in dict.fromkeys(cell.seed for cell in self.cells)}
        self.benchmarks: dict[str, LabelledImages] = {}
        self.sweeps = sweeps
        self.teacher: Teacher | None = None
        self.tasks: dict[str, ZeroShotTask] = {}
        self.unreadable: dict[tuple[str, int], dict[str, Any]] = {}  # (benchmark, image) -> line of SKIPPED
        for cell in self.cells:  # missing data are found before anything is computed
            self._images(cell.benchmark)

    def __call__(self) -> Path:
        self._claim_folder()
        # Clean images come first: their predictions show whether labels and classes belong together.
        for clean in (True, False):
            cells = [cell for cell in self.cells if cell.clean == clean]
            found = self._predict(cells)
            self._count_unreadable(gather_object(found))
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
        """Claim the folder for everything that determines the results: contents of models, teachers and images.

        Raises:
            ValueError: for another run's folder; the message names what differs.
        """
        methods = self.methods[self.cells[0].seed]
        identity = describe(self.sweeps, methods, batch_size=self.config.batch_size)
        identity["benchmarks"] = {
            short_name(name): {
                "title": images.title,
                "num_classes": len(images.class_names),
                "num_images": len(images),
                "class_names": list(images.class_names),
                "fingerprint": images.digest(),
            }
            for name, images in self.benchmarks.items()
        }
        identity["version"] = version("apm_hf")
        names = dict.fromkeys(cell.teacher for cell in reversed(self.cells))
        identity["teachers"] = {short_name(name): self._teacher_identity(name) for name in names}
        if self.config.model is not None:
            identity["model"] = APM.load(self.config.model).identity()
        self.run.claim(identity, facts={"command": self.config.command})

    def _load_teacher(self, name: str) -> Teacher:
        if self.teacher is None or self.teacher.name != name:
            self.teacher, self.tasks = load_teacher(name), {}
        return self.teacher

    def _teacher_identity(self, name: str) -> dict[str, Any]:
        teacher = self._load_teacher(name)
        return {**teacher.identity(), "text": teacher.text_identity()}

    def _task(self, cell: Cell) -> ZeroShotTask:
        teacher = self._load_teacher(cell.teacher)
        if cell.benchmark not in self.tasks:
            self._make_methods(cell.seed, teacher)  # raises for methods that this teacher does not support
            images = self._images(cell.benchmark)
            self.tasks[cell.benchmark] = ZeroShotTask.build(
                teacher,
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

    @staticmethod
    def _part(cell: Cell, batch: int | str) -> str:
        return f"{cell.folder}/{batch if isinstance(batch, str) else f'{batch:06d}'}"

    def _in_order(self, cell: Cell) -> list[Method]:
        methods = self.methods[cell.seed]
        return [methods[name] for name in cell.methods if methods[name].sequential]

    def _predict(self, cells: list[Cell]) -> list[dict[str, Any]]:
        """Predict this process's share of the missing batches, except for sequential methods.

        Returns:
            Records of the unreadable images that this process found.
        """
        batches = [(cell, number, batch) for cell in cells for number, batch in enumerate(self._batches(cell))]
        parts = [self.run.load(self._part(cell, number)) for cell, number, _ in batches]
        self._count_unreadable(line for part in parts if part is not None for line in part["unreadable"])
        todo = [batch for batch, part in zip(batches, parts, strict=True) if part is None]
        self.state.wait_for_everyone()  # so that all processes divide the same list
        mine = todo[self.state.process_index :: self.state.num_processes]
        if cells and self.state.is_main_process:
            done, shared = len(batches) - len(todo), f"{self.state.num_processes} processes"
            logger.info(f"{done} of {len(batches)} batches are done, the others are divided among {shared}.")
        total, quiet = sum(len(batch) for *_, batch in mine), not self.state.is_main_process
        found: list[dict[str, Any]] = []
        with tqdm(total=total, desc="evaluate", unit="image", disable=quiet) as progress:
            for cell, number, indices in mine:
                progress.set_postfix_str(f"{cell.benchmark} {cell.corruption} {cell.severity}")
                found += self._predict_batch(cell, number, indices)
                progress.update(len(indices))
        return found

    def _predict_batch(self, cell: Cell, number: int, indices: list[int]) -> list[dict[str, Any]]:
        """Predict and save one batch, and return records of its unreadable images."""
        task, data = self._task(cell), self._images(cell.benchmark)
        images, indices, unreadable = self._readable(cell, indices)
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
        by_name = self.methods[cell.seed]
        methods = [by_name[name] for name in cell.methods if not by_name[name].sequential]
        lines, costs = self._result_lines(cell, task, batch, labels, methods)
        tensors = None
        if self._in_order(cell):
            embeds, seconds = torch.empty(0, task.teacher.feature_size), 0.0
            if indices:
                embeds, seconds = batch.embeds()[:, 0].contiguous().cpu(), batch.view_seconds[0]
            tensors = save(
                {
                    "images": torch.tensor(indices, dtype=torch.int64),
                    "image_embeds": embeds,
                    "seconds": torch.tensor(seconds, dtype=torch.float64),
                }
            )
        content = {"lines": lines, "costs": costs, "unreadable": unreadable}
        self.run.save(self._part(cell, number), content, tensors=tensors)
        self._count_unreadable(unreadable)
        return unreadable

    def _readable(self, cell: Cell, indices: list[int]) -> tuple[list[Image], list[int], list[dict[str, Any]]]:
        """Return a batch's readable images, their indices, and records of the unreadable ones.

        Raises:
            ValueError: for an unreadable image if none is allowed.
        """
        data, images, good, unreadable = self._images(cell.benchmark), [], [], []
        for index in indices:
            try:
                images.append(data.image(index))
            except ValueError as error:
                if not self.config.max_unreadable_images:
                    raise
                unreadable.append({"benchmark": short_name(cell.benchmark), "image": index, "reason": str(error)})
                logger.warning(f"skipped {error}")
            else:
                good.append(index)
        return images, good, unreadable

    def _count_unreadable(self, records: Iterable[dict[str, Any]]) -> None:
        """Add records to those known to this process, each image once.

        Raises:
            ValueError: for more unreadable images than are allowed.
        """
        self.unreadable.update({(line["benchmark"], line["image"]): line for line in records})
        check_limit([line["reason"] for line in self.unreadable.values()], self.config.max_unreadable_images)

    def _predict_in_order(self, cells: list[Cell]) -> None:
        """Run sequential methods: every cell by one process, from the cached embeddings."""
        todo = [cell for cell in cells if self._in_order(cell) and self.run.load(self._part(cell, STREAM)) is None]
        self.state.wait_for_everyone()
        for cell in todo[self.state.process_index :: self.state.num_processes]:
            task, data = self._task(cell), self._images(cell.benchmark)
            earlier = torch.empty(0, task.teacher.feature_size, device=task.teacher.device)
            all_lines, all_costs = [], []
            for number in range(len(self._batches(cell))):
                cached = load_file(self.run.tensors(self._part(cell, number)))
                indices = cached["images"].tolist()
                embeds, seconds = cached["image_embeds"].to(task.teacher.device), [cached["seconds"].item()]
                seeds = [cell.image_seed(index) for index in indices]
                batch = ImageBatch([], indices, seeds, _no_other_view, earlier, seconds, _views=[embeds])
                labels = [data.label(index) for index in indices]
                lines, costs = self._result_lines(cell, task, batch, labels, self._in_order(cell))
                all_lines.append(lines)
                all_costs.append(costs)
                earlier = torch.cat([earlier, embeds])
            self.run.save(self._part(cell, STREAM), {"lines": "".join(all_lines), "costs": "".join(all_costs)})

    @staticmethod
    def _result_lines(
        cell: Cell, task: ZeroShotTask, batch: ImageBatch, labels: list[int], methods: list[Method]
    ) -> tuple[str, str]:
        """Return the lines of results and of costs."""
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

    def _lines(self, cell: Cell, kind: str) -> Iterator[str]:
        parts: list[int | str] = list(range(len(self._batches(cell))))
        for batch in parts + [STREAM] * bool(self._in_order(cell)):
            content = self.run.load(self._part(cell, batch))
            if content is None:
                raise ValueError(f"output_dir: expected the part {self._part(cell, batch)}, found none; run it again")
            yield content[kind]

    def _check_labels(self, cells: list[Cell]) -> None:
        for cell in cells:
            if CHECKED_BY not in cell.methods:
                continue
            rows = [json.loads(line) for text in self._lines(cell, "lines") for line in text.splitlines()]
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
        for name, kind in ((RESULTS, "lines"), (COSTS, "costs")):
            write_atomically(self.folder / name, (text for cell in self.cells for text in self._lines(cell, kind)))
        if self.unreadable:
            lines = (json.dumps(self.unreadable[key]) + "\n" for key in sorted(self.unreadable))
            write_atomically(self.folder / SKIPPED, lines)
        self.run.finish((RESULTS, COSTS, SKIPPED))


def _check_unique(cells: list[Cell]) -> None:
    requested = Counter((*cell.labels().values(), name) for cell in cells for name in cell.methods)
    if repeated := [key for key, count in requested.items() if count > 1]:
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
    raise ValueError(f"expected a sequential method to use only the image itself, got view {view}")


class PeakMemory:
    """Measure a block's peak bytes above its start: of the GPU's allocator, else of this process, sampled."""

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
            self._update()

    def _update(self) -> None:
        self.peak_bytes = max(self.peak_bytes, self.process.memory_info().rss - self.start)

    def __exit__(self, *error: Any) -> None:
        if self.device.type == "cuda":
            self.peak_bytes = torch.cuda.max_memory_allocated(self.device) - self.start
            return
        self.stop.set()
        self.thread.join()
        self._update()
