"""Map a data set's labels to class indices, and check the map against predictions.

A wrong map lowers accuracy silently: folders 0..999 sort as 0, 1, 10, 100; ImageNet-A and -R have 200 of the
1,000 classes, named by WordNet id; a missing folder shifts all later ones. No list of classes is shipped: the map is
made from the data set's metadata, and anything that does not fit exactly is a ValueError.

[`build_label_map`] reads names; [`check_label_map`] tests them on a teacher's zero-shot predictions. The check cannot
detect one or two wrong classes among many: a teacher may genuinely confuse all maillots with bikinis.

Legend: N images, K classes.
"""

import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...runs.files import read_text
from ...teachers import first_five

WORDNET_ID = re.compile(r"n\d{8}")
_WORDNET_LINE = re.compile(r"(n\d{8})[\s,:_-]+(\S.*)")
Labels = NDArray[np.int64]

# Thresholds of the check. Chosen on CIFAR-10 with a teacher of 10 to 44 %, clean and corrupted, and on simulated
# teachers of 5 to 70 % with 10 to 1,000 classes: from 15 % on, correct maps stay well inside these limits.
_DOUBT = 1e-6  # p-value of a sign test between the map and a permutation of it
_LEFT_OVER = 0.15  # all classes permuted: the map explains at most this share of what the permutation explains
_MOVED_EXPLAINED = 0.5  # some classes permuted: the permutation explains this share of the images of moved classes ...
_MOVED_SHARE = 0.05  # ... and they are this share of all images
_CHANCE_MARGIN = 0.1  # a teacher this much better than chance would have been distinguished from chance


@dataclass(frozen=True)
class LabelMap:
    """Map entries of the label column to class indices.

    Attributes:
        class_names: K readable names; two classes may share one.
        index_of: an integer or a string for each class, all different -> 0..K-1, each once.
    """

    class_names: list[str]
    index_of: Mapping[int | str, int]

    def __post_init__(self) -> None:
        if sorted(self.index_of.values()) != list(range(len(self.class_names))):
            raise ValueError(f"expected one label for each of {len(self.class_names)} classes, got {self.index_of}.")

    def __call__(self, labels: Sequence[int] | Sequence[str]) -> Labels:
        """Return class indices `(N,)`.

        Raises:
            ValueError: for labels that are no class; test sets without labels often contain -1.
        """
        if unknown := sorted(set(labels) - set(self.index_of), key=str):
            known = list(self.index_of)
            raise ValueError(
                f"expected labels from {known[0]!r} to {known[-1]!r}, {len(known)} in all, got {first_five(unknown)}."
            )
        return np.array([self.index_of[label] for label in labels], dtype=np.int64)


@dataclass(frozen=True, kw_only=True)
class NameOptions:
    """Configure how class names become words for a prompt; underscores and WordNet ids are always removed.

    Args:
        class_names: names in order, for a data set that has none.
        names_file: file next to the data on the Hub, for [`read_class_names`].
        renames: readable names to replace.
        first_synonym: shorten "tench, Tinca tinca" to "tench", unless two classes would become the same.
        split_words: "ApplyLipstick" is written "Apply Lipstick".
    """

    class_names: tuple[str, ...] | None = None
    names_file: str | None = None
    renames: Mapping[str, str] = field(default_factory=dict)
    first_synonym: bool = False
    split_words: bool = False

    def readable(self, names: Sequence[str]) -> list[str]:
        """Return class names as words for prompts: without identifiers and underscores, renamed where configured."""
        names = [_without_id(name).replace("_", " ") for name in names]
        if self.split_words:
            names = [re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name) for name in names]
        names = [" ".join(name.split()) for name in names]
        if self.first_synonym:
            short = [name.split(",")[0] for name in names]
            counts = Counter(short)
            names = [full if counts[first] > 1 else first for full, first in zip(names, short, strict=True)]
        return [self.renames.get(name, name) for name in names]


