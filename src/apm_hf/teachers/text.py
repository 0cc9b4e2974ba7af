"""Embed class names: as prompts through a text tower, or as the class weights of a classifier.

Prompts are averaged as in CLIP (arXiv:2103.00020, Sec. 3.1.4).

Shapes: K classes, F width of the teacher's embeddings.
"""

import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .families import DUAL_ENCODERS

DEFAULT_TEMPLATES = ("a photo of a {}.",)
TEXT_BATCH_SIZE = 256

Template = Sequence[str | None]  # None is where the class name goes


class TowerText:
    """Embed prompts, `(n, F)`, with the text tower and the tokenizer of a dual encoder."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer

    def __call__(self, prompts: list[str]) -> Tensor:
        options = tokenizer_options(self.model, self.tokenizer)
        tokens = self.tokenizer(trained_case(self.model, prompts), return_tensors="pt", **options)
        return self.model.get_text_features(**tokens.to(self.model.device)).pooler_output


class ModuleText:
    """Embed prompts, `(n, F)`, with a user's function of a module; see [`Teacher.from_module`]."""

    def __init__(self, module: nn.Module, text: Callable[[nn.Module, list[str]], Tensor], feature_size: int) -> None:
        self.module, self.text, self.feature_size = module, text, feature_size

    def __call__(self, prompts: list[str]) -> Tensor:
        embeds = self.text(self.module, prompts)
        got = tuple(embeds.shape) if isinstance(embeds, Tensor) else type(embeds).__name__
        if got != (len(prompts), self.feature_size):
            raise ValueError(
                f"text: expected shape {(len(prompts), self.feature_size)} for as many prompts, got {got}"
            )
        return embeds


def tokenizer_options(model: Any, tokenizer: Any) -> dict[str, Any]:
    """Return the options by which a dual encoder's prompts are truncated and padded."""
    longest = min(tokenizer.model_max_length, model.config.text_config.max_position_embeddings)
    return {"truncation": True, "max_length": longest, **DUAL_ENCODERS[model.config.model_type].tokenizer_options}


def trained_case(model: Any, prompts: list[str]) -> list[str]:
    """Return prompts in lower case if the dual encoder was trained on lower case."""
    lowercase = DUAL_ENCODERS[model.config.model_type].lowercase
    return [prompt.lower() for prompt in prompts] if lowercase else prompts


def words_of(class_name: str) -> str:
    """Return a class name as prompts have it: data sets write "ruffed_grouse"."""
    return class_name.replace("_", " ")


def prompt_embeds(
    encode: Callable[[list[str]], Tensor], class_names: Sequence[str], templates: Sequence[Template], what: str
) -> Tensor:
    """Return the mean over templates of unit text embeddings, `(K, F)` float32.

    Args:
        encode: Prompts -> `(n, F)`.
        what: Name of the embeddings in errors.

    Raises:
        ValueError: Embeddings that are not finite, naming the prompts.
    """
    words = [words_of(name) for name in class_names]
    means = []
    for start in range(0, len(words), TEXT_BATCH_SIZE):
        total: Tensor | int = 0
        for template in templates:
            names = words[start : start + TEXT_BATCH_SIZE]
            prompts = ["".join(name if part is None else part for part in template) for name in names]
            with torch.inference_mode():
                embeds = encode(prompts)
            check_finite(embeds, what, [f"'{prompt}'" for prompt in prompts])
            total = total + nn.functional.normalize(ordinary(embeds), dim=-1)
        assert isinstance(total, Tensor)
        means.append(total / len(templates))
    return torch.cat(means)


