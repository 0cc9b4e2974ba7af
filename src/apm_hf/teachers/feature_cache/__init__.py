"""Teachers' features on the disk: written once by any number of processes, read by row at memory-map speed."""

from .layout import CacheSettings, Estimate, estimate
from .reader import CachedImages, FeatureCache
from .writer import write_feature_cache

__all__ = ["CacheSettings", "CachedImages", "Estimate", "FeatureCache", "estimate", "write_feature_cache"]
