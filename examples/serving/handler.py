"""Serve an APM from its repository: the custom handler of Hugging Face Inference Endpoints.

    cp examples/serving/handler.py runs/photos/ && apm push runs/photos user/apm-photos

Put it beside the model's `config.json`; it needs transformers, torch and Pillow, and runs the code that lies in the
repository. An endpoint then makes `EndpointHandler(path)` once, and calls it with every request:

    {"inputs": IMAGE}                                                      -> {"embedding": [F numbers]}
    {"inputs": IMAGE, "parameters": {"coordinates": [[0.0, -0.5]]}}        -> ... and "features": [[F numbers]]
    {"inputs": IMAGE, "parameters": {"candidate_labels": ["cat", "dog"]}}  -> [{"label": ..., "score": ...}, ...]

IMAGE is the encoded file as base64 in JSON, or what the endpoint makes of a request with an image's content type. A
list of images gives a list of results. Labels need a model that was saved with its teacher's words
(`apm distill --with_text`).
"""

import base64
import binascii
import io
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForZeroShotImageClassification, AutoTokenizer
from transformers.models.auto.image_processing_auto import AutoImageProcessor

MAX_IMAGES, MAX_PIXELS, MAX_LOCATIONS, MAX_LABELS = 32, 50_000_000, 4096, 1000  # of a request
PARAMETERS = {"candidate_labels", "hypothesis_template", "coordinates", "normalize"}


class EndpointHandler:
    """Load a model folder, and answer requests.

    Args:
        path: folder of the repository.

    Raises:
        ValueError: for a model that reads its teacher, which is not there.
    """

    def __init__(self, path: str = "") -> None:
        trust = {"trust_remote_code": True}  # the code that lies beside this file
        config = AutoConfig.from_pretrained(path, **trust)
        if not config.folds_pixels:
            raise ValueError(f"expected a model that reads images, got trigger_source {config.trigger_source!r}")
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.image_processor = AutoImageProcessor.from_pretrained(path, **trust)
        self.knows_words = config.text_config is not None
        self.tokenizer = AutoTokenizer.from_pretrained(path) if self.knows_words else None
        auto_class = AutoModelForZeroShotImageClassification if self.knows_words else AutoModel
        self.model = auto_class.from_pretrained(path, **trust).eval().to(self.device)
        self.apm = self.model.apm if self.knows_words else self.model

    @torch.inference_mode()
    def __call__(self, data: dict[str, Any]) -> Any:
        """Answer a request, see the top of this file; everything returned is JSON.

        Raises:
            ValueError: for a request that cannot be answered; says what was expected and what came.
        """
        inputs, parameters = data.get("inputs"), data.get("parameters") or {}
        if unknown := sorted(set(parameters) - PARAMETERS):
            raise ValueError(f"parameters: expected some of {sorted(PARAMETERS)}, got {unknown[0]!r}")
        images = inputs if isinstance(inputs, list) else [inputs]
        if not 1 <= len(images) <= MAX_IMAGES:
            raise ValueError(f"inputs: expected 1 to {MAX_IMAGES} images, got {len(images)}")
        pictures = [read_image(image) for image in images]
        pixel_values = self.image_processor(pictures, return_tensors="pt")["pixel_values"].to(self.device)
        if "candidate_labels" in parameters:
            results = self.classify(pixel_values, **parameters)
        else:
            results = self.embed(pixel_values, **parameters)
        return results if isinstance(inputs, list) else results[0]

    def embed(
        self, pixel_values: Tensor, *, coordinates: Any = None, normalize: bool = False, **others: Any
    ) -> list[dict[str, Any]]:
        """Return `embedding`, and `features` of the coordinates, (y, x) in [-1, 1], for each of `(B, 3, S, S)`."""
        if others:
            raise ValueError(f"{next(iter(others))}: expected candidate_labels beside it, got none")
        found = {"embedding": self.apm.pooled_features(pixel_values)}
        if coordinates is not None:
            try:
                places = torch.tensor(coordinates, dtype=torch.float32, device=self.device)
            except (TypeError, ValueError) as error:
                raise ValueError("coordinates: expected a list of pairs of numbers, (y, x) in [-1, 1]") from error
            if places.ndim != 2 or places.shape[1] != 2 or not 1 <= len(places) <= MAX_LOCATIONS:
                raise ValueError(
                    f"coordinates: expected 1 to {MAX_LOCATIONS} pairs (y, x), got the shape {tuple(places.shape)}"
                )
            found["features"] = self.apm(pixel_values, places, return_dict=True).last_hidden_state
        if normalize:
            found = {name: torch.nn.functional.normalize(values, dim=-1) for name, values in found.items()}
        lists = {name: values.float().tolist() for name, values in found.items()}
        return [{name: values[row] for name, values in lists.items()} for row in range(len(pixel_values))]

    def classify(
        self,
        pixel_values: Tensor,
        *,
        candidate_labels: Any,
        hypothesis_template: str = "This is a photo of {}.",
        **others: Any,
    ) -> list[list[dict[str, Any]]]:
        """Return labels with their probabilities, highest first, for each of `(B, 3, S, S)`."""
        if others:
            raise ValueError(f"{next(iter(others))}: expected no candidate_labels beside it")
        if self.tokenizer is None:
            raise ValueError("candidate_labels: expected none, since this model was saved without its teacher's words")
        strings = isinstance(candidate_labels, list) and all(isinstance(one, str) and one for one in candidate_labels)
        if not strings or not 1 <= len(candidate_labels) <= MAX_LABELS:
            raise ValueError(
                f"candidate_labels: expected a list of 1 to {MAX_LABELS} words, got {candidate_labels!r:.99}"
            )
        if not isinstance(hypothesis_template, str) or "{}" not in hypothesis_template:
            raise ValueError(f"hypothesis_template: expected a text with {{}}, got {hypothesis_template!r:.99}")
        prompts = [hypothesis_template.replace("{}", label) for label in candidate_labels]
        tokens = self.tokenizer(prompts, padding=True, truncation=True, return_tensors="pt").to(self.device)
        scores = self.model(**tokens, pixel_values=pixel_values).logits_per_image.float().softmax(dim=1)
        return [
            [{"label": candidate_labels[place], "score": row[place].item()} for place in row.argsort(descending=True)]
            for row in scores
        ]


def read_image(value: Any) -> Image.Image:
    """Return a picture of what a request holds: a PIL image, encoded bytes, or these as base64. Paths are not read.

    Raises:
        ValueError: for anything else, what cannot be decoded, or too many pixels.
    """
    if isinstance(value, str):
        try:
            value = base64.b64decode(value.partition(",")[2] if value.startswith("data:") else value, validate=True)
        except binascii.Error as error:
            raise ValueError("inputs: expected an image as base64, got other text") from error
    if isinstance(value, bytes | bytearray):
        try:
            value = Image.open(io.BytesIO(value))
        except Exception as error:
            raise ValueError("inputs: expected an encoded image, got other bytes") from error
    if not isinstance(value, Image.Image):
        raise ValueError(f"inputs: expected an image, or one as base64, got {type(value).__name__}")
    if value.width * value.height > MAX_PIXELS:
        raise ValueError(f"inputs: expected at most {MAX_PIXELS} pixels, got {value.width} x {value.height}")
    try:
        value.load()
    except Exception as error:  # decoders raise nearly anything on damaged files
        raise ValueError("inputs: expected a whole image, got a damaged one") from error
    return value