class ClassWeights:
    """Hold labels, and a row of weights for each of them.

    Args:
        weights: `(K, F)`, or the linear layer that has them, on any device.
        labels: K labels, in the rows' order.

    Attributes:
        names: Unique labels: those that occur twice have their index appended, "crane (134)".
    """

    def __init__(self, weights: Tensor | nn.Linear, labels: Sequence[str]) -> None:
        self.weights, self.labels = weights, list(labels)
        counts = Counter(self.labels)
        self.names = [f"{label} ({row})" if counts[label] > 1 else label for row, label in enumerate(self.labels)]

    def __call__(self, class_names: Sequence[str], teacher: str) -> Tensor:
        """Return the rows of the names, `(K', F)`, matched exactly, else ignoring case and underscores.

        Raises:
            ValueError: Unknown or ambiguous names, or two names for one label.
        """
        rows_by_label: dict[str, list[int]] = {}
        for row, labels in enumerate(zip(self.labels, self.names, strict=True)):
            for label in {_plain(label) for label in labels}:
                rows_by_label.setdefault(label, []).append(row)

        rows: list[int] = []
        problems = []
        for name in class_names:
            matches = rows_by_label.get(_plain(name), [])
            matches = [row for row in matches if name in (self.labels[row], self.names[row])] or matches
            if len(matches) == 1 and matches[0] not in rows:
                rows.append(matches[0])
            elif len(matches) == 1:
                problems.append(f"'{name}' (given twice)")
            else:
                choices = " or ".join(f"'{self.names[row]}'" for row in matches)
                problems.append(f"'{name}' (ambiguous: {choices})" if matches else f"'{name}' (unknown)")
        if problems:
            raise ValueError(
                f"Expected different names among the {len(self.labels)} labels of teacher '{teacher}', "
                f"got {len(problems)} of {len(class_names)} wrong: {first_five(problems)}."
            )
        return (self.weights if isinstance(self.weights, Tensor) else self.weights.weight)[rows]


def check_class_names(class_names: Sequence[str]) -> None:
    """Raise a ValueError for none, blank ones or ones that occur twice."""
    check_strings(class_names, "class_names")
    if repeated := [name for name, count in Counter(class_names).items() if count > 1]:
        raise ValueError(f"Expected different class names, got more than once: {first_five(repeated)}.")


def parse_template(template: str) -> list[str | None]:
    """Split a template into literal texts and None where the class name goes."""
    try:
        fields = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"Expected a template with '{{}}' or '{{class}}', got {template!r}: {error}.") from error
    placeholders = {name for _, name, _, _ in fields if name is not None}
    if not placeholders or not placeholders <= {"", "class"}:
        raise ValueError(f"Expected a template with '{{}}' or '{{class}}' and no other field, got {template!r}.")
    return [part for text, name, _, _ in fields for part in ([text] if name is None else [text, None])]


def check_strings(strings: Sequence[str], what: str) -> None:
    """Raise a ValueError unless `strings` is a list of one or more strings, none of them blank."""
    if isinstance(strings, str) or not strings or not all(isinstance(x, str) and x.strip() for x in strings):
        raise ValueError(f"Expected `{what}` to be one or more strings in a list, none blank, got {strings!r}.")


def first_five(items: Sequence[object]) -> str:
    """Format the first five items for an error message, and the number of the rest."""
    return ", ".join(map(str, items[:5])) + (f" and {len(items) - 5} more" if len(items) > 5 else "")


def ordinary(tensor: Tensor) -> Tensor:
    """Return a float32 copy that autograd may save for a student's loss, unlike an inference tensor."""
    return tensor.clone().float()


def check_finite(tensor: Tensor, what: str, rows: Sequence[str] | None = None) -> None:
    """Raise a ValueError for NaN or infinity, naming the rows, by default as images."""
    bad = (~torch.isfinite(tensor).flatten(1).all(dim=1)).nonzero().flatten().tolist()
    if bad:
        where = [f"image {row}" if rows is None else rows[row] for row in bad]
        raise ValueError(f"Expected finite {what}, got NaN or infinity in {first_five(where)}.")


def _plain(name: str) -> str:
    return name.casefold().replace("_", " ")
