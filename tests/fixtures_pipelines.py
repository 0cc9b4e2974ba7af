"""What pipelines say, as arrays. Imports nothing of this project: a process without it reads answers, too."""

import numpy as np

LABELS = ["cat", "dog", "owl"]


def scores(rows):
    """`(B, K)`, what pipelines that classify say of B pictures, in the order of `LABELS`."""
    return np.array([[{x["label"]: x["score"] for x in row}[label] for label in LABELS] for row in rows])


def label_map(row):
    """`(height, width)`, the masks that a pipeline that segments finds in one picture."""
    return sum(np.asarray(x["mask"]) // 255 * LABELS.index(x["label"]) for x in row)
