"""Distillation: many images, one student, through Accelerate. The same loop runs on one CPU and on many GPUs.

Source: arXiv:2410.20535, section 3, the grid recipe: mean squared errors to the teacher's patch features and to the
image's own colours, Adam 1e-4, batch 64.
Legend: B images in a process's batch, L locations, F feature width, (rows, cols) the teacher's grid.
"""

import copy
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate
from transformers import get_cosine_schedule_with_warmup
from transformers.utils import logging
from transformers.utils.logging import tqdm

from ..data.split_streams import PlacedCollator, SplitStream, StreamPlace
from ..modeling_apm import APMModel
from ..runs.checkpoints import Checkpoints, progress_of
from ..runs.files import writable_folder
from ..runs.processes import process_state
from ..runs.progress import no_loading_bars
from ..runs.run import Run
from ..runs.stopping import RunStopped, StopRequests, ignore_stop_requests
from ..runs.unreadable_images import SkippedImages, readable
from ..teachers import Teacher
from ..teachers.feature_cache import CachedImages
from ..teachers.licenses import inherit, record_weights
from .controls import IMAGES, Controls, measure_controls
from .engine import compile_in_place, make_accelerator, make_optimizer, prepare, sharded, whole_student
from .epoch_sampler import EpochSampler
from .feature_statistics import set_statistics, statistics_of
from .objective import MAIN, Objective
from .resuming import MADE, check_changes, facts, make_room
from .settings import DistillationConfig, DistillationResult
from .speed import SpeedMeter
from .targets import TargetMaker
from .validation import ValidationMetrics, validation_picture, worse_than_constant

logger = logging.get_logger(__name__)


def distill(
    student: APMModel,
    train_data: Dataset,
    *,
    config: DistillationConfig,
    image_processor: Any,
    teacher: Teacher | None = None,
    teachers: Mapping[str, Teacher] | None = None,
    validation_data: Dataset | None = None,
    collate_fn: Callable[[list[Any]], dict[str, Tensor]] | None = None,
) -> DistillationResult:
    """Fit a student to its teachers and save it, with its image processor, to `config.output_dir`.

    The saved configuration names the teachers it was distilled from, beside what the student's already did, and
    their feature statistics where they were measured.

    Args:
        student: trained in place.
        train_data: rows that `collate_fn` turns into `pixel_values` and, unless they hold the targets themselves (see
            [`TargetMaker`]), `teacher_pixel_values`.
        config: see [`DistillationConfig`].
        image_processor: the student's; saved beside it.
        teacher: frozen; computes the targets.
        teachers: additional ones, by the names of the student's `teacher_heads`. Heads whose teacher is missing are
            left unchanged, unless batches carry their targets.
        validation_data: rows like those of `train_data`.
        collate_fn: e.g. [`apm_hf.data.images.ImageCollator`].

    Raises:
        ValueError: for a student whose features are not as wide as the teacher's, a loss that is not finite, a folder
            that another run is writing or that holds something, without `config.resume` or `config.overwrite`; with
            `config.resume`, where all checkpoints are damaged or the run is another.
        FileNotFoundError: with `config.resume`, where there is no checkpoint.
        OSError: for an `output_dir` that cannot be written to.
        RunStopped: after SIGTERM or SIGINT, when the step is done and a checkpoint saved. A `SystemExit`: a program
            that lets it pass ends with status `apm_hf.runs.stopping.EXIT_STOPPED`.
    """
    writable_folder(config.output_dir)  # before anything is computed
    if teacher is not None and teacher.feature_size != student.config.feature_size:
        raise ValueError(
            f"feature_size: expected the teacher's {teacher.feature_size}, got {student.config.feature_size}"
        )
    for name, additional in (teachers or {}).items():
        width = student.config.teacher_head(name)["feature_size"]
        if additional.feature_size != width:
            raise ValueError(f"teacher_heads: expected {name!r} to be {additional.feature_size} wide, got {width}")
    if student.config.trigger_source == "tokens":
        raise ValueError("trigger_source: expected 'columns', 'conv' or 'embedding', got 'tokens': use distill_dense")
    num_layers, num_levels = len(config.level_layers or ()), student.config.num_levels
    if teacher is not None and config.level_weight and num_layers != num_levels:
        raise ValueError(
            f"level_layers: expected as many layers as the student has levels, {num_levels}, got {config.level_layers}"
        )
    student.config = copy.deepcopy(student.config)  # others may be made of the one given: what is found is this one's
    inherit(student.config, [one for one in (teacher, *(teachers or {}).values()) if one is not None])
    if teacher is not None:
        record_weights(student.config, teacher)
    with Run(config.output_dir, process_state()).locked() as run:
        options = (config, image_processor, teacher, teachers, validation_data, collate_fn)
        return _Distillation(run, student, train_data, *options)()


