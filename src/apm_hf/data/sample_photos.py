"""Read the sample photos of scikit-image and scikit-learn, which come with these packages: nothing is fetched."""

from importlib.util import find_spec
from pathlib import Path

from PIL import Image

from .images import read_rgb

# Name -> package and file. The packages say where they come from: chelsea, coffee, astronaut and rocket (NASA) are in
# the public domain, china and flower CC BY.
SAMPLE_PHOTOS = {
    "astronaut": ("skimage", "data/astronaut.png"),
    "chelsea": ("skimage", "data/chelsea.png"),
    "coffee": ("skimage", "data/coffee.png"),
    "rocket": ("skimage", "data/rocket.jpg"),
    "china": ("sklearn", "datasets/images/china.jpg"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
}


def sample_photos(*names: str) -> dict[str, Image.Image]:
    """Return photos by name: by default six, a woman, a cat, a cup of coffee, a rocket, a palace and a flower.

    The packages are not imported, which takes seconds.

    Args:
        *names: some of `SAMPLE_PHOTOS`.

    Raises:
        ImportError: without scikit-image or scikit-learn; says what to install.
    """
    photos = {}
    for name in names or SAMPLE_PHOTOS:
        package, file = SAMPLE_PHOTOS[name]
        found = find_spec(package)
        if found is None or found.origin is None:
            raise ImportError('sample photos come with scikit-image and scikit-learn: pip install "apm_hf[viz]"')
        photos[name] = read_rgb(Path(found.origin).parent / file)
    return photos
