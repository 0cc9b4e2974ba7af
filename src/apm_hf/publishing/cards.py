"""Write the model card: how a model was made, what was measured, which licences it inherits, how it is loaded.

The card is `model_card.md`, filled in through `huggingface_hub.ModelCard.from_template`. What it was filled in with is
kept beside it in `card.json`, so that a model that moves can be given a card for its new place.
"""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from PIL import Image, ImageOps

from ..assets import EMBEDDED
from ..data.images import read_rgb
from ..data.sample_photos import sample_photos
from ..runs import provenance
from ..runs.files import write_atomically
from ..teachers.licenses import HUB_LICENSES, public_name

if TYPE_CHECKING:
    from ..pair import APM

FACTS_FILE = "card.json"
PICTURE, PHOTO_SIZE = "islands.png", 448
SAMPLES = ("chelsea", "coffee")  # both in the public domain
# In a wheel the template lies beside this file, in a checkout at the top.
_TEMPLATES = (Path(__file__).with_name("model_card.md"), Path(__file__).parents[3] / "model_card.md")
_TASK = "image-feature-extraction"


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """Hold the facts of a model card.

    Args:
        repo_id: how the model is loaded: `user/name`, or a folder.
        teacher, dataset: names on the Hub, or of local folders, of which only the last part is written.
        command: that made the model.
        steps: optimiser steps.
        num_parameters: of the student.
        metrics: measured figures of this model by name.
        comparison: what others reach, in Markdown.
        warning: why the model should not be used; `publish` asks for `force` then.
        photos: what the picture in the folder shows, see [`write_card_picture`]; empty where there is none.
        versions: by package; `commit` is that of a checkout. By default, those at hand.
    """

    repo_id: str
    teacher: str
    dataset: str
    command: str
    steps: int
    num_parameters: int
    metrics: Mapping[str, float]
    comparison: str = ""
    warning: str = ""
    photos: str = ""
    versions: Mapping[str, str] | None = None

    def public(self) -> "CardFacts":
        """Return the facts without paths of this computer."""
        versions = self.versions
        if versions is None:
            at_hand, commit = provenance.versions(), provenance.commit()
            versions = {name: at_hand[name] for name in ("apm_hf", "torch", "transformers") if name in at_hand}
            versions |= {} if commit is None else {"commit": commit}
        return replace(
            self,
            repo_id=public_name(self.repo_id),
            teacher="apm_hf's photo teacher" if self.teacher == EMBEDDED else public_name(self.teacher),
            dataset=public_name(self.dataset),
            versions=versions,
            metrics={name: float(value) for name, value in self.metrics.items()},
        )


def write_card(folder: str | os.PathLike[str], facts: CardFacts) -> Path:
    """Write `README.md`, the model card, and `card.json`, its facts, into a model folder.

    Licences are those of `distilled_from` in the folder's configuration.

    Raises:
        FileNotFoundError: if the package was installed without its template.
    """
    folder = Path(folder)
    named, facts = facts, facts.public()
    teacher = None if named.teacher == EMBEDDED else _hub_name(named.teacher)
    dataset = _hub_name(named.dataset)
    hub_names = {"base_model": teacher, "datasets": None if dataset is None else [dataset]}
    content = {**asdict(facts), "hub_names": hub_names}
    card = _render(folder, facts, hub_names)
    write_atomically(folder / FACTS_FILE, json.dumps(content, indent=2) + "\n")
    write_atomically(folder / "README.md", card)
    return folder / "README.md"


def change_card(folder: str | os.PathLike[str], **changes: str) -> bool:
    """Change facts of a folder's card, if it is as `write_card` left it.

    Args:
        **changes: fields of [`CardFacts`], such as `repo_id`, the name that the model will be loaded by.

    Returns:
        Whether the card was changed; a card that was edited is left as it is.
    """
    folder = Path(folder)
    try:
        content = json.loads((folder / FACTS_FILE).read_text())
        hub_names = content.pop("hub_names")
        known = {field.name for field in fields(CardFacts)}
        facts = CardFacts(**{name: value for name, value in content.items() if name in known})
        if (folder / "README.md").read_text() != _render(folder, facts, hub_names):
            return False
    except (OSError, ValueError, KeyError, TypeError):
        return False
    facts = replace(facts, **changes)  # type: ignore[arg-type]
    content = {**asdict(facts), "hub_names": hub_names}
    card = _render(folder, facts, hub_names)
    write_atomically(folder / FACTS_FILE, json.dumps(content, indent=2) + "\n")
    write_atomically(folder / "README.md", card)
    return True


def warning_of(folder: Path) -> str:
    """Return why the model in a folder should not be used, as its card says; empty where it says nothing."""
    try:
        return json.loads((folder / FACTS_FILE).read_text()).get("warning", "")
    except (OSError, ValueError, AttributeError):
        return ""


def card_photos(paths: Sequence[str | os.PathLike[str]] = ()) -> tuple[list[Image.Image], str]:
    """Return square photos for a card's picture, and what they are: these, or two of scikit-image's sample photos.

    No photo of the training data is taken, whose publication somebody else may have to permit.

    Args:
        paths: photos that may be published; the middle of each is shown.

    Raises:
        ValueError: for an unreadable photo.
        ImportError: without paths, where scikit-image is not installed.
    """
    if paths:
        photos, what = [read_rgb(path) for path in paths], "chosen by whoever published this model"
    else:
        found = sample_photos(*SAMPLES)
        photos, what = list(found.values()), f"scikit-image's `{'` and `'.join(SAMPLES)}`, in the public domain"
    return [ImageOps.fit(photo, (PHOTO_SIZE, PHOTO_SIZE)) for photo in photos], what


