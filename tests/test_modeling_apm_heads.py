"""The task heads: logits and losses against hand-written ones, and every head there and back on disk."""

import inspect
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AlignConfig,
    AlignModel,
    AltCLIPConfig,
    AltCLIPModel,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
    AutoModelForZeroShotImageClassification,
    BertConfig,
    BertModel,
    ChineseCLIPConfig,
    ChineseCLIPModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    GroupViTConfig,
    GroupViTModel,
    PreTrainedModel,
    SiglipConfig,
    SiglipModel,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    ViTConfig,
    ViTModel,
)

from apm_hf import (
    APMForImageClassification,
    APMForSemanticSegmentation,
    APMForZeroShotImageClassification,
    APMModel,
)
from apm_hf.position_encoding import grid_coordinates
from naive_apm import (
    assert_close,
    assert_same_answers,
    random_coordinates,
    randomise,
    small_config,
    small_images,
    small_model,
)


def log_probability(logits: Tensor, label: int) -> Tensor:
    return logits[label] - logits.exp().sum().log()


# ---- image classification


def classifier(**fields) -> APMForImageClassification:
    return randomise(APMForImageClassification(small_config(num_labels=5, **fields)))


@pytest.mark.parametrize("pooling", ["mean", "attention"])
def test_classifier_is_linear_in_the_pooled_feature(pooling):
    model = classifier(pooling=pooling)
    for coordinates in (None, random_coordinates(4)):
        pooled = model.apm(small_images(), coordinates).pooler_output
        logits = model(small_images(), coordinates=coordinates).logits
        assert logits.shape == (2, 5)
        assert_close(logits, pooled @ model.classifier.weight.T + model.classifier.bias)


def test_classification_loss_is_cross_entropy():
    model = classifier()
    assert model(small_images()).loss is None
    outputs = model(small_images(), labels=torch.tensor([4, 1]))
    expected = -(log_probability(outputs.logits[0], 4) + log_probability(outputs.logits[1], 1)) / 2
    assert_close(outputs.loss, expected)


def test_classification_loss_follows_the_problem_type():
    labels = torch.tensor([[1.0, 0, 0, 1, 0], [0, 0, 1, 0, 1]])
    outputs = classifier(problem_type="multi_label_classification")(small_images(), labels=labels)
    probabilities = 1 / (1 + (-outputs.logits).exp())
    assert_close(outputs.loss, -(labels * probabilities + (1 - labels) * (1 - probabilities)).log().mean())
    outputs = classifier(problem_type="regression")(small_images(), labels=labels)
    assert_close(outputs.loss, (outputs.logits - labels).square().mean())


def test_classifier_passes_its_options_on():
    model = classifier()
    outputs = model(small_images(), output_hidden_states=True, chunk_size=2)
    assert [state.shape for state in outputs.hidden_states] == [(2, 9, 32), (2, 9, 24)]
    assert_close(outputs.logits, model(small_images()).logits)
    logits = model(trigger_column=model.apm.fold(small_images())).logits
    assert_close(logits, outputs.logits)
    loss, in_tuple = model(small_images(), labels=torch.tensor([0, 1]), return_dict=False)
    assert loss.ndim == 0
    assert_close(in_tuple, outputs.logits)


def test_classifier_learns_from_its_loss():
    model = classifier().train()
    model(small_images(), labels=torch.tensor([0, 1])).loss.backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert all("rgb_head" in name for name in without)


# ---- semantic segmentation


def segmenter(**fields) -> APMForSemanticSegmentation:
    return randomise(APMForSemanticSegmentation(small_config(num_labels=5, **fields)))


@pytest.mark.parametrize("local_patch", [False, True])
@pytest.mark.parametrize("size", [None, (3, 3), (4, 7), (1, 1)])
def test_segmenter_is_linear_in_every_locations_feature(size, local_patch):
    model = segmenter(local_patch=local_patch)
    logits = model(small_images(), output_size=size).logits
    height, width = size or (3, 3)
    assert logits.shape == (2, 5, height, width)
    features = model.apm(small_images(), grid_coordinates(height, width)).last_hidden_state
    for r in range(height):
        for c in range(width):
            expected = features[:, r * width + c] @ model.classifier.weight.T + model.classifier.bias
            assert_close(logits[:, :, r, c], expected)