def build_label_map(
    sources: Sequence[str] | None,
    class_names: Sequence[str] | Mapping[str, str] | None = None,
    *,
    num_classes: int | None = None,
    sources_are_labels: bool = False,
    options: NameOptions | None = None,
) -> LabelMap:
    """Build the map from the names that a data set gives its classes.

    Args:
        sources: the data set's class names, in its order: names ("great_white_shark"), names after WordNet ids, bare
            ids, or numbers. None if it only has integers.
        class_names: K names in the order of the numbers or of the sorted ids, or ids -> names. Needed unless the
            sources are names; if they are, then both must be the same names, and `class_names` sets the order.
        num_classes: K, if known.
        sources_are_labels: the label column holds the sources themselves instead of positions in them.
        options: for the names; by default only underscores and ids are removed.

    Raises:
        ValueError: for sources that repeat, mix codings or leave gaps; names that are missing, too many or different.
    """
    if sources is None:
        if class_names is None or isinstance(class_names, Mapping):
            raise ValueError("the labels are integers without names; expected `class_names`, one for each, in order.")
        names, order = list(class_names), list(range(len(class_names)))
        keys: Sequence[int | str] = order
    else:
        if not sources:
            raise ValueError("expected at least one class, got none.")
        if repeated := [name for name, count in Counter(sources).items() if count > 1]:
            raise ValueError(f"expected different names of classes, got more than once: {first_five(repeated)}.")
        names, order = _ordered(list(sources), class_names)
        keys = sources if sources_are_labels else range(len(sources))
    if num_classes is not None and len(names) != num_classes:
        raise ValueError(f"expected {num_classes} classes, got {len(names)}: {first_five(names)}.")
    names = (options or NameOptions()).readable(names)
    if blank := [index for index, name in enumerate(names) if not name]:
        raise ValueError(f"expected a name for every class, got none for {first_five(blank)}.")
    return LabelMap(names, dict(zip(keys, order, strict=True)))


def _ordered(sources: list[str], class_names: Sequence[str] | Mapping[str, str] | None) -> tuple[list[str], list[int]]:
    """Return the names in the order of the classes, and the class of each source."""
    is_number = [source.isdecimal() for source in sources]
    has_id = [WORDNET_ID.match(source) is not None for source in sources]
    if any(has_id) and not all(has_id):
        odd = [source for source, flag in zip(sources, has_id, strict=True) if not flag]
        raise ValueError(f"expected every class or none to have a WordNet id, got {first_five(odd)} among them.")
    if all(is_number):
        numbers = [int(source) for source in sources]
        first, last = min(numbers), max(numbers)
        if first not in (0, 1) or sorted(numbers) != list(range(first, last + 1)):
            raise ValueError(
                f"expected classes numbered from 0 or 1 without gaps, got {len(numbers)} of {first}..{last}."
            )
        return _given(sources, class_names, "numbers"), [number - first for number in numbers]
    if all(WORDNET_ID.fullmatch(source) for source in sources):
        if isinstance(class_names, Mapping):
            if missing := [source for source in sources if source not in class_names]:
                raise ValueError(f"expected a name for every WordNet id, got none for {first_five(missing)}.")
            return [class_names[source] for source in sources], list(range(len(sources)))
        by_id = sorted(sources)
        return _given(sources, class_names, "WordNet ids"), [by_id.index(source) for source in sources]
    if class_names is None or isinstance(class_names, Mapping):
        return sources, list(range(len(sources)))
    return list(class_names), _matched(sources, class_names)


def _given(sources: list[str], class_names: Sequence[str] | Mapping[str, str] | None, what: str) -> list[str]:
    if class_names is None or isinstance(class_names, Mapping):
        raise ValueError(f"the classes are {what} ({first_five(sources)}); expected `class_names` with their names.")
    if len(class_names) != len(sources):
        raise ValueError(f"expected {len(sources)} class names, as many as there are {what}, got {len(class_names)}.")
    return list(class_names)


