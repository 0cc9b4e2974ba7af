"""`apm convert`: a checkpoint of the authors' release as a model folder."""

import argparse
from typing import Any

HELP = "turn a checkpoint of the authors' release into a model folder"
DESCRIPTION = """
Turn a checkpoint of one of the release's two networks (model_15.pth) into a model folder: weights, configuration, and
an image processor that shows images as the network was shown them. Which network it is, the names of its tensors say.
The file is loaded without executing anything in it.
"""
EXAMPLES = ("apm convert model_15.pth apm-coco",)
RESULT = {"output_dir": "folder of the model, for AutoModel.from_pretrained"}
INTERRUPTED = "the folder appears whole or not at all; start it again"
SMALLER = ""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="what torch.save wrote, or a .safetensors file")
    parser.add_argument("output_dir", metavar="FOLDER", help="where the model goes, new or empty")
    parser.add_argument(
        "--image_size", type=int, metavar="PIXELS", help="side of the network's input, where it is not the release's"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files of a folder that is not empty")


def run(options: argparse.Namespace) -> dict[str, Any]:
    from ..publishing.conversion import convert_checkpoint

    given = {"image_size": options.image_size, "overwrite": options.overwrite}
    return {"output_dir": convert_checkpoint(options.checkpoint, options.output_dir, **given)}