def test_segmentation_loss_at_the_resolution_of_the_labels():
    model = segmenter()
    assert model(small_images()).loss is None
    labels = torch.randint(5, (2, 3, 3), generator=torch.Generator().manual_seed(0))
    labels[0, 0, 1] = labels[1, 2, 2] = 255  # no label
    outputs = model(small_images(), labels=labels)
    losses = [
        -log_probability(outputs.logits[b, :, r, c], labels[b, r, c].item())
        for b in range(2)
        for r in range(3)
        for c in range(3)
        if labels[b, r, c] != 255
    ]
    assert len(losses) == 16
    assert_close(outputs.loss, torch.stack(losses).mean())


@pytest.mark.parametrize("output_size", [None, (4, 7)])
def test_segmentation_logits_are_scaled_to_the_labels(output_size):
    model = segmenter()
    labels = torch.randint(5, (2, 10, 6), generator=torch.Generator().manual_seed(0))
    outputs = model(small_images(), labels=labels, output_size=output_size)
    window = grid_coordinates(10, 6).flip(-1).reshape(1, 10, 6, 2).expand(2, -1, -1, -1)
    scaled = F.grid_sample(outputs.logits, window, padding_mode="border", align_corners=False)  # bilinear
    log_probabilities = scaled - scaled.exp().sum(1, keepdim=True).log()
    assert outputs.logits.shape[-2:] == (output_size or (3, 3))
    assert_close(outputs.loss, -log_probabilities.gather(1, labels[:, None]).mean())


def test_segmenter_passes_its_options_on():
    model = segmenter()
    outputs = model(small_images(), output_hidden_states=True, chunk_size=2)
    assert [state.shape for state in outputs.hidden_states] == [(2, 9, 32), (2, 9, 24)]
    assert_close(outputs.logits, model(small_images()).logits)
    assert_close(model(trigger_column=model.apm.fold(small_images())).logits, outputs.logits)
    (in_tuple,) = model(small_images(), return_dict=False)
    assert_close(in_tuple, outputs.logits)


def test_segmenter_says_what_it_expected():
    model = segmenter()
    with pytest.raises(ValueError, match=r"output_size: expected a positive .*got \(0, 3\)"):
        model(small_images(), output_size=(0, 3))
    with pytest.raises(ValueError, match=r"labels: expected shape \(2, height, width\), got \(2, 9\)"):
        model(small_images(), labels=torch.zeros(2, 9, dtype=torch.long))
    with pytest.raises(ValueError, match=r"labels: expected shape \(2, height, width\), got \(3, 3, 3\)"):
        model(small_images(), labels=torch.zeros(3, 3, 3, dtype=torch.long))


@pytest.mark.parametrize("build", [classifier, segmenter])
def test_heads_accept_options_of_transformers_that_mean_nothing_here(build):
    options = {"output_attentions": True, "interpolate_pos_encoding": True}
    model = build()
    assert_close(model(small_images(), **options).logits, model(small_images()).logits)


# ---- classifiers on disk

LINEAR_HEADS = {
    "classification": (APMForImageClassification, AutoModelForImageClassification),
    "segmentation": (APMForSemanticSegmentation, AutoModelForSemanticSegmentation),
}
each_linear_head = pytest.mark.parametrize(("model_class", "auto_class"), LINEAR_HEADS.values(), ids=LINEAR_HEADS)


@each_linear_head
def test_linear_head_is_saved_and_loaded(model_class, auto_class, tmp_path):
    model = randomise(model_class(small_config(id2label={0: "cat", 1: "dog", 2: "eel"}, label2id={})))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    for loaded in (model_class.from_pretrained(tmp_path), auto_class.from_pretrained(tmp_path)):
        assert type(loaded) is model_class
        assert loaded.config.id2label == {0: "cat", 1: "dog", 2: "eel"}
        assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
        assert_close(loaded(small_images()).logits, model(small_images()).logits)
    half = model_class.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert_close(half(small_images().bfloat16()).logits, model(small_images()).logits, 0.03)


@each_linear_head
def test_linear_head_may_start_from_a_bare_model_and_be_taken_off_again(model_class, auto_class, tmp_path):
    base = small_model()
    base.save_pretrained(tmp_path / "base")
    model, report = model_class.from_pretrained(tmp_path / "base", num_labels=4, output_loading_info=True)
    assert set(report["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    assert model.classifier.weight.std().item() == pytest.approx(0.3, rel=0.5)
    assert not report["unexpected_keys"]  # the RGB head is not missed
    assert all(torch.equal(value, base.state_dict()[name]) for name, value in model.apm.state_dict().items())
    model.save_pretrained(tmp_path / "head")
    bare = AutoModel.from_pretrained(tmp_path / "head")
    assert type(bare) is APMModel and not bare.config.use_rgb_head
    outputs, expected = bare(small_images()), base(small_images())
    assert outputs.rgb is None and expected.rgb is not None
    assert_close(outputs.last_hidden_state, expected.last_hidden_state)
    assert_close(outputs.pooler_output, expected.pooler_output)


# ---- zero-shot image classification

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 50,
    "max_position_embeddings": 16,
    "pad_token_id": 1,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 36,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
INPUT_IDS = torch.tensor([[48, 3, 4, 49, 1], [48, 5, 6, 7, 49], [48, 49, 1, 1, 1]])
ATTENTION_MASK = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])


