"""`apm export`: write a model for runtimes without this package, as ONNX or torch.export graphs."""

import argparse
import logging
from typing import Any

HELP = "write a model as ONNX or torch.export graphs"
DESCRIPTION = """
Write a model for runtimes without this package. The graphs are `fold` (image in, trigger column out) and `query`
(trigger column and locations in, features out), so that an image is folded once and queried whenever needed; `model`
does both in one call, and is a second copy of the weights. Any number of images and of locations will do. Every graph
is run and compared with the model before its file appears; export.json lists inputs and outputs.
"""
EXAMPLES = (
    "apm export runs/photos exported",
    "apm export runs/photos exported --graphs model --format torch",
)
RESULT = {
    "output_dir": "folder with the graphs",
    "graphs": "name -> file, inputs, outputs and largest error, as in export.json",
}
INTERRUPTED = "the folder appears complete or not at all; run it again"
SMALLER = "fewer --graphs at a time"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a saved APM, name or folder")
    parser.add_argument("output_dir", metavar="FOLDER", help="output folder, new or empty")
    parser.add_argument("--format", choices=("onnx", "torch"), default="onnx", help="(default: %(default)s)")
    parser.add_argument(
        "--graphs", nargs="+", metavar="NAME", help="some of fold, query and model (default: fold query)"
    )
    parser.add_argument("--per_image", action="store_true", help="coordinates differ from image to image")
    parser.add_argument("--opset", type=int, metavar="NUMBER", help="version of ONNX's operators (default: torch's)")
    parser.add_argument("--overwrite", action="store_true", help="replace files of a folder that is not empty")


def run(options: argparse.Namespace) -> dict[str, Any]:
    from transformers import AutoModel
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    from ..publishing.export import export_model, read_description

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns of operators that no APM has
    model = AutoModel.from_pretrained(options.model)
    sees_pixels = getattr(model.config, "folds_pixels", True) or model.config.local_patch
    folder = export_model(
        model,
        options.output_dir,
        image_processor=AutoImageProcessor.from_pretrained(options.model) if sees_pixels else None,
        format=options.format,
        graphs=options.graphs,
        per_image=options.per_image,
        opset=options.opset,
        overwrite=options.overwrite,
    )
    return {"output_dir": folder, "graphs": read_description(folder)["graphs"]}
