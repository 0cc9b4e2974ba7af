"""The paper's ablations of test-time training: one factor at a time, beside the teacher's own accuracy.

    python benchmarks/ablations.py --preset tiny --num_images 16 --output_dir runs/ablations-tiny
    python benchmarks/ablations.py --teacher ../shared/teachers/deit-tiny-lit \\
        --data ../shared/data/imagenet_sample1k --output_dir runs/ablations

Writes `ablations.md`, `ablations.png` and, as they come, the lines of `ablations.jsonl`; started again, it goes on.
"""

import argparse

from apm_hf import APMConfig, TTTConfig, load_teacher
from apm_hf.assets import DEMO_TEACHER
from apm_hf.configuration_apm import PRESETS
from apm_hf.evaluation.labels.benchmarks import load_benchmark
from one_factor import FACTORS, AblationTask, Results, run_ablations, variants


def run(options: argparse.Namespace) -> Results:
    teacher = load_teacher(options.teacher)
    base = APMConfig.preset(options.preset, feature_size=teacher.feature_size)
    recipe = TTTConfig.preset("paper", num_locations=16, seed=options.seed)
    variants(base, recipe, options.factors)  # says what is wrong before the teacher is asked
    images = load_benchmark(options.data, max_images=options.num_images, seed=options.seed)
    task = AblationTask.build(teacher, images, base, seed=options.seed)
    return run_ablations(
        task,
        options.output_dir,
        base=base,
        recipe=recipe,
        factors=options.factors,
        num_slow=options.num_slow,
        max_gflops=options.max_gflops,
        batch_size=options.batch_size,
    )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", default=DEMO_TEACHER, help="folder or Hub name (default: the embedded one)")
    parser.add_argument("--data", default="scenes", help="benchmark, folder or Hub name (default: %(default)s)")
    parser.add_argument("--preset", default="clip-ttt", choices=sorted(PRESETS), help="model (default: %(default)s)")
    parser.add_argument("--num_images", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--num_slow", type=int, default=8, help="images for what is expensive (default: %(default)s)")
    parser.add_argument("--max_gflops", type=float, default=150, help="per image, above: expensive")
    parser.add_argument("--factors", nargs="+", default=list(FACTORS), metavar="FACTOR", help=", ".join(FACTORS))
    parser.add_argument("--batch_size", type=int, default=8, help="images fitted at a time (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of images, weights and locations")
    parser.add_argument("--output_dir", required=True)
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    run(options)
    print(f"written to {options.output_dir}/ablations.md")


if __name__ == "__main__":
    main()
