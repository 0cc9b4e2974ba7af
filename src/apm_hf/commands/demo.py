"""`apm demo`: the whole story on a few images."""

import argparse
import logging
from typing import Any

from ..assets import DEMO_TEACHER
from .options import add

logger = logging.getLogger("apm_hf")

HELP = "distil an APM, adapt it to corrupted images, draw its features, save it (two minutes, no download)"
DESCRIPTION = """
The whole story in two minutes on a CPU, without a network: distil a tiny teacher on drawn scenes, adapt the APM to
corrupted ones, measure it beside its teacher and two controls, draw the features of all of them, and save the model.
One more page shows sample photographs, seen by the small pair of photos in this package.
"""
EXAMPLES = ("apm demo", "apm demo --max_steps 100 --num_images 512 --output_dir /tmp/apm")
RESULT = {
    "output_dir": "folder of the model, for AutoModel.from_pretrained",
    "files": "pictures and report",
    "rows": "method -> column -> accuracy or cosine, as in the report's table",
}
INTERRUPTED = "the demo cannot go on where it was; start it again"
SMALLER = "a smaller --num_images or --num_test_images"


def add_options(parser: argparse.ArgumentParser) -> None:
    add(parser, "--teacher", "by default the one in this package", default=DEMO_TEACHER)
    add(parser, "--dataset", "labelled; by default the embedded scenes")
    add(parser, "--output_dir", "the model", default="apm")
    parser.add_argument("--report_dir", metavar="FOLDER", help="where the pictures go (default: OUTPUT_DIR_report)")
    add(parser, "--max_steps")
    parser.add_argument("--num_images", type=int, help="images to distil from")
    parser.add_argument("--num_test_images", type=int, help="held-out images to measure on")
    add(parser, "--seed", default=0)


def run(options: argparse.Namespace) -> dict[str, Any]:
    from ..demo.story import DemoConfig, run_demo

    given = {name: value for name in DemoConfig.__annotations__ if (value := getattr(options, name)) is not None}
    if options.teacher == DEMO_TEACHER:
        logger.info("no --teacher: the tiny one of this package is used, and no network")
    result = run_demo(DemoConfig(**given))
    logger.info(result.table)
    logger.info("pictures and report: " + ", ".join(map(str, result.files)))
    logger.info(f"model: {result.output_dir}  (AutoModel.from_pretrained({str(result.output_dir)!r}))")
    return {"output_dir": result.output_dir, "files": result.files, "rows": result.rows}