def write_card_picture(folder: str | os.PathLike[str], apm: "APM", photos: Sequence[Image.Image]) -> Path:
    """Write `islands.png`: a row for each photo, with the student's features, their regions, and a control.

    Args:
        apm: the student, and its teacher if it reads the teacher's tokens or embeddings.
        photos: square ones, see [`card_photos`].

    Raises:
        ValueError: for a student that reads its teacher, without one.
        ImportError: without the extra `viz`.
    """
    from ..islands.pictures import photos_picture

    pixel_values = apm.pixel_values(list(photos))
    column = apm.trigger_column(list(photos), pixel_values)
    models = apm.bare_model, apm.control().bare_model
    with torch.no_grad():
        return photos_picture(photos, Path(folder) / PICTURE, *models, pixel_values, trigger_column=column)


def _hub_name(name: str) -> str | None:
    """`user/name`, without the configuration of a data set; None for what is no repository."""
    name = name.partition(":")[0]
    return name if not os.path.exists(name) and re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name) else None


def _render(folder: Path, facts: CardFacts, hub_names: Mapping[str, Any]) -> str:
    template = next((path for path in _TEMPLATES if path.exists()), None)
    if template is None:
        raise FileNotFoundError(f"model_card.md: expected the card's template in one of {list(map(str, _TEMPLATES))}")
    config = json.loads((folder / "config.json").read_text()) if (folder / "config.json").exists() else {}
    teachers = [entry for entry in config.get("distilled_from") or [] if entry.get("name")]
    name, reads_text = Path(facts.repo_id).name, config.get("text_config") is not None
    reads_tokens = config.get("trigger_source") == "tokens"
    # Of the four relations that the Hub knows, none of which is distillation; without one it guesses.
    relation = "adapter" if reads_tokens else "finetune"
    origin: dict[str, Any] = {"base_model_relation": relation} if hub_names["base_model"] else {}
    data = ModelCardData(
        **_licence(teachers, hub_names["base_model"]),
        library_name="transformers",
        pipeline_tag="zero-shot-image-classification" if reads_text else _TASK,
        tags=["apm", "glom", "distillation", "custom_code"],
        model_name=name if facts.metrics else None,
        eval_results=[
            EvalResult(
                task_type=_TASK,
                dataset_type=(hub_names["datasets"] or ["local"])[0],
                dataset_name=facts.dataset,
                metric_type=metric,
                metric_value=round(value, 4),
            )
            for metric, value in facts.metrics.items()
            if math.isfinite(value)
        ]
        or None,
        **hub_names,
        **origin,
    )
    rows = "\n".join(f"| {metric} | {value:.4f} |" for metric, value in facts.metrics.items())
    size, patch = config.get("image_size", 448), config.get("patch_size", 14)
    card = ModelCard.from_template(
        data,
        template_path=str(template),
        model_name=name,
        repo_id=facts.repo_id,
        teacher=facts.teacher,
        dataset=facts.dataset,
        command=facts.command,
        steps=facts.steps,
        num_parameters=f"{facts.num_parameters:,}",
        num_locations=f"{(size // patch) ** 2:,}",
        feature_size=config.get("feature_size", 1024),
        versions=", ".join(f"{package} {version}" for package, version in (facts.versions or {}).items()),
        licences=_licence_table(teachers, facts.teacher),
        metrics=f"| | |\n| --- | --- |\n{rows}" if rows else "Nothing was measured.",
        comparison=facts.comparison,
        warning=facts.warning,
        reads_text=reads_text,
        reads_tokens=reads_tokens,
        picture=PICTURE if facts.photos else None,
        photos=facts.photos,
        home=_home(),
    )
    return str(card)


def _licence(teachers: list[dict[str, Any]], page: str | None) -> dict[str, Any]:
    """Return the weights' licence as the Hub takes it: the teachers', where it is known and one, else a link to them.

    Args:
        page: of the teacher, on the Hub.
    """
    found = {entry.get("license") or "other" for entry in teachers}
    name = found.pop() if len(found) == 1 else "other"
    if name in HUB_LICENSES:
        return {"license": name}
    link = {} if page is None else {"license_link": f"https://huggingface.co/{page}"}
    return {"license": "other", "license_name": "see-teacher-and-data" if name == "other" else name, **link}


def _home() -> str | None:
    """Return the address of this package, as its metadata have it."""
    try:
        named = metadata("apm_hf").get_all("Project-URL") or []
    except PackageNotFoundError:
        return None
    return next((entry.partition(",")[2].strip() for entry in named), None)


def _licence_table(teachers: list[dict[str, Any]], teacher: str) -> str:
    rows = [(entry["name"], entry.get("license")) for entry in teachers] or [(teacher, None)]
    lines = [f"| {name} | {licence or 'unknown: look it up before you use this model'} |" for name, licence in rows]
    return "| teacher | licence |\n| --- | --- |\n" + "\n".join(lines)
