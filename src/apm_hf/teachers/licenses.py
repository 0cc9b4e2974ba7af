"""Find what a student inherits from its teacher: public name, revision and licence, if available, never guessed.

The licence is in the front matter of a teacher's model card (https://huggingface.co/docs/hub/model-cards). It is
read from the teacher's folder or from the Hub's cache; nothing is downloaded, and None means unknown. For a teacher on
the Hub, `hf download NAME README.md` puts the card into the cache.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from huggingface_hub import ModelCard, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers.utils import logging

from ..configuration_apm import APMConfig

logger = logging.get_logger(__name__)

# What the Hub takes as `license`, https://huggingface.co/docs/hub/repositories-licenses; others are "other".
HUB_LICENSES = frozenset(
    """
    afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
    bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
    cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0
    etalab-2.0 eupl-1.1 eupl-1.2 fair-noncommercial-research-license gemma gfdl gpl gpl-2.0 gpl-3.0
    grok2-community h-research intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2
    llama3.3 llama4 lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openmdw-1.0 openrail openrail++ osl-3.0
    pddl postgresql unlicense wtfpl zlib
    """.split()
)


def public_name(name: str) -> str:
    """Return a Hub name unchanged; for a path only the last part, which reveals no local folders."""
    local = os.path.exists(name) or name.startswith((".", "~", os.sep)) or name.count("/") > 1
    return Path(os.path.abspath(name)).name if local else name


def teacher_license(teacher: Any) -> str | None:
    """Return the licence of a [`Teacher`], e.g. `"apache-2.0"`; its name if the Hub lists it as `"other"`."""
    card = _card_path(teacher)
    if card is None:
        return None
    try:
        data = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
    except (ValueError, yaml.YAMLError) as error:
        logger.warning(f"{teacher.name}: its model card cannot be read, so its licence is unknown: {error}")
        return None
    found = data.get("license")
    if found == "other":
        found = data.get("license_name") or found
    found = ", ".join(map(str, found)) if isinstance(found, list) else found
    return str(found).strip() or None if found is not None else None


def origin(teacher: Any, *, dataset: str | None = None) -> dict[str, str | None]:
    """Return an entry for `APMConfig.distilled_from`.

    Args:
        teacher: a [`Teacher`].
        dataset: the training data: a name on the Hub or a folder.
    """
    entry = {
        "name": public_name(teacher.name),
        "license": teacher_license(teacher),
        "revision": _revision(teacher),
    }
    if entry["license"] is None:
        logger.info(f"{entry['name']}: its licence was not found; look it up before you publish its students")
    return entry if dataset is None else entry | {"dataset": public_name(dataset)}


def inherit(config: APMConfig, teachers: Iterable[Any], *, dataset: str | None = None) -> None:
    """Add teachers to `config.distilled_from`; entries with the same name are unchanged."""
    entries = list(config.distilled_from or [])
    for teacher in teachers:
        if public_name(teacher.name) not in {entry["name"] for entry in entries}:
            entries.append(origin(teacher, dataset=dataset))
    config.distilled_from = entries or None
    config.validate_architecture()


def record_weights(config: APMConfig, teacher: Any) -> None:
    """Write the SHA-256 of a teacher's weights into its entry of `config.distilled_from`."""
    for entry in config.distilled_from or []:
        if entry["name"] == public_name(teacher.name):
            entry["sha256"] = teacher.features_digest()


def _revision(teacher: Any) -> str | None:
    """Return the commit on the Hub that was loaded."""
    return getattr(getattr(teacher.model, "config", None), "_commit_hash", None)


def _card_path(teacher: Any) -> str | None:
    if os.path.isdir(teacher.name):
        path = Path(teacher.name) / "README.md"
        return str(path) if path.is_file() else None
    try:
        cached = try_to_load_from_cache(teacher.name, "README.md", revision=_revision(teacher))
    except HFValidationError:  # no name on the Hub
        return None
    return cached if isinstance(cached, str) else None
