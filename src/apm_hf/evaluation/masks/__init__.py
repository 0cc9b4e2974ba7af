"""Score islands against masks of parts and wholes, with rival methods and controls (`apm evaluate --task islands`).

Protocol:

* Images are resized without cropping to the square input of the APM and the teacher. Every method outputs a map of
  features over it, of one size for all; the teacher's grid is interpolated bilinearly, at no extra cost. The stronger
  rival is the teacher on four shifted images, interpolated from twice its grid.
* K-means on directions (`apm_hf.islands.cluster`) divides a map into as many segments as the image's mask has, for
  every method alike; methods get this number, but no positions. `segments` sets a fixed number instead. Colours are
  clustered by distance (see `methods.colour_maps`); SLIC gives the fewest superpixels that are at least as many.
* Segments are resized to the mask's resolution by nearest cell, and scored there: adjusted Rand index, normalised
  mutual information, IoU after matching, boundary F; at whole and at part level. Void pixels are ignored, and so are
  images whose mask is one segment, on which every method would be correct.
* Probes for the parts' names are fitted to pixels of the first half of the images and scored on the second half; the
  pixels and their number are the same for every method.
* Test-time training fits a model to the teacher's grid of the image that is then scored, without its mask. The masks'
  number of segments is all that any method gets of them.
* Controls: random weights; another image's pixels; the leave-one-out mean of the APM's outputs, which varies with
  position only (no upper bound: another image's segments may score higher); segments against another image's mask;
  random segments. Images that a model was distilled from are not excluded: choose others. Scenes are drawn from
  another stream than the demo's.

Every interval is from the bootstrap over images; differences to the teacher are paired by image.

Source: islands are GLOM's (arXiv:2102.12627); locations are queried as in arXiv:2410.20535, section 3.
"""

from .datasets import MaskedImages, load_masked_images
from .runner import GRID_TTT, evaluate_islands

__all__ = ["GRID_TTT", "MaskedImages", "evaluate_islands", "load_masked_images"]