def _matched(sources: Sequence[str], class_names: Sequence[str]) -> list[int]:
    """Return the position of each source's name; equal names are matched in order."""
    order: dict[int, int] = {}
    left = list(range(len(class_names)))
    for form in (
        _without_id,
        _plain,
    ):  # "Cardigan" is a dog, "cardigan" a garment: exact matches go first
        places = defaultdict(list)
        for place in left:
            places[form(class_names[place])].append(place)
        for index in (index for index in range(len(sources)) if index not in order):
            if candidates := places[form(sources[index])]:
                order[index] = candidates.pop(0)
        left = [place for rest in places.values() for place in rest]
    extra = [source for index, source in enumerate(sources) if index not in order]
    if extra or left:
        missing = [class_names[place] for place in left]
        raise ValueError(
            "expected the data set and `class_names` to have the same classes; only the data set has: "
            f"{first_five(extra) or 'none'}; only `class_names`: {first_five(missing) or 'none'}."
        )
    return [order[index] for index in range(len(sources))]


def lacks_names(sources: Sequence[str] | None) -> bool:
    """Return whether the sources are only numbers or WordNet ids, which need e.g. [`read_class_names`]."""
    return sources is None or all(source.isdecimal() or WORDNET_ID.fullmatch(source) for source in sources)


def _without_id(name: str) -> str:
    return WORDNET_ID.sub("", name, count=1).lstrip("_- ") if WORDNET_ID.match(name) else name


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", "", _without_id(name)).casefold()


def read_class_names(path: str | os.PathLike[str]) -> list[str] | dict[str, str]:
    """Read names from a file: one per line, or "n01440764 tench" in any line (then other lines are prose), or JSON.

    JSON may be a list of names, an object from WordNet ids to names, or from numbers to [id, name].

    Returns:
        Names in order, which may repeat, or WordNet id -> name.

    Raises:
        ValueError: another form. OSError: no such file.
    """
    path, text = Path(path), read_text(path, "class names")
    if path.suffix.lower() == ".json":
        try:
            content = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"expected JSON in {path}: {error}.") from error
        if isinstance(content, Mapping) and all(isinstance(value, list) for value in content.values()):
            content = {pair[0]: pair[1] for pair in content.values()}
        values = content.values() if isinstance(content, Mapping) else content
        if not isinstance(content, list | Mapping) or not all(isinstance(value, str) for value in values):
            raise ValueError(f"expected names in {path}: a list, or an object from WordNet ids to names.")
        return content if isinstance(content, list) else dict(content)
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if by_id := {match[1]: match[2] for line in lines if (match := _WORDNET_LINE.fullmatch(line))}:
        return by_id
    if not lines:
        raise ValueError(f"expected class names in {path}, got none.")
    return lines


def check_label_map(
    labels: ArrayLike, predictions: ArrayLike, class_names: Sequence[str], *, allow_chance: bool = False
) -> None:
    """Reject labels that a teacher's zero-shot predictions show to be wrong beyond doubt.

    Meant for clean images. With a few images per class, a permutation is fitted to one half of the images and must
    explain the other half; with one, only known mistakes (numbers sorted as text, a shift by one, alphabetical order)
    and chance are detected. A weak teacher passes unless its accuracy is no better than chance.

    Args:
        labels: `(N,)` in 0..K-1.
        predictions: `(N,)` in 0..K-1; any of the classes with the same name.
        class_names: K names.
        allow_chance: accept an accuracy that is not above chance.

    Raises:
        ValueError: if they are wrong; the message has examples of labels and predictions.
    """
    num_classes = len(class_names)
    first_of = np.array([class_names.index(name) for name in class_names])  # ImageNet has two classes named "crane"
    true, guess = (first_of[np.asarray(values, dtype=np.int64)] for values in (labels, predictions))
    if true.shape != guess.shape or true.ndim != 1:
        raise ValueError(f"expected labels and predictions (N,), got {true.shape} and {guess.shape}.")
    chance = float(_shares(true, num_classes) @ _shares(guess, num_classes))
    for cause, intended in _permutations(true, guess, class_names):
        if _is_permuted(true, guess, intended, chance):
            hits = np.mean(true == guess), np.mean(intended == guess)
            raise ValueError(
                f"the labels do not fit the class names{cause}: {hits[0]:.1%} of {len(true)} predictions agree with "
                f"them and {hits[1]:.1%} with a permutation. {_examples(true, guess, intended, class_names)}"
            )
    if not allow_chance and _is_chance(int(np.sum(true == guess)), len(true), chance):
        raise ValueError(
            f"the teacher's accuracy, {np.mean(true == guess):.1%} of {len(true)} images, is no better than chance, "
            f"{chance:.1%}: wrong labels, wrong class names, or a teacher that cannot distinguish these {num_classes} "
            "classes. In the last case, pass allow_chance."
        )


