"""Distil a teacher into an APM: the whole training loop, to read and to change.

    python examples/train.py --teacher TEACHER --dataset FOLDER --output_dir runs/tiny --max_steps 20
    accelerate launch examples/train.py --teacher facebook/dinov2-with-registers-large --preset dinov2-large \\
        --dataset detection-datasets/coco --max_steps 20000 --output_dir runs/coco

The losses are those of the paper (arXiv:2410.20535, section 3). The result loads with `AutoModel.from_pretrained`.
An interrupted run goes on from its last checkpoint with `--resume`.

`apm distill` is the loop for production. Beside what stands here it skips unreadable images, streams data sets, reads
a teacher's features from a cache, learns from several teachers, shards the student and stops at a scheduler's signal.

Legend: B images, L locations, F feature width, (rows, cols) the teacher's grid.
"""

import argparse
import logging
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup

from apm_hf import APMConfig, APMModel, load_teacher
from apm_hf.data.images import ImageCollator
from apm_hf.data.loading import train_and_validation
from apm_hf.position_encoding import grid_coordinates
from apm_hf.publishing.cards import CardFacts, write_card
from apm_hf.publishing.hub import publish
from apm_hf.runs.checkpoints import Checkpoints, progress_of
from apm_hf.runs.processes import command_line, on_cpu
from apm_hf.teachers.licenses import inherit
from apm_hf.teachers.matching import matching_image_processor
from apm_hf.teachers.targets import rgb_targets


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="Hub name or folder")
    parser.add_argument("--dataset", required=True, help="images: a Hub dataset, a folder or parquet files")
    parser.add_argument("--output_dir", required=True, help="folder of the model and its checkpoints")
    parser.add_argument("--preset", default="tiny", help="size of the student")
    parser.add_argument("--max_images", type=int, help="use at most this many images for training")
    parser.add_argument("--max_steps", type=int, default=1000, help="optimiser steps")
    parser.add_argument("--batch_size", type=int, default=64, help="images per batch, of each process")
    parser.add_argument("--learning_rate", type=float, default=1e-4, help="peak learning rate of Adam")
    parser.add_argument("--checkpoint_steps", type=int, default=500, help="steps between checkpoints")
    parser.add_argument("--resume", action="store_true", help="resume an interrupted run in output_dir")
    parser.add_argument("--num_workers", type=int, default=0, help="processes that load images")
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    parser.add_argument("--hub_model_id", help="publish the result under this name, user/name")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    logging.basicConfig(format="%(message)s")
    set_seed(options.seed)
    # Every epoch is shuffled from its number alone, so that a resumed run sees the same batches.
    loading = DataLoaderConfiguration(use_seedable_sampler=True, data_seed=options.seed)
    accelerator = Accelerator(cpu=on_cpu(), dataloader_config=loading, project_dir=options.output_dir)

    # The teacher is frozen. The student predicts features of the same width, and reads what the teacher reads.
    teacher = load_teacher(options.teacher, device=accelerator.device)
    student = APMModel(APMConfig.preset(options.preset, feature_size=teacher.feature_size))
    inherit(student.config, [teacher], dataset=options.dataset)  # the teacher's licence goes into the card
    image_processor = matching_image_processor(teacher, student.config.image_size)

    # A batch has `pixel_values` for the student and `teacher_pixel_values` for the teacher, both of the same crop.
    train, validation = train_and_validation(options.dataset, max_images=options.max_images, seed=options.seed)
    collator = ImageCollator(image_processor, train.image_column, teacher_image_processor=teacher.image_processor)
    loading = {"batch_size": options.batch_size, "collate_fn": collator, "num_workers": options.num_workers}
    train_loader = DataLoader(train.dataset, shuffle=True, drop_last=True, **loading)
    validation_loader = DataLoader(validation.dataset, **loading)
    if len(train_loader) < accelerator.num_processes:
        raise SystemExit(f"expected a batch for each process, got {len(train.dataset)} images: lower --batch_size")

    optimizer = torch.optim.Adam(student.parameters(), lr=options.learning_rate)
    student, optimizer, train_loader, validation_loader = accelerator.prepare(
        student, optimizer, train_loader, validation_loader
    )
    # Not prepared: Accelerate would step it once per process. The learning rate depends on the step alone.
    scheduler = get_cosine_schedule_with_warmup(optimizer.optimizer, 0, options.max_steps)
    accelerator.register_for_checkpointing(scheduler)
    mean, std = (
        torch.tensor(values, device=accelerator.device)
        for values in (image_processor.image_mean, image_processor.image_std)
    )

    def losses(batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss, and how much student and teacher agree: cosines `(B,)`, averaged over locations."""
        targets = teacher.encode_images(pixel_values=batch["teacher_pixel_values"])
        rows, cols = targets.features.shape[1:3]
        features = targets.features.flatten(1, 2)  # (B, rows, cols, F) -> (B, L, F)
        rgb = rgb_targets(batch["pixel_values"], rows, cols, mean=mean, std=std)  # (B, L, 3)
        # The student is queried at the centres of the teacher's patches: targets are never interpolated.
        outputs = student(batch["pixel_values"], grid_coordinates(rows, cols, device=accelerator.device))
        loss = F.mse_loss(outputs.last_hidden_state.float(), features.float())
        loss = loss + F.mse_loss(outputs.pooler_output.float(), targets.image_embeds.float())
        loss = loss + F.mse_loss(outputs.rgb.float(), rgb)
        return loss, F.cosine_similarity(outputs.last_hidden_state.detach().float(), features.float(), dim=-1).mean(1)

    @torch.no_grad()
    def validate() -> float:
        student.eval()
        cosines = [accelerator.gather_for_metrics(losses(batch)[1]) for batch in validation_loader]
        student.train()
        return torch.cat(cosines).mean().item()

    # A checkpoint has a checksum of each file, and its name only when it is complete.
    checkpoints, step = Checkpoints(Path(options.output_dir), keep=2), 0
    if options.resume:
        checkpoint = checkpoints.newest()
        accelerator.load_state(str(checkpoint))
        step = progress_of(checkpoint)["step"]
    elif checkpoints.names():
        raise SystemExit(f"{options.output_dir} holds the checkpoints of a run: --resume goes on with it")
    accelerator.print(f"step {step}: cosine to the teacher {validate():.4f} on {len(validation.dataset)} images")

    progress = tqdm(total=options.max_steps, initial=step, disable=not accelerator.is_local_main_process)
    while step < options.max_steps:
        epoch, done = divmod(step, len(train_loader))
        train_loader.set_epoch(epoch)
        for batch in accelerator.skip_first_batches(train_loader, done):
            loss, _ = losses(batch)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            step += 1
            progress.update()
            progress.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
            if step % options.checkpoint_steps == 0 and step < options.max_steps:
                checkpoints.save(accelerator, step, {"step": step})
            if step == options.max_steps:
                break
    progress.close()
    cosine = validate()
    accelerator.print(f"step {step}: cosine to the teacher {cosine:.4f} on {len(validation.dataset)} images")

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        model = accelerator.unwrap_model(student)
        model.save_pretrained(options.output_dir)
        image_processor.save_pretrained(options.output_dir)
        facts = CardFacts(
            repo_id=options.hub_model_id or options.output_dir,
            teacher=options.teacher,
            dataset=options.dataset,
            command=command_line("examples/train.py", sys.argv[1:]),
            steps=step,
            num_parameters=model.num_parameters(),
            metrics={"feature_cosine": cosine},
        )
        write_card(options.output_dir, facts)
        if options.hub_model_id is not None:
            accelerator.print(publish(options.output_dir, options.hub_model_id))
    accelerator.end_training()


if __name__ == "__main__":
    main()
