"""`apm cache-features`: a teacher's features of every training image, on the disk."""

import argparse
from typing import Any

from .options import add

HELP = "store a teacher's features on the disk, for faster distillation"
DESCRIPTION = """
Run a teacher once on every training image and store its outputs in a folder that `apm distill --feature_cache` reads
instead of running it again. With --views, they are of random crops, which the student is then trained on. Give the
data set, its splits, --max_images and --seed as to `apm distill`. The same command runs under `torchrun
--nproc_per_node N -m apm_hf.commands.main cache-features ...` and `accelerate launch`, on any number of computers
that share the folder. Started again, it verifies what is there and writes what is missing or damaged. docs/scaling.md
says when a cache pays.
"""
EXAMPLES = (
    "apm cache-features --teacher facebook/dinov2-small --dataset photos/ --output_dir features --dry_run",
    "apm cache-features --teacher facebook/dinov2-small --dataset photos/ --output_dir features --num_locations 64",
    "apm cache-features --output_dir features --verify",
)
RESULT = {
    "output_dir": "folder of the cache, for apm distill --feature_cache",
    "images": "that have features",
    "left_out": "row and reason of every image that has none",
    "shards": "files",
    "bytes": "of all shards; with --dry_run, that they will have",
}
INTERRUPTED = "shards that were whole stay, and the same command goes on from there"
SMALLER = "a smaller --batch_size or --images_per_shard"


def add_options(parser: argparse.ArgumentParser) -> None:
    add(parser, "--teacher", "required unless --verify")
    parser.add_argument("--teacher_dtype", metavar="NAME", help="bfloat16, ...; see load_teacher")
    add(parser, "--dataset", "required unless --verify")
    add(parser, "--output_dir", required=True)
    add(parser, "--split", "by default found")
    parser.add_argument("--validation_split", metavar="NAME", help="by default found, or held out; not cached")
    add(parser, "--image_column")
    add(parser, "--max_images")
    add(parser, "--seed", "the subset of --max_images, what is held out, locations, crops", default=0)
    parser.add_argument("--num_locations", type=int, help="random patches kept of each image; all of them by default")
    parser.add_argument(
        "--views", type=int, default=0, help="random crops of each image, mirrored half the time; 0 takes whole images"
    )
    parser.add_argument("--level_layers", type=int, nargs="+", help="teacher layers to keep, for students with levels")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="(default: %(default)s)"
    )
    parser.add_argument("--images_per_shard", type=int, help="by default as many as make 256 MiB")
    add(parser, "--batch_size", "that the teacher is shown", default=64)
    parser.add_argument("--num_workers", type=int, default=0, help="processes that load images, per process")
    add(parser, "--max_unreadable_images", default=0)
    parser.add_argument("--dry_run", action="store_true", help="say what it takes, and write nothing")
    parser.add_argument("--verify", action="store_true", help="compare the checksums of a cache that is there")


def run(options: argparse.Namespace) -> dict[str, Any] | None:
    from transformers.utils import logging

    from ..data.augmentation import RandomCrops
    from ..data.loading import train_and_validation
    from ..runs.processes import process_state
    from ..runs.run import own_folder
    from ..teachers import load_teacher
    from ..teachers.feature_cache import CacheSettings, FeatureCache, estimate, write_feature_cache

    if options.verify:
        found = _summary(FeatureCache(options.output_dir).verify(again=True))
        print(f"{found['images']} images in {found['shards']} shards are as they were written")
        return found
    if missing := [f"--{name}" for name in ("teacher", "dataset") if getattr(options, name) is None]:
        raise ValueError(f"{', '.join(missing)}: expected a name or a folder, or --verify, got none")
    settings = CacheSettings(
        dtype=options.dtype,
        num_locations=options.num_locations,
        level_layers=options.level_layers,
        images_per_shard=options.images_per_shard,
        seed=options.seed,
    )
    if not options.dry_run:  # before anything is fetched
        own_folder(options.output_dir, teacher=options.teacher, dataset=options.dataset)
    teacher = load_teacher(options.teacher, dtype=options.teacher_dtype)
    data, _ = train_and_validation(
        options.dataset,
        split=options.split,
        validation_split=options.validation_split,
        image_column=options.image_column,
        max_images=options.max_images,
        seed=options.seed,
    )
    images = data.dataset
    if options.views:
        images = RandomCrops(images, data.image_column, seed=options.seed, views=options.views)
    plan, state = estimate(teacher, len(images), settings), process_state()
    if state.is_main_process:
        print(
            f"{plan.num_images} images of {plan.bytes_per_image / 1e3:.4g} kB: {plan.num_bytes / 1e9:.4g} GB in "
            f"{plan.num_shards} shards"
        )
    if options.dry_run:
        result = {"images": plan.num_images, "left_out": [], "shards": plan.num_shards, "bytes": plan.num_bytes}
        return {"output_dir": options.output_dir, **result} if state.is_main_process else None
    try:
        cache = write_feature_cache(
            options.output_dir,
            teacher,
            images,
            image_column=data.image_column,
            settings=settings,
            dataset_name=options.dataset,
            batch_size=options.batch_size,
            num_workers=options.num_workers,
            max_unreadable_images=options.max_unreadable_images,
        )
    finally:
        state.destroy_process_group()  # the interpreter's end could wait for its threads
    if not state.is_main_process:
        return None
    logging.get_logger(__name__).info(f"{len(cache)} images in {cache.folder}")
    return _summary(cache)


def _summary(cache: Any) -> dict[str, Any]:
    return {
        "output_dir": cache.folder,
        "images": len(cache),
        "left_out": cache.index["bad"],
        "shards": len(cache.index["shards"]),
        "bytes": sum(shard["size"] for shard in cache.index["shards"]),
    }
