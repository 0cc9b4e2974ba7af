"""Transformers' own common tests of models and configurations, run on APM by `make test-transformers`.

This file is copied into its source, as `tests/models/apm/test_modeling_apm.py`.
"""

import unittest

import torch
from transformers.models.auto import modeling_auto

from apm_hf import APMConfig, APMForImageClassification, APMForSemanticSegmentation, APMModel

from ... import test_modeling_common
from ...test_configuration_common import ConfigTester
from ...test_modeling_common import ModelTesterMixin, floats_tensor

# The tests leave out models without a loss, which they know by the library's own table.
test_modeling_common.MODEL_MAPPING_NAMES = {**modeling_auto.MODEL_MAPPING_NAMES, "apm": "APMModel"}

SIDE, BATCH_SIZE = 12, 2


class APMModelTester:
    batch_size, is_training, num_labels = BATCH_SIZE, True, 3
    # Of the first hidden layer of a query; there is one output per layer, none of embeddings.
    hidden_size, num_hidden_layers, seq_length, expected_num_hidden_layers = 32, 2, 9, 2

    def get_config(self):
        return APMConfig.preset(
            "tiny",
            image_size=SIDE,
            patch_size=4,
            position_size=16,
            hidden_sizes=[32, 24],
            feature_size=16,
            rgb_hidden_sizes=[12, 8],
            pooling="attention",
            pooling_num_heads=4,
            num_labels=self.num_labels,
        )

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), {"pixel_values": floats_tensor([BATCH_SIZE, 3, SIDE, SIDE])}


class APMModelTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (APMModel, APMForImageClassification, APMForSemanticSegmentation)
    test_resize_embeddings = test_head_masking = test_pruning = has_attentions = False

    def setUp(self):
        self.model_tester = APMModelTester()
        self.config_tester = ConfigTester(
            self,
            config_class=APMConfig,
            has_text_modality=False,
            common_properties=["image_size", "patch_size", "num_channels"],
        )

    def test_config(self):
        self.config_tester.run_common_tests()

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        if return_labels and model_class is APMForImageClassification:
            inputs["labels"] = torch.zeros(BATCH_SIZE, dtype=torch.long)
        if return_labels and model_class is APMForSemanticSegmentation:
            inputs["labels"] = torch.zeros(BATCH_SIZE, SIDE, SIDE, dtype=torch.long)
        return inputs

    def test_model_get_set_embeddings(self):
        """Images have no table of embeddings; ViT's own test asks for a module too."""
        for model_class in self.all_model_classes:
            self.assertIsInstance(model_class(self.model_tester.get_config()).get_input_embeddings(), torch.nn.Module)
