"""A stand-in for torchvision where its wheels do not fit: what transformers' image processors call, on plain torch.

    PYTHONPATH=tests/stubs python -m pytest tests/test_image_processing_apm.py tests/test_segmentation_pipeline.py

The ordinary suite has no other cover of the torchvision backend; `make test-torchvision` has the real one.

torchvision resizes tensors by `torch.nn.functional.interpolate` itself, so that results are the real ones but for
rounding. Written from https://docs.pytorch.org/vision/stable/transforms.html; it is no part of the package.
"""

__version__ = "0.26.0"
