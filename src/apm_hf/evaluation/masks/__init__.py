"""`apm evaluate --task islands`: are islands parts and wholes? Scored against masks, beside rivals and controls.

How it is measured:

* Images are squeezed whole into the square that the APM and the teacher take. Every method answers with a map of
  features over it, of one size for all; the teacher's grid is interpolated bilinearly. That is what a teacher costs
  nothing for; the teacher shown four moved images, interpolated from twice its grid, is the stronger rival.
* K-means on directions (`apm_hf.islands.cluster`) cuts a map into as many segments as the image's own mask has, for
  every method alike: the number is told, where things are is not. `segments` fixes it instead. Colours are clustered
  by distance (see `methods.colour_maps`); SLIC gives the fewest superpixels that are at least as many.
* Segments are resized to the mask's resolution by nearest cell, and scored there: adjusted Rand index, normalised
  mutual information, IoU after matching, boundary F; at whole and at part level. Void pixels are left out, and images
  whose mask is one segment, on which everybody would be right.
* Probes for the parts' names are fitted to pixels of the first half of the images and scored on the second half; the
  pixels and their number are the same for every method.
* Test-time training fits a model to the teacher's grid of the very image that is then scored, without its mask: it
  may use what the teacher may. The masks' number of segments is all that any method is told of them.
* Controls: random weights; another image's pixels; the leave-one-out mean of the APM's own answers, which only
  position tells apart (no upper bound: another image's segments may score higher); segments against another
  image's mask; random segments. Images that a model was distilled from are not held back: choose
  others. Scenes are drawn from another stream than the demo's.

Each interval is the bootstrap's over images; differences to the teacher are taken image by image.

Source: islands are GLOM's (arXiv:2102.12627); locations are queried as in arXiv:2410.20535, section 3.
"""

from .datasets import MaskedImages, load_masked_images
from .runner import GRID_TTT, evaluate_islands

__all__ = ["GRID_TTT", "MaskedImages", "evaluate_islands", "load_masked_images"]