def _digest(data: Any) -> str | None:
    """Return what identifies a data set; None where it does not say."""
    return data.digest() if hasattr(data, "digest") else None


class _Distillation:
    def __init__(
        self, run, student, train_data, config, image_processor, teacher, teachers, validation_data, collate_fn
    ):
        self.run = run
        self.config, self.image_processor, self.architecture = config, image_processor, student.config
        self.output_dir = Path(config.output_dir)
        self.accelerator = make_accelerator(config, student.config, heads=teachers or ())
        targets = TargetMaker(
            teacher,
            image_processor,
            layers=config.level_layers,
            teachers=teachers,
            teacher_batch_size=config.teacher_batch_size,
        )
        self.objective = Objective(
            student.config,
            targets,
            config.loss_weights,
            distance=config.feature_loss,
            num_locations=config.num_locations,
            jitter=config.jitter,
        )
        self.train_data, streaming = train_data, isinstance(train_data, IterableDataset)
        if not streaming and len(train_data) == 0:
            raise ValueError("train_data: expected at least one image, got none")
        self.sampler = None if streaming else EpochSampler(len(train_data), config.seed)
        processes = self.accelerator.num_processes
        self.max_steps = config.steps_for(None if streaming else len(train_data), processes)
        self.facts = facts(
            config,
            student.config,
            {name: one for name, one in {MAIN: teacher, **(teachers or {})}.items() if one is not None},
            image_processor=image_processor,
            num_images=None if streaming else len(train_data),
            data=_digest(train_data),
            validation_data=_digest(validation_data),
            num_processes=processes,
            sharded=sharded(self.accelerator),
            feature_cache=train_data.cache.facts if isinstance(train_data, CachedImages) else None,
        )
        self.checkpoints = Checkpoints(self.output_dir, keep=config.keep_checkpoints)
        self.resumed: Path | None = None
        self.progress: dict[str, Any] = {}
        if config.resume:
            self.resumed, self.progress = self._checkpoint()
        else:
            self._begin()
        self._set_statistics(student, collate_fn)
        self.controls = {} if validation_data is None else self._measure_controls(collate_fn, validation_data)
        self.stream: StreamPlace | None = None
        if isinstance(train_data, SplitStream):
            train_data.share(self.accelerator.process_index, processes, config.num_workers)
            self.stream = StreamPlace(train_data)
        optimizer = make_optimizer(student, config.learning_rate, self.accelerator.device)
        train_loader = DataLoader(
            train_data,
            batch_size=config.batch_size,
            sampler=self.sampler,
            collate_fn=PlacedCollator(collate_fn) if self.stream else collate_fn,
            num_workers=config.num_workers,
            worker_init_fn=ignore_stop_requests,
            drop_last=not streaming and len(train_data) >= config.batch_size * processes,
        )
        self.student, self.optimizer = prepare(self.accelerator, student, optimizer)
        compile_in_place(self.student, config.torch_compile)
        if self.stream:  # every process reads its own part: there is nothing to hand out
            device = self.accelerator.device
            self.train_loader = prepare_data_loader(
                train_loader, device, 1, 0, put_on_device=True, dispatch_batches=False
            )
        else:
            self.train_loader = self.accelerator.prepare(train_loader)
        self._set_schedule(0)
        self.validation_loader = None
        if validation_data is not None:
            loader = DataLoader(validation_data, batch_size=config.batch_size, collate_fn=collate_fn)
            self.validation_loader = self.accelerator.prepare(loader)
        self.skipped = SkippedImages(
            self.output_dir,
            config.max_unreadable_images,
            gather=self.accelerator.gather,
            is_main_process=self.accelerator.is_main_process,
        )
        self.speed = SpeedMeter(
            self.accelerator.device,
            processes,
            largest=self._largest,
            peak=None if config.peak_tflops is None else config.peak_tflops * 1e12,
        )
        self.objective.around_teachers = self.speed.teacher
        self.metrics: list[dict[str, float]] = []
        # Where in the data the run is: images of this epoch that all processes together are done with.
        self.epoch, self.images, self.images_a_pass = 0, 0, config.batch_size * processes

    def __call__(self) -> DistillationResult:
        config, accelerator = self.config, self.accelerator
        logger.info(f"processes: {accelerator.num_processes}, device: {accelerator.device.type}")
        if config.report_to != "none":
            scalars = (bool, int, float, str)  # trackers take no others
            given = {name: value for name, value in vars(config).items() if value is not None}
            tracked = {name: value if isinstance(value, scalars) else str(value) for name, value in given.items()}
            accelerator.init_trackers("distillation", config=tracked)
        step = self._resume(self.resumed) if self.resumed else 0
        self.skipped.begin(step)
        with StopRequests() as requests:
            step = self._train(step, requests)
            result = self._finish() if step >= self.max_steps else None
        # A DDP wrapper that outlives its process group destroys the group while it holds the interpreter's lock: if a
        # thread of the group then waits for the lock, both wait forever.
        self.student, self.optimizer = accelerator.free_memory(self.student, self.optimizer)
        del self.scheduler  # it knows the optimizer
        accelerator.end_training()  # leaves the process group: no process can wait for another afterwards
        if result is None:
            stopped = RunStopped(f"stopped by {requests.received or 'another process'}, saved after step {step}")
            logger.info(str(stopped))
            raise stopped
        return result

    def _train(self, step: int, requests: StopRequests) -> int:
        """Train until the last step or until a process is asked to stop; return the number of steps done."""
        config, accelerator = self.config, self.accelerator
        if step == 0:
            self._validate(step)
        progress = tqdm(
            total=self.max_steps, initial=step, desc="distil", disable=not accelerator.is_local_main_process
        )
        passes: list[tuple[float, dict[str, Tensor]]] = []  # of the step under way, with their weights
        self.student.train()
        self.speed.begin()
        for batch in self._batches() if step < self.max_steps else ():
            with accelerator.accumulate(self.student), self.speed.one_pass(len(batch["pixel_values"])):
                self._step(batch, step, passes)
            if not accelerator.sync_gradients:
                continue
            step += 1
            whole = sum(weight for weight, _ in passes)
            losses = {
                name: torch.stack([one[name] * weight for weight, one in passes]).sum() / whole
                for name in passes[0][1]
            }
            passes = []
            progress.update()
            if step % config.logging_steps == 0 or step == self.max_steps:
                self._report(step, losses, progress)
            if step % config.validation_steps == 0 or step == self.max_steps:
                with self.speed.paused():
                    self._validate(step)
            if step == self.max_steps:
                break
            stopped = self._any(requests.received)
            if stopped or (config.checkpoint_steps and step % config.checkpoint_steps == 0):
                with self.speed.paused():
                    self._save_checkpoint(step)
            if stopped:
                break
        progress.close()
        return step

    def _any(self, value: object) -> bool:
        """Return whether the value is true in any process, the same in all of them."""
        if self.accelerator.num_processes == 1:
            return bool(value)
        return self._largest(float(bool(value))) > 0

    def _largest(self, value: float) -> float:
        """Return the largest of all processes' numbers."""
        own = torch.tensor([value], dtype=torch.float32, device=self.accelerator.device)
        return self.accelerator.gather(own).max().item()

    def _set_statistics(self, student: APMModel, collate_fn: Callable | None) -> None:
        """Measure the teachers' feature statistics; a resumed run keeps those it began with."""
        if self.config.resume:
            for name, statistics in self.progress["statistics"].items():
                student.set_feature_statistics(**statistics, head=name)
        elif self.config.statistics_images:
            share = (self.accelerator.process_index, self.config.statistics_images, self.accelerator.num_processes)
            features = (self.objective.features(batch) for batch in self._first_batches(collate_fn, *share))
            gather, device = self.accelerator.gather, self.accelerator.device
            set_statistics(
                student, features, kind=self.config.statistics, gather=lambda packed: gather(packed.to(device))
            )

    def _measure_controls(self, collate_fn: Callable | None, validation_data: Dataset) -> dict[str, Controls]:
        """Measure in one process what the student will be compared with, on no more images than it learns from."""
        config = self.config
        found: list[dict[str, Controls]] = [{}]
        if self.accelerator.is_main_process:
            step = config.batch_size * config.gradient_accumulation_steps * self.accelerator.num_processes
            streamed = isinstance(validation_data, IterableDataset)
            places: Any = range(0 if streamed else len(validation_data))  # type: ignore[arg-type]
            rows = iter(validation_data) if streamed else (validation_data[index] for index in places)
            batches = (
                self._first_batches(collate_fn, 0, min(IMAGES, self.max_steps * step), 1),
                self._collated(rows, collate_fn),
            )
            with torch.no_grad(), no_loading_bars():
                found = [
                    measure_controls(
                        *(((batch, self.objective.targets_by_head(batch)) for batch in some) for some in batches),
                        reads_embedding=self.architecture.trigger_source == "embedding",
                        seed=config.seed,
                    )
                ]
        (controls,) = broadcast_object_list(found)
        if not controls:
            logger.warning("validation: R² needs two images to validate on and one to learn from; it is left out")
        return controls

    def _first_batches(self, collate_fn: Callable | None, *share: int) -> Iterator[dict[str, Tensor]]:
        """Yield a share, (first, last, step), of the images that training begins with."""
        rows = iter(self.train_data)
        if self.sampler is not None:
            rows = (self.train_data[index] for index in self.sampler)
        yield from self._collated(itertools.islice(rows, *share), collate_fn)

    def _collated(self, rows: Iterator[Any], collate_fn: Callable | None) -> Iterator[dict[str, Tensor]]:
        """Yield batches of the rows whose images can be read, on this process's device."""
        while batch := list(itertools.islice(rows, self.config.batch_size)):
            collated = (collate_fn or default_collate)(batch)
            if len((collated := readable(collated))["pixel_values"]):
                yield {name: values.to(self.accelerator.device) for name, values in collated.items()}

    def _step(self, batch: dict[str, Tensor], step: int, passes: list[tuple[float, dict[str, Tensor]]]) -> None:
        """Compute one pass and add it to those of its step; after the last one, update the weights.

        A pass counts by its images: the last one of a stream has fewer, in all processes as many.
        """
        config, accelerator = self.config, self.accelerator
        weight = len(batch["pixel_values"]) / config.batch_size
        # One draw for the whole step, the same in every process, afresh from (seed, step): a resumed run draws what
        # the uninterrupted one would have drawn.
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        batch, share = self.skipped.sift(batch, step)
        student = self.speed.recorded(self.student, self.architecture)
        losses = {name: loss * share for name, loss in self.objective.losses(student, batch, generator).items()}
        self.speed.count_student(student, self.objective.used)
        if not torch.isfinite(losses["loss"]):
            why = self.objective.not_finite(batch) or "lower --learning_rate"
            raise ValueError(f"step {step}: the loss is {losses['loss'].item()}; {why}")
        accelerator.backward(losses["loss"] * weight)
        passes.append((weight, {name: loss.detach() for name, loss in losses.items()}))
        if accelerator.sync_gradients:
            missing = config.gradient_accumulation_steps / sum(weight for weight, _ in passes)
            if missing != 1:
                torch._foreach_mul_([p.grad for p in self.student.parameters() if p.grad is not None], missing)
        if accelerator.sync_gradients and config.max_grad_norm:
            accelerator.clip_grad_norm_(self.student.parameters(), config.max_grad_norm)
        self.optimizer.step()
        if accelerator.sync_gradients and not accelerator.optimizer_step_was_skipped:
            self.scheduler.step()
        self.optimizer.zero_grad()

    def _batches(self) -> Iterator[dict[str, Tensor]]:
        """Batches for ever, from where the run stands."""
        while self.stream:  # it knows its epochs
            for batch in self.train_loader:
                self.images += self.images_a_pass
                yield self.stream.take(batch)
        while True:
            if self.sampler is not None:
                self.sampler.epoch, self.sampler.start = self.epoch, self.images
            self.train_loader.set_epoch(self.epoch)
            if self.sampler is not None and hasattr(self.train_data, "set_epoch"):  # e.g. random crops
                self.train_data.set_epoch(self.epoch)
            loader = self.train_loader
            if self.sampler is None and self.images:  # a stream is read up to there
                loader = self.accelerator.skip_first_batches(loader, self.images // self.images_a_pass)
            for batch in loader:
                self.images += self.images_a_pass
                yield batch
            if not self.images:
                raise ValueError("train_data: expected at least one image, got none")
            self.epoch, self.images = self.epoch + 1, 0

    def _report(self, step: int, losses: dict[str, Tensor], progress: Any) -> None:
        values = {name: self.accelerator.reduce(loss, "mean").item() for name, loss in losses.items()}
        speed = self.speed.report()
        values["learning_rate"] = self.scheduler.get_last_lr()[0]
        self.accelerator.log({**values, **speed, "skipped_images": float(len(self.skipped))}, step=step)
        shown = {"images/s": f"{speed['images_per_second']:.0f}", "GiB": f"{speed['memory_gib']:.1f}"}
        shown |= {"MFU": f"{speed['mfu']:.1%}"} if "mfu" in speed else {}
        progress.set_postfix({"loss": f"{values['loss']:.4f}", **shown}, refresh=False)  # with the next redrawing

    @torch.no_grad()
    def _validate(self, step: int) -> None:
        if self.validation_loader is None:
            return
        self.student.eval()
        metrics: dict[str, ValidationMetrics] = {}
        for index, batch in enumerate(self.validation_loader):
            predictions = self.objective.predict(self.student, batch)
            found = {
                name: ValidationMetrics.statistics(*pair, self.controls.get(name))
                for name, pair in predictions.items()
            }
            found = self.skipped.sift_figures(found, batch, self.accelerator.gather_for_metrics, step)
            for name, gathered in found.items():
                metrics.setdefault(name, ValidationMetrics()).add(gathered)
            if index == 0 and self.config.num_pictures and self.accelerator.is_main_process:
                outputs, targets = predictions[MAIN]
                picture = validation_picture(outputs, targets, targets.grid, num_images=self.config.num_pictures)
                path = self.output_dir / "pictures" / f"step_{step:06d}.png"
                path.parent.mkdir(exist_ok=True)
                picture.save(path)
        if not metrics:
            raise ValueError("validation: expected at least one image, got none")
        values: dict[str, float] = {}
        for name, head_metrics in metrics.items():
            figures = head_metrics.compute(self.controls.get(name))
            values |= {f"{name}/{figure}" if name else figure: value for figure, value in figures.items()}
        if self.config.max_unreadable_images:
            values["skipped_images"] = float(len(self.skipped))
        self.metrics.append({"step": step, **values})
        self.accelerator.log({f"validation/{name}": value for name, value in values.items()}, step=step)
        logger.info(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items()))
        self.student.train()

    def _save_checkpoint(self, step: int) -> None:
        progress = {
            "step": step,
            "epoch": self.epoch,
            "images": self.images,
            "streams": gather_object([self.stream.state()]) if self.stream else [],
            "metrics": self.metrics,
            "statistics": statistics_of(self.architecture),
            "facts": self.facts,
        }
        self.checkpoints.save(self.accelerator, step, progress)
        if self.accelerator.is_main_process:
            self.run.forget_previous(MADE)

    def _begin(self) -> None:
        """Make room in the folder, or refuse it in all processes."""
        found: list[Any] = [None]
        if self.accelerator.is_main_process:
            try:
                self.checkpoints.sweep()
                make_room(self.run, overwrite=self.config.overwrite)
            except (ValueError, OSError) as error:  # of all processes, so that none waits for this one
                found = [error]
        (refused,) = broadcast_object_list(found)
        if refused is not None:
            raise refused

    def _checkpoint(self) -> tuple[Path, dict[str, Any]]:
        """Return the checkpoint that all processes resume, verified by the main one, and its progress."""
        found: list[Any] = [None]
        if self.accelerator.is_main_process:
            try:
                self.checkpoints.sweep()
                found = [self.checkpoints.newest()]
            except (ValueError, OSError) as error:  # of all processes, so that none waits for this one
                found = [error]
        (checkpoint,) = broadcast_object_list(found)
        if isinstance(checkpoint, Exception):
            raise checkpoint
        progress = progress_of(checkpoint)
        check_changes(progress["facts"], self.facts)
        if progress["step"] > self.max_steps:
            raise ValueError(
                f"max_steps: expected at least the {progress['step']} steps that are done, got {self.max_steps}"
            )
        return checkpoint, progress

    def _resume(self, checkpoint: Path) -> int:
        self.accelerator.load_state(str(checkpoint))
        self.accelerator.step = 0  # passes of the step under way: checkpoints lie between steps
        self.metrics, self.epoch, self.images = (self.progress[name] for name in ("metrics", "epoch", "images"))
        if self.stream and self.progress.get("streams"):
            self.stream.go_on(self.progress["streams"])
        self._set_schedule(self.progress["step"])
        logger.info(f"resumed from {checkpoint.name}")
        return self.progress["step"]

    def _set_schedule(self, step: int) -> None:
        """Set the learning rate, a function of settings and step alone for any number of processes."""
        config, optimizer = self.config, self.optimizer.optimizer
        for group in optimizer.param_groups:
            group["initial_lr"] = config.learning_rate
        self.scheduler = get_cosine_schedule_with_warmup(
            optimizer, config.warmup_steps, self.max_steps, last_epoch=step - 1
        )

    def _finish(self) -> DistillationResult:
        """Save the model under another name and move it: a run that is killed here can be resumed."""
        student = whole_student(self.accelerator, self.student, self.architecture)
        if self.metrics and (said := worse_than_constant(self.metrics[-1])):
            logger.warning(said)
        if self.accelerator.is_main_process:
            with self.run.finished_files(last="config.json") as folder, no_loading_bars():
                student.save_pretrained(folder)
                self.image_processor.save_pretrained(folder)
                (folder / "metrics.json").write_text(json.dumps(self.metrics, indent=2) + "\n")
                (folder / "speed.json").write_text(json.dumps(self.speed.summary(), indent=2) + "\n")
            self.run.forget_previous(MADE)
        self.accelerator.wait_for_everyone()
        return DistillationResult(student.eval(), self.metrics, self.output_dir, self.max_steps)
