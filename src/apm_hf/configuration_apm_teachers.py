"""What a configuration says about teachers: the scale of their features, a head for each, what a model inherits.

Teachers' features differ in scale by orders of magnitude, so that one would drown the others: AM-RADIO
(arXiv:2312.06709), PHI-S (arXiv:2410.01680) and Theia (arXiv:2407.20179) train in standardised spaces.

Legend: F feature width.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

from torch import nn

HEAD_FIELDS = ("feature_size", "feature_mean", "feature_std", "pooling")
ORIGIN_FIELDS = ("name", "license", "revision", "dataset")
POOLINGS = ("mean", "attention")


def check_statistics(where: str, feature_size: int, mean: Any, std: Any) -> None:
    """Raise a `ValueError` unless both are None, or a mean and a deviation (one for all or its own) per channel.

    Args:
        where: stands in front of the fields' names in messages.
        feature_size: F.
    """
    if (mean is None) != (std is None):
        missing, given = ("feature_mean", "feature_std") if mean is None else ("feature_std", "feature_mean")
        raise ValueError(f"{where}{missing}: expected it beside {given}, got None")
    if mean is None:
        return
    for name, values in (("feature_mean", mean), ("feature_std", [std] * feature_size if _is_number(std) else std)):
        if not isinstance(values, list | tuple) or len(values) != feature_size:
            got = f"{len(values)} values" if isinstance(values, list | tuple) else repr(values)
            raise ValueError(f"{where}{name}: expected feature_size={feature_size} numbers, got {got}")
        for channel, value in enumerate(values):
            if not _is_number(value) or not math.isfinite(value) or (name == "feature_std" and value <= 0):
                kind = "positive finite" if name == "feature_std" else "finite"
                raise ValueError(f"{where}{name}: expected {kind} numbers, got {value!r} in channel {channel}")


def check_pooling(where: str, pooling: str, feature_size: int, num_heads: int) -> None:
    """Raise a `ValueError` for a way of pooling that is unknown or does not fit the features' width."""
    if pooling not in POOLINGS:
        raise ValueError(f"{where}pooling: expected one of {list(POOLINGS)}, got {pooling!r}")
    if pooling == "attention":
        if num_heads < 1 or feature_size % num_heads:
            raise ValueError(
                f"{where}pooling_num_heads: expected a divisor of feature_size={feature_size}, got {num_heads}"
            )
        if feature_size % 4:
            raise ValueError(
                f"{where}feature_size: expected a multiple of 4 with pooling='attention', got {feature_size}"
            )


def check_teacher_heads(heads: Any, pooling: str, pooling_num_heads: int) -> None:
    """Raise a `ValueError` unless `heads` is `{name: {"feature_size": F, ...}}` with fields of `HEAD_FIELDS`.

    Args:
        pooling, pooling_num_heads: of heads that name none.
    """
    taken = nn.ModuleDict()  # names of its attributes cannot be names of modules
    for name, head in heads.items():
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name) or hasattr(taken, name):
            raise ValueError(
                "teacher_heads: expected names of letters, digits, - and _, none of them an attribute of ModuleDict, "
                f"got {name!r}"
            )
        where = f"teacher_heads[{name!r}]: "
        if not isinstance(head, dict) or "feature_size" not in head or not head.keys() <= set(HEAD_FIELDS):
            got = sorted(head) if isinstance(head, dict) else repr(head)
            raise ValueError(f"{where}expected feature_size and any of {list(HEAD_FIELDS[1:])}, got {got}")
        size = head["feature_size"]
        if type(size) is not int or size < 1:
            raise ValueError(f"{where}feature_size: expected a positive integer, got {size!r}")
        check_statistics(where, size, head.get("feature_mean"), head.get("feature_std"))
        check_pooling(where, head.get("pooling", pooling), size, pooling_num_heads)


def check_origins(origins: Sequence[Any]) -> None:
    """Raise a `ValueError` unless every entry has a public `name` and otherwise texts or None of `ORIGIN_FIELDS`."""
    for index, origin in enumerate(origins):
        where = f"distilled_from[{index}]"
        if not isinstance(origin, dict) or "name" not in origin or not origin.keys() <= set(ORIGIN_FIELDS):
            got = sorted(origin) if isinstance(origin, dict) else repr(origin)
            raise ValueError(f"{where}: expected name and any of {list(ORIGIN_FIELDS[1:])}, got {got}")
        for field, value in origin.items():
            if not (value is None and field != "name") and not (isinstance(value, str) and value.strip()):
                raise ValueError(f"{where}: expected {field} to be a text that is not empty, got {value!r}")
        for field in ("name", "dataset"):
            value = origin.get(field) or ""
            if value.startswith((".", "~", "/")) or "\\" in value or value.count("/") > 1:
                raise ValueError(
                    f"{where}: expected {field} to be public, such as 'user/name' or the last part of a folder's "
                    f"path, got {value!r}"
                )


def plain_statistics(mean: Any, std: Any) -> dict[str, Any]:
    """`feature_mean` and `feature_std` as JSON can hold them, from tensors, arrays or lists.

    Nine digits are float32's to the bit; a configuration of a thousand channels stays readable.
    """

    def plain(values: Any) -> Any:
        values = values.tolist() if hasattr(values, "tolist") else values
        if values is None or _is_number(values):
            return values if values is None else float(f"{values:.9g}")
        return [float(f"{value:.9g}") for value in values]

    return {"feature_mean": plain(mean), "feature_std": plain(std)}


def _is_number(value: Any) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool)