def clip() -> PreTrainedModel:
    text_config = {**TEXT, "bos_token_id": 48, "eos_token_id": 49}
    return CLIPModel(CLIPConfig(text_config=text_config, vision_config=VISION, projection_dim=16))


def siglip(projection_size: int = 16) -> PreTrainedModel:
    # The width of SigLIP's embeddings is the text tower's projection_size, which need not be its hidden_size.
    text_config = {**TEXT, "hidden_size": 16, "projection_size": projection_size}
    return SiglipModel(SiglipConfig(text_config=text_config, vision_config={**VISION, "hidden_size": 16}))


def siglip_with_projection() -> PreTrainedModel:
    text_config = {**TEXT, "projection_size": 16}
    return SiglipModel(SiglipConfig(text_config=text_config, vision_config={**VISION, "hidden_size": 16}))


def vision_text_dual_encoder() -> PreTrainedModel:
    config = VisionTextDualEncoderConfig.from_vision_text_configs(
        ViTConfig(**VISION), BertConfig(**TEXT), projection_dim=16
    )
    return VisionTextDualEncoderModel(config)


TEACHERS = [clip, siglip, siglip_with_projection, vision_text_dual_encoder]
each_teacher = pytest.mark.parametrize("build", TEACHERS, ids=lambda build: build.__name__)


def teacher(build) -> PreTrainedModel:
    """Randomly initialised, with weights large enough for texts to differ."""
    dual_encoder = randomise(build())
    for module in dual_encoder.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
    return dual_encoder


def text_features(dual_encoder: PreTrainedModel) -> Tensor:
    return dual_encoder.get_text_features(input_ids=INPUT_IDS, attention_mask=ATTENTION_MASK).pooler_output


def joined(build, **fields) -> APMForZeroShotImageClassification:
    return APMForZeroShotImageClassification.from_dual_encoder(small_model(**fields), teacher(build))


@each_teacher
def test_text_features_equal_the_teachers(build):
    model, expected = joined(build), text_features(teacher(build))
    assert (expected[0] - expected[1]).abs().max() > 0.1
    assert_close(text_features(model), expected, 1e-6)


@each_teacher
def test_logits_are_cosines_times_the_teachers_temperature(build):
    model, dual_encoder = joined(build), teacher(build)
    outputs = model(INPUT_IDS, small_images(), ATTENTION_MASK)
    images, texts = model.apm(small_images()).pooler_output, text_features(dual_encoder)
    assert outputs.logits_per_image.shape == (2, 3)
    for image in range(2):
        for text in range(3):
            cosine = images[image] @ texts[text] / images[image].norm() / texts[text].norm()
            expected = cosine * math.exp(dual_encoder.logit_scale.item())
            torch.testing.assert_close(outputs.logits_per_image[image, text], expected, atol=1e-4, rtol=1e-4)
    assert_close(outputs.logits_per_text, outputs.logits_per_image.T)
    assert_close(outputs.image_embeds, images / images.norm(dim=1, keepdim=True))
    assert_close(outputs.text_embeds, texts / texts.norm(dim=1, keepdim=True))


@each_teacher
def test_zero_shot_model_is_saved_and_loaded(build, tmp_path):
    model = joined(build)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    expected = model(INPUT_IDS, small_images(), ATTENTION_MASK)
    for auto_class in (APMForZeroShotImageClassification, AutoModelForZeroShotImageClassification):
        loaded, report = auto_class.from_pretrained(tmp_path, output_loading_info=True)
        assert type(loaded) is APMForZeroShotImageClassification
        assert not any(report.values())
        assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
        assert_same_answers(loaded(INPUT_IDS, small_images(), ATTENTION_MASK), expected)
    half = APMForZeroShotImageClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    answers = half(INPUT_IDS, small_images().bfloat16(), ATTENTION_MASK)
    assert_close(answers.image_embeds, expected.image_embeds, 0.05)
    assert_close(answers.text_embeds, expected.text_embeds, 0.05)


