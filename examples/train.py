"""Distil a teacher into an APM.

    python examples/train.py --teacher TEACHER --dataset FOLDER --output_dir runs/tiny --max_steps 20
    accelerate launch examples/train.py --teacher facebook/dinov2-with-registers-large --preset dinov2-large \
        --dataset detection-datasets/coco --image_processor '{"do_min_max": true}' --cls_weight 0 --max_steps 20000 \
        --output_dir runs/coco

The second is the paper's recipe (arXiv:2410.20535). The result loads with `AutoModel.from_pretrained(output_dir)`.
"""

import json
import logging
import sys
from dataclasses import dataclass, field

from transformers import HfArgumentParser, set_seed

from apm_hf import APMConfig, APMModel, load_teacher
from apm_hf.data.augmentation import RandomCrops
from apm_hf.data.images import ImageCollator
from apm_hf.data.loading import train_and_validation
from apm_hf.distillation import DistillationConfig, DistillationResult, distill, matching_image_processor
from apm_hf.hub import publish
from apm_hf.model_cards import CardFacts, write_card
from apm_hf.processes import command_line, process_state
from apm_hf.several_teachers import same_view
from apm_hf.teacher_license import inherit


@dataclass(frozen=True, kw_only=True)
class ScriptConfig:
    """What is distilled, into what, on which images."""

    teacher: str = field(metadata={"help": "name or folder of the teacher, e.g. openai/clip-vit-large-patch14"})
    extra_teachers: list[str] = field(
        default_factory=list, metadata={"help": "NAME=TEACHER of further teachers, each for a head NAME of its own"}
    )
    teacher_dtype: str | None = field(default=None, metadata={"help": "bfloat16, ...; see load_teacher"})
    dataset: str = field(metadata={"help": "a Hub dataset, org/name or org/name:config, a folder or a parquet file"})
    preset: str = field(default="tiny", metadata={"help": "architecture: dinov2-large, clip-ttt or tiny"})
    config_overrides: str = field(
        default="{}", metadata={"help": "JSON: fields of APMConfig, e.g. '{\"local_patch\": true}'"}
    )
    image_processor: str = field(
        default="{}", metadata={"help": "JSON: options of APMImageProcessor, e.g. '{\"do_min_max\": true}'"}
    )
    split: str | None = field(default=None, metadata={"help": "training split"})
    validation_split: str | None = field(default=None, metadata={"help": "by default found, or held out"})
    image_column: str | None = field(default=None, metadata={"help": "by default found"})
    label_column: str | None = field(default=None, metadata={"help": "by default found; not used in training"})
    random_crops: bool = field(default=False, metadata={"help": "show random parts of images, mirrored half the time"})
    streaming: bool = field(default=False, metadata={"help": "read the dataset while training"})
    max_images: int | None = field(default=None, metadata={"help": "train on so many images"})
    max_validation_images: int = field(default=256, metadata={"help": "validate on so many images"})
    push_to_hub: bool = field(default=False, metadata={"help": "publish the result, with its card"})
    hub_model_id: str | None = field(default=None, metadata={"help": "repository, user/name"})


def run(script: ScriptConfig, config: DistillationConfig) -> DistillationResult:
    if script.push_to_hub and script.hub_model_id is None:
        raise ValueError("--push_to_hub: expected --hub_model_id user/name, got none")
    set_seed(config.seed)
    if wrong := [one for one in script.extra_teachers if "=" not in one]:
        raise ValueError(f"--extra_teachers: expected NAME=TEACHER, got {wrong}")
    teacher = load_teacher(script.teacher, dtype=script.teacher_dtype)
    names = dict(one.split("=", 1) for one in script.extra_teachers)
    teachers = {head: load_teacher(name, dtype=script.teacher_dtype) for head, name in names.items()}
    overrides = {"feature_size": teacher.feature_size, **json.loads(script.config_overrides)}
    if teachers:
        heads = {head: {"feature_size": one.feature_size} for head, one in teachers.items()}
        overrides = {"teacher_heads": heads, **overrides}
    if config.level_layers:
        overrides = {"num_levels": len(config.level_layers), "level_size": teacher.hidden_size, **overrides}
    student = APMModel(APMConfig.preset(script.preset, **overrides))
    inherit(student.config, [teacher, *teachers.values()], dataset=script.dataset)
    image_processor = matching_image_processor(
        teacher, student.config.image_size, **json.loads(script.image_processor)
    )
    train, validation = train_and_validation(
        script.dataset,
        split=script.split,
        validation_split=script.validation_split,
        image_column=script.image_column,
        label_column=script.label_column,
        streaming=script.streaming,
        max_images=script.max_images,
        max_validation_images=script.max_validation_images,
        seed=config.seed,
    )
    images = train.dataset
    if script.random_crops:
        if script.streaming:
            raise ValueError("--random_crops: expected a data set that is not streamed")
        images = RandomCrops(images, train.image_column, seed=config.seed)
    collator = ImageCollator(
        image_processor,
        train.image_column,
        teacher_image_processor=teacher.image_processor,
        teacher_image_processors={head: same_view(one, teacher) for head, one in teachers.items()},
    )
    result = distill(
        student,
        images,
        config=config,
        image_processor=image_processor,
        teacher=teacher,
        teachers=teachers,
        validation_data=validation.dataset,
        collate_fn=collator,
    )
    if process_state().is_main_process:
        last = {name: value for name, value in result.metrics[-1].items() if name != "step"} if result.metrics else {}
        facts = CardFacts(
            repo_id=script.hub_model_id or config.output_dir,
            teacher=script.teacher,
            dataset=script.dataset,
            command=command_line("examples/train.py", sys.argv[1:]),
            steps=config.max_steps,
            num_parameters=result.student.num_parameters(),
            metrics=last,
        )
        write_card(result.output_dir, facts)
        if script.push_to_hub:
            logging.getLogger("apm_hf").info(publish(result.output_dir, script.hub_model_id))
    return result


def main() -> None:
    logging.basicConfig(format="%(message)s")
    logging.getLogger("apm_hf").setLevel(logging.INFO)
    script, config = HfArgumentParser((ScriptConfig, DistillationConfig)).parse_args_into_dataclasses()
    run(script, config)


if __name__ == "__main__":
    main()
