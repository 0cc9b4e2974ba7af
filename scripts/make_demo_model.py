"""Distil the APM that travels with the package, and draw the pictures of the README: `docs/demo/`.

    python scripts/make_demo_model.py --max_steps 20 --num_images 64 --model_dir /tmp/apm --report_dir /tmp/report
    python scripts/make_demo_model.py

This is `apm demo` with more images and more steps; the teacher is the one that `make_demo_teacher.py` made.
"""

import argparse
import logging

from apm_hf.assets import DEMO_MODEL
from apm_hf.demo.story import DemoConfig, run_demo


def main() -> None:
    logging.basicConfig(format="%(message)s")
    logging.getLogger("apm_hf").setLevel(logging.INFO)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max_steps", type=int, default=2400)
    parser.add_argument("--num_images", type=int, default=12288)
    parser.add_argument("--num_test_images", type=int, default=240)
    parser.add_argument("--model_dir", default=DEMO_MODEL)
    parser.add_argument("--report_dir", default="docs/demo")
    options = parser.parse_args()
    result = run_demo(
        DemoConfig(
            output_dir=options.model_dir,
            report_dir=options.report_dir,
            max_steps=options.max_steps,
            num_images=options.num_images,
            num_test_images=options.num_test_images,
        )
    )
    print(result.table)


if __name__ == "__main__":
    main()
