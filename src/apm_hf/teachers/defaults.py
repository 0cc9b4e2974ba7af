"""Choose the teacher of commands that are given none: a small public one, from the Hub or its cache.

Which one it is depends on what is asked for and on whether the Hub has ever been reached, and is always said. The
folder of the cache is loaded, so that a second run asks nothing of the network.
"""

import threading
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, constants, errors, snapshot_download, try_to_load_from_cache
from transformers.utils import logging

from .teacher import Teacher, load_teacher

logger = logging.get_logger(__name__)

# What is asked for -> the public teacher that answers where none is named.
HUB_TEACHERS = {
    "words": "openai/clip-vit-base-patch16",
    "vectors": "facebook/dinov2-small",
    "locations": "facebook/deit-tiny-patch16-224",  # whose dense student is in this package
}
FILES = ("*.json", "*.txt", "*.safetensors")
NEEDED = ("config.json", "preprocessor_config.json", "model.safetensors")
SECONDS = 3.0  # that the Hub is given to answer


def default_teacher(task: str, *, device: str | torch.device | None = None) -> Teacher | None:
    """Load the public teacher for a task from the Hub's cache or, said before, from the Hub.

    Args:
        task: one of `HUB_TEACHERS`.
        device: see [`load_teacher`].

    Returns:
        None where it is not in the cache, and the Hub is out of reach or `HF_HUB_OFFLINE` is set.

    Raises:
        OSError: for a connection that breaks while files are fetched.
    """
    name = HUB_TEACHERS[task]
    folder = find_on_hub(name)
    if folder is None:
        return None
    logger.info(f"no teacher named: {name} from the Hub; --teacher embedded takes the small one in this package")
    teacher = load_teacher(folder, device=device)
    teacher.name = name
    return teacher


def find_on_hub(name: str) -> Path | None:
    """Return the folder of a model in the Hub's cache, fetched if need be; None where it cannot be had."""
    if (folder := cached(name)) is not None:
        return folder
    if constants.HF_HUB_OFFLINE:
        return None
    info = _within(SECONDS, lambda: HfApi().model_info(name, files_metadata=True, timeout=SECONDS))
    sizes = {one.rfilename: one.size or 0 for one in getattr(info, "siblings", None) or []}
    if not set(NEEDED) <= set(sizes):
        return None
    size = sum(size for file, size in sizes.items() if any(fnmatch(file, pattern) for pattern in FILES))
    logger.info(f"fetching {name} from {constants.ENDPOINT}, {size / 1e6:.0f} MB, into {constants.HF_HUB_CACHE}, once")
    return Path(snapshot_download(name, allow_patterns=list(FILES)))


def cached(name: str) -> Path | None:
    """Return the folder of a model in the Hub's cache; None where one of `NEEDED` is missing."""
    found = [try_to_load_from_cache(name, file) for file in NEEDED]
    return Path(found[0]).parent if all(isinstance(path, str) for path in found) else None  # type: ignore[arg-type]


def _within(seconds: float, call: Callable[[], Any]) -> Any:
    """Return what a call to the Hub returns; None where it fails or takes longer, as looking up an address may."""
    found: list[Any] = [None]

    def run() -> None:
        try:
            found[0] = call()
        except (OSError, errors.HTTPError) as error:
            logger.debug(f"the Hub is out of reach: {error}")

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(2 * seconds)
    return found[0]
