"""`apm app`: the demonstration in a browser."""

import argparse
import logging
from importlib import import_module
from typing import Any

from .options import add
from .pairs import ABOUT_NOTE

logger = logging.getLogger("apm_hf")

HELP = "try an APM in the browser: islands, places, labels, two photos"
DESCRIPTION = """
Serve the app on this computer until Ctrl-C: a photo's islands, its decoding, places that look alike, labels with the
teacher beside the APM, and the way from one photo to another. Without --model and --teacher the small pair of photos
in this package is used.
"""
EXAMPLES = ("apm app", "apm app --model user/apm-photos --teacher openai/clip-vit-base-patch16 --port 8000")
RESULT = {
    "url": "where the app was served; printed when it has ended",
    "model": "as given, or null",
    "teacher": "as given, or null",
    "note": ABOUT_NOTE,
}
INTERRUPTED = "the app has ended"
SMALLER = "a smaller --model or --teacher"


def add_options(parser: argparse.ArgumentParser) -> None:
    add(parser, "--model", "by default the dense student in the package of --teacher, or of the teacher there")
    add(parser, "--teacher", "whose features the model was distilled to")
    add(parser, "--port", "by default the first free one from 7860")
    parser.add_argument("--share", action="store_true", help="also behind a public address, through Gradio's tunnel")


def run(options: argparse.Namespace) -> dict[str, Any]:
    logger.info("the page is made, which takes some seconds")
    # Gradio is an extra, and slow to load.
    page = import_module("..app", __package__).launch(
        model=options.model, teacher=options.teacher, port=options.port, share=options.share
    )
    from ..assets import EMBEDDED
    from ..pair import EMBEDDED_NOTE

    is_embedded = options.model is None and options.teacher in (None, EMBEDDED)
    about = {"model": options.model, "teacher": options.teacher, "note": EMBEDDED_NOTE if is_embedded else None}
    return {"url": page.local_url, **about}