def test_zero_shot_inputs_may_be_named_in_any_order():
    # As transformers' zero-shot-image-classification pipeline calls it.
    model = joined(clip)
    named = model(input_ids=INPUT_IDS, attention_mask=ATTENTION_MASK, pixel_values=small_images())
    assert_close(named.logits_per_image, model(INPUT_IDS, small_images(), ATTENTION_MASK).logits_per_image)
    in_tuple = model(INPUT_IDS, small_images(), ATTENTION_MASK, return_dict=False)
    assert_close(in_tuple[0], named.logits_per_image)


def test_padding_is_masked():
    model = joined(vision_text_dual_encoder)
    full = model.get_text_features(INPUT_IDS[2:, :2]).pooler_output
    assert_close(model.get_text_features(INPUT_IDS[2:], ATTENTION_MASK[2:]).pooler_output, full)
    assert (model.get_text_features(INPUT_IDS[2:]).pooler_output - full).abs().max() > 0.1


def test_further_inputs_reach_the_text_tower():
    model = joined(vision_text_dual_encoder)
    token_types = torch.ones_like(INPUT_IDS)
    answers = model(INPUT_IDS, small_images(), ATTENTION_MASK, token_type_ids=token_types)
    expected = model.get_text_features(INPUT_IDS, ATTENTION_MASK, token_type_ids=token_types).pooler_output
    assert_close(answers.text_embeds, F.normalize(expected, dim=-1))
    plain = model(INPUT_IDS, small_images(), ATTENTION_MASK).text_embeds
    assert (answers.text_embeds - plain).abs().max() > 0.01


@pytest.mark.parametrize("pooling", ["mean", "attention"])
def test_zero_shot_pools_the_locations_asked_for(pooling):
    model = joined(clip, pooling=pooling)
    coordinates = random_coordinates(2, 4)
    expected = F.normalize(model.apm(small_images(), coordinates).pooler_output, dim=-1)
    outputs = model(INPUT_IDS, small_images(), ATTENTION_MASK, coordinates=coordinates)
    assert_close(outputs.image_embeds, expected)
    assert_close(model.get_image_features(small_images()).pooler_output, model.apm(small_images()).pooler_output)


def test_features_come_as_those_of_other_dual_encoders():
    model = joined(clip)
    texts = model.get_text_features(INPUT_IDS, ATTENTION_MASK, output_hidden_states=True)
    assert texts.last_hidden_state.shape == (3, 5, 32) and len(texts.hidden_states) == 3
    images = model.get_image_features(small_images(), output_hidden_states=True)
    assert images.last_hidden_state.shape == (2, 9, 16) and len(images.hidden_states) == 2
    in_tuple = model.get_text_features(INPUT_IDS, ATTENTION_MASK, return_dict=False)
    assert torch.equal(in_tuple[1], texts.pooler_output)
    assert torch.equal(model.get_image_features(small_images(), return_dict=False)[1], images.pooler_output)


def test_zero_shot_model_is_called_and_configured_as_other_dual_encoders():
    model = joined(clip)
    assert next(iter(inspect.signature(model.forward).parameters)) == model.main_input_name == "input_ids"
    assert model.text_model.config is model.config.text_config
    options = {"output_attentions": True, "interpolate_pos_encoding": True}
    outputs = model(INPUT_IDS, small_images(), ATTENTION_MASK, **options)
    assert_same_answers(outputs, model(INPUT_IDS, small_images(), ATTENTION_MASK))
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        assert model.text_model.config._attn_implementation == implementation


def test_an_apm_is_the_vision_tower_of_another_dual_encoder(tmp_path):
    text_model = BertModel(BertConfig(**TEXT))
    model = randomise(VisionTextDualEncoderModel(vision_model=small_model(), text_model=text_model))
    model.save_pretrained(tmp_path)
    loaded = VisionTextDualEncoderModel.from_pretrained(tmp_path)
    assert type(loaded.vision_model) is APMModel
    expected = model(input_ids=INPUT_IDS, pixel_values=small_images()).logits_per_image
    assert expected.shape == (2, 3) and expected.std() > 1e-3
    assert_close(loaded(input_ids=INPUT_IDS, pixel_values=small_images()).logits_per_image, expected)


