"""Features -> clusters: which locations agree.

Legend: L locations, F feature width.
"""

import numpy as np
import torch
from torch import Tensor


def cluster(features: Tensor, num_clusters: int, *, seed: int = 0) -> np.ndarray:
    """K-means on features of norm 1: `(L,)` cluster indices for features `(L, F)`.

    Raises:
        ValueError: for more clusters than locations.
    """
    try:
        from sklearn.cluster import KMeans
    except ImportError as error:
        raise ImportError('clustering needs scikit-learn: pip install "apm_hf[viz]"') from error
    if not 1 <= num_clusters <= len(features):
        raise ValueError(f"num_clusters: expected 1 to {len(features)}, the number of locations, got {num_clusters}")
    normalised = torch.nn.functional.normalize(features.detach().float().cpu(), dim=-1).numpy()
    return KMeans(num_clusters, n_init=4, random_state=seed).fit_predict(normalised)
