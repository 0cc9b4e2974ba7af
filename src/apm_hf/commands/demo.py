"""`apm demo`: the whole story on a few images."""

import argparse
import logging

from ..demo_assets import DEMO_TEACHER

logger = logging.getLogger("apm_hf")

HELP = "distil an APM, adapt it to corrupted images, draw what it sees, save it"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--teacher", default=DEMO_TEACHER, help="name or folder; by default the one in this package")
    parser.add_argument("--dataset", help="name, folder or parquet file; by default the embedded scenes")
    parser.add_argument("--output_dir", default="apm", help="where the model goes (default: %(default)s)")
    parser.add_argument("--report_dir", help="where the pictures go (default: OUTPUT_DIR_report)")
    parser.add_argument("--max_steps", type=int, help="steps of distillation")
    parser.add_argument("--num_images", type=int, help="images to distil from")
    parser.add_argument("--num_test_images", type=int, help="held-out images to measure on")
    parser.add_argument("--seed", type=int, default=0)


def run(options: argparse.Namespace) -> int:
    from ..demo import DemoConfig, run_demo

    given = {name: value for name in DemoConfig.__annotations__ if (value := getattr(options, name)) is not None}
    if options.teacher == DEMO_TEACHER:
        logger.info("no --teacher: the tiny one of this package is used, and no network")
    result = run_demo(DemoConfig(**given))
    logger.info(result.table)
    logger.info("pictures and report: " + ", ".join(map(str, result.files)))
    logger.info(f"model: {result.output_dir}  (AutoModel.from_pretrained({str(result.output_dir)!r}))")
    return 0
