"""Transformers' own common tests of image processors, run on APM's by `make test-transformers`."""

import unittest

from transformers.utils import is_torchvision_available

from apm_hf import APMImageProcessor
from apm_hf.image_processing_pil_apm import APMImageProcessorPil

from ...test_image_processing_common import (
    ImageProcessingTester,
    ImageProcessingTestMixin,
    PostProcessSemanticSegmentationTestMixin,
)


class APMImageProcessingTester(ImageProcessingTester):
    def __init__(self, parent, **options):
        options = {"size": {"height": 20, "width": 20}, "do_resize": True, "do_center_crop": False, **options}
        super().__init__(parent, **{"num_labels": 3, **options})

    def _get_image_processing_classes(self):
        both = {"pil": APMImageProcessorPil}
        return {**both, "torchvision": APMImageProcessor} if is_torchvision_available() else both


class APMImageProcessingTest(ImageProcessingTestMixin, PostProcessSemanticSegmentationTestMixin, unittest.TestCase):
    image_processor_tester_class = APMImageProcessingTester

    def setUp(self):
        self.image_processor_tester = APMImageProcessingTester(self)

    @property
    def image_processor_dict(self):
        return self.image_processor_tester.prepare_image_processor_dict()

    @unittest.skipUnless(is_torchvision_available(), "torchvision is not installed")
    def test_new_models_require_torchvision_backend(self):
        super().test_new_models_require_torchvision_backend()
