"""Show islands of agreement, neighbouring locations whose features agree, as colours, clusters, trees and graphs.

Source: islands are from GLOM (Hinton 2021, arXiv:2102.12627).
"""

from ..ttt.maps import feature_map, upsample
from .agreement import collapse, distant_agreement, effective_rank, mean_pairwise_cosine, neighbour_agreement
from .clusters import cluster
from .colours import PCAColours, embed_colours, foreground_mask
from .regions import RegionGraph, region_graph
from .similarity import similarity_map, similarity_to_point, similarity_to_text
from .tree import RegionTree, tree_colours, upsample_labels

__all__ = [
    "PCAColours",
    "RegionGraph",
    "RegionTree",
    "cluster",
    "collapse",
    "distant_agreement",
    "effective_rank",
    "embed_colours",
    "feature_map",
    "foreground_mask",
    "mean_pairwise_cosine",
    "neighbour_agreement",
    "region_graph",
    "similarity_map",
    "similarity_to_point",
    "similarity_to_text",
    "tree_colours",
    "upsample",
    "upsample_labels",
]
