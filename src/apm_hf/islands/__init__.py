"""Islands of agreement: neighbouring locations whose features agree, as colours and clusters.

Source: the islands are GLOM's (Hinton 2021, arXiv:2102.12627).
"""

from .clusters import cluster
from .colours import PCAColours

__all__ = ["PCAColours", "cluster"]
