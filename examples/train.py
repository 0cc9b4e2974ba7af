"""Distil a teacher into an APM.

    python examples/train.py --teacher TEACHER --dataset FOLDER --output_dir runs/tiny --max_steps 20
    accelerate launch examples/train.py --teacher facebook/dinov2-with-registers-large --preset dinov2-large \
        --dataset detection-datasets/coco --image_processor '{"do_min_max": true}' --cls_weight 0 --max_steps 20000 \
        --output_dir runs/coco

The second is the paper's recipe (arXiv:2410.20535). The result loads with `AutoModel.from_pretrained(output_dir)`.

`apm distill` is the same with the same flags; start from here for a training of your own. What `train` does with the
settings fits on a page, in `apm_hf/distillation/recipe.py`: it loads a teacher, draws a student as wide as that, opens
the images and hands all three to `apm_hf.distillation.distill`, the Accelerate loop.

Stopped by SIGTERM or Ctrl-C it saves a checkpoint, ends with status 75 and goes on with `--resume`.
"""

import logging
import sys

from transformers import HfArgumentParser

from apm_hf.distillation import DistillationConfig
from apm_hf.distillation.recipe import TrainingConfig, train
from apm_hf.runs.processes import command_line


def main() -> None:
    logging.basicConfig(format="%(message)s")
    logging.getLogger("apm_hf").setLevel(logging.INFO)
    training, config = HfArgumentParser((TrainingConfig, DistillationConfig)).parse_args_into_dataclasses()
    train(training, config, command=command_line("examples/train.py", sys.argv[1:]))


if __name__ == "__main__":
    main()
