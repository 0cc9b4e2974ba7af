"""`apm export`: a model for runtimes without this package: ONNX, or torch.export."""

import argparse
from typing import Any

HELP = "write a model as ONNX graphs, or as torch.export programs"
DESCRIPTION = """
Write a model for runtimes that know nothing of this package. The graphs are `model` (image and places in, answers
out), and the same in two steps: `fold` (image in, trigger column out) and `query` (column and places in, answers out),
to ask an image again later. Numbers of images and of places are free. Every graph is run and compared with the model
before its file appears; export.json says what goes in and comes out.
"""
EXAMPLES = (
    "apm export runs/photos exported",
    "apm export runs/photos exported --graphs fold query --format torch",
)
RESULT = {
    "output_dir": "folder of the graphs",
    "graphs": "name -> file, inputs, outputs, largest error: export.json's",
}
INTERRUPTED = "the folder appears whole or not at all; start it again"
SMALLER = "fewer --graphs at a time"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a saved APM, name or folder")
    parser.add_argument("output_dir", metavar="FOLDER", help="where the graphs go, new or empty")
    parser.add_argument("--format", choices=("onnx", "torch"), default="onnx", help="(default: %(default)s)")
    parser.add_argument("--graphs", nargs="+", metavar="NAME", help="some of model, fold and query (default: all)")
    parser.add_argument(
        "--per_image", action="store_true", help="every image is asked about places of its own, not all about the same"
    )
    parser.add_argument("--opset", type=int, metavar="NUMBER", help="of ONNX (default: what this torch writes)")
    parser.add_argument("--overwrite", action="store_true", help="replace files of a folder that is not empty")


def run(options: argparse.Namespace) -> dict[str, Any]:
    from transformers import AutoModel
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    from ..export import export_model, read_description

    model = AutoModel.from_pretrained(options.model)
    sees_pixels = getattr(model.config, "trigger_source", "conv") == "conv" or model.config.local_patch
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