def test_contrastive_loss_matches_every_image_with_its_text():
    model = joined(clip)
    outputs = model(INPUT_IDS[:2], small_images(), ATTENTION_MASK[:2], return_loss=True)
    logits = outputs.logits_per_image.double()
    losses = [log_probability(rows[i], i) for rows in (logits, logits.T) for i in range(2)]
    assert_close(outputs.loss, -torch.stack(losses).mean(), 1e-4)
    assert model(INPUT_IDS, small_images(), ATTENTION_MASK).loss is None
    with pytest.raises(ValueError, match="as many texts as images"):
        model(INPUT_IDS, small_images(), ATTENTION_MASK, return_loss=True)


def test_joining_copies_the_weights():
    apm, dual_encoder = small_model(), teacher(clip)
    model = APMForZeroShotImageClassification.from_dual_encoder(apm, dual_encoder)
    originals = {parameter.data_ptr() for source in (apm, dual_encoder) for parameter in source.parameters()}
    assert originals.isdisjoint(parameter.data_ptr() for parameter in model.parameters())
    assert apm.config.text_config is None
    assert_close(model.apm(small_images()).last_hidden_state, apm(small_images()).last_hidden_state, 1e-6)


def test_joining_keeps_the_precision_of_the_apm():
    model = APMForZeroShotImageClassification.from_dual_encoder(small_model().bfloat16(), teacher(clip))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_teacher_of_another_width_is_refused():
    with pytest.raises(ValueError, match="width feature_size=20, got 16"):
        joined(clip, feature_size=20)


def test_teacher_without_text_tower_is_refused():
    with pytest.raises(ValueError, match="expected a model with a text tower, got ViTModel"):
        APMForZeroShotImageClassification.from_dual_encoder(small_model(), ViTModel(ViTConfig(**VISION)))


def test_zero_shot_needs_the_configuration_of_a_text_tower():
    with pytest.raises(ValueError, match="text_config: expected the configuration of a text tower, got None"):
        APMForZeroShotImageClassification(small_config())


def align() -> PreTrainedModel:
    vision_config = {"image_size": 32, "num_block_repeats": [1] * 7, "hidden_dim": 16}
    return AlignModel(AlignConfig(text_config=TEXT, vision_config=vision_config, projection_dim=16))


def alt_clip() -> PreTrainedModel:
    text_config = {**TEXT, "project_dim": 24, "max_position_embeddings": 20}
    return AltCLIPModel(AltCLIPConfig(text_config=text_config, vision_config=VISION, projection_dim=16))


def chinese_clip() -> PreTrainedModel:
    return ChineseCLIPModel(ChineseCLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16))


def group_vit() -> PreTrainedModel:
    vision_config = {**VISION, "depths": [1, 1, 1], "num_group_tokens": [4, 2, 0], "num_output_groups": [4, 2, 1]}
    text_config = {**TEXT, "bos_token_id": 48, "eos_token_id": 49}
    return GroupViTModel(
        GroupViTConfig(
            text_config=text_config, vision_config=vision_config, projection_dim=16, projection_intermediate_dim=24
        )
    )


@pytest.mark.parametrize("build", [align, alt_clip, chinese_clip, group_vit], ids=lambda build: build.__name__)
def test_unusual_text_towers_work_or_are_refused(build):
    dual_encoder = teacher(build)
    try:
        model = APMForZeroShotImageClassification.from_dual_encoder(small_model(), dual_encoder)
    except ValueError as error:
        assert "expected" in str(error) or "does not have" in str(error)
    else:
        assert_close(text_features(model), text_features(dual_encoder), 1e-6)


def test_temperature_that_a_checkpoint_lacks_is_the_configurations(tmp_path):
    small_model().save_pretrained(tmp_path)
    config = small_config(text_config=CLIPTextConfig(**TEXT), logit_scale_init_value=2.5)
    model = APMForZeroShotImageClassification.from_pretrained(tmp_path, config=config)
    assert model.logit_scale.item() == 2.5
    assert APMForZeroShotImageClassification(config).logit_scale.item() == 2.5


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_text_towers_attention_may_be_chosen(implementation, tmp_path):
    model = joined(clip)
    model.save_pretrained(tmp_path)
    loaded = APMForZeroShotImageClassification.from_pretrained(tmp_path, attn_implementation=implementation)
    assert loaded.text_model.config._attn_implementation == implementation
    assert_close(text_features(loaded), text_features(teacher(clip)))


@each_teacher
def test_zero_shot_model_is_trained_end_to_end(build):
    model = joined(build).train()
    model(INPUT_IDS[:2], small_images(), ATTENTION_MASK[:2], return_loss=True).loss.backward()
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    parts = {"apm", "text_model", "logit_scale"}
    assert trained == (parts | {"text_projection"} if isinstance(model.text_projection, nn.Linear) else parts)