def _shares(classes: Labels, num_classes: int) -> NDArray[np.float64]:
    return np.bincount(classes, minlength=num_classes) / max(1, len(classes))


def _permutations(true: Labels, guess: Labels, class_names: Sequence[str]) -> list[tuple[str, Labels]]:
    """Return known mistakes and the best fit: a cause, and the classes `(N,)` that it implies."""
    num_classes = len(class_names)
    as_text = np.array(sorted(range(num_classes), key=str))
    by_name = np.array(sorted(range(num_classes), key=lambda index: class_names[index].casefold()))
    steps = np.arange(num_classes)
    known = [(" (numbers sorted as text?)", as_text), (" (names sorted alphabetically?)", by_name)]
    known += [(cause, np.argsort(order)) for cause, order in known]
    known += [(" (shifted by one?)", np.roll(steps, 1)), (" (shifted by one?)", np.roll(steps, -1))]
    return [(cause, order[true]) for cause, order in known] + [("", _cross_fitted(true, guess, num_classes))]


def _cross_fitted(true: Labels, guess: Labels, num_classes: int) -> Labels:
    """Map each half of every class by the permutation that best explains the other halves."""
    from scipy.optimize import linear_sum_assignment

    order = np.argsort(true, kind="stable")
    half = np.empty(len(true), dtype=np.int64)
    half[order] = (np.arange(len(true)) - np.searchsorted(true[order], true[order])) % 2
    intended = np.empty_like(true)
    for part in (0, 1):
        counts = np.diag(np.full(num_classes, 0.5))  # without evidence a class is not moved
        np.add.at(counts, (true[half != part], guess[half != part]), 1)
        intended[half == part] = linear_sum_assignment(counts, maximize=True)[1][true[half == part]]
    return intended


def _is_permuted(true: Labels, guess: Labels, intended: Labels, chance: float) -> bool:
    from scipy.stats import binom

    moved = intended != true
    explained, left_over = int(np.sum(moved & (guess == intended))), int(np.sum(moved & (guess == true)))
    if binom.sf(explained - 1, explained + left_over, 0.5) > _DOUBT:
        return False
    agree, fit = np.mean(true == guess) - chance, np.mean(intended == guess) - chance
    altogether = fit >= _CHANCE_MARGIN and agree <= _LEFT_OVER * fit
    in_part = (
        np.mean(moved) >= _MOVED_SHARE
        and explained >= _MOVED_EXPLAINED * np.sum(moved)
        and left_over <= _LEFT_OVER * explained
    )
    return bool(altogether or in_part)


def _is_chance(num_hits: int, num_images: int, chance: float) -> bool:
    """Return whether hits are no more than chance gives, and too few for a somewhat better teacher."""
    from scipy.stats import binom

    better = min(1.0, chance + _CHANCE_MARGIN)
    return bool(binom.sf(num_hits - 1, num_images, chance) > 0.05 and binom.cdf(num_hits, num_images, better) < 0.01)


def _examples(true: Labels, guess: Labels, intended: Labels, class_names: Sequence[str]) -> str:
    pairs = Counter(zip(true[guess == intended].tolist(), guess[guess == intended].tolist(), strict=True))
    totals = Counter(true.tolist())
    wrong = [(label, taken, count) for (label, taken), count in pairs.most_common() if label != taken]
    parts = [
        f"{count} of {totals[label]} images labelled '{class_names[label]}' are taken for '{class_names[taken]}'"
        for label, taken, count in wrong[:3]
    ]
    return "; ".join(parts) + "."
