"""Families of teachers beyond CLIP, ViT and DINOv2: tiny and random, but of the real classes, saved and loaded.

Legend: B images, C width of the vision tower, F width of the embeddings, (rows, cols) the grid.
"""

import copy
import json
import pickle
import string
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextModel,
    ConvNextV2Config,
    ConvNextV2ForImageClassification,
    DINOv3ConvNextConfig,
    DINOv3ConvNextModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    EfficientNetConfig,
    EfficientNetForImageClassification,
    IJepaConfig,
    IJepaForImageClassification,
    IJepaModel,
    MetaClip2Config,
    MetaClip2Model,
    RegNetConfig,
    RegNetForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    Siglip2Config,
    Siglip2Model,
    Siglip2Tokenizer,
    SiglipConfig,
    SiglipModel,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTModel,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
from transformers.utils import is_torchvision_available

from apm_hf import Teacher, load_teacher
from apm_hf.data.scenes import SceneDataset
from apm_hf.distillation import DistillationConfig, distill, matching_image_processor
from apm_hf.evaluation.methods.prompt_tuning import Prompts
from apm_hf.teachers import TeacherOutput
from apm_hf.teachers import families as teacher_families
from apm_hf.teachers.dense_grids import encode_densely
from apm_hf.teachers.images import plain_image_processor
from apm_hf.teachers.targets import TargetCache
from apm_hf.teachers.vision import FamilyVision
from apm_hf.teachers.zero_shot import classify
from apm_hf.ttt.photos import teacher_features
from fixtures_tiny import LABELS, TOWER, WORDS, photo, randomise, resampling_slack, student, tokenizer

needs_torchvision = pytest.mark.skipif(not is_torchvision_available(), reason="torchvision is not installed")
SIZE, PATCH, WIDTH, STRIDE = 32, 8, 16, 32
VISION = TOWER | {"image_size": SIZE, "patch_size": PATCH}
STAGES = {"hidden_sizes": [4, 8, 12, 16], "depths": [1, 1, 1, 1]}
HEAD = {"id2label": dict(enumerate(LABELS)), "label2id": {label: row for row, label in enumerate(LABELS)}}
ENDS = {"pad_token_id": 0, "bos_token_id": WORDS.index("[CLS]"), "eos_token_id": WORDS.index("[SEP]")}
LONGEST = 32  # tokens of a prompt
TEXT = TOWER | ENDS | {"vocab_size": len(WORDS), "max_position_embeddings": LONGEST}
RESNET = STAGES | {"embedding_size": 4}
EFFICIENTNET = {
    "width_coefficient": 0.05,
    "hidden_dim": 64,
    "num_block_repeats": [1] * 7,
    "expand_ratios": [1, 2, 2, 2, 2, 2, 2],
    "kernel_sizes": [3] * 7,
}


def mae_config():
    decoder = {"decoder_hidden_size": 16}
    decoder |= {"decoder_intermediate_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    return ViTMAEConfig(**VISION, **decoder)


def naflex_config():
    vision = TOWER | {"patch_size": PATCH, "num_patches": 16}
    text = TEXT | {"projection_size": WIDTH, "vocab_size": 33, "max_position_embeddings": LONGEST}
    return Siglip2Config(text_config=text, vision_config=vision)


BUILD = {
    "siglip": lambda: SiglipModel(SiglipConfig(text_config=TEXT | {"projection_size": WIDTH}, vision_config=VISION)),
    "siglip2": lambda: Siglip2Model(naflex_config()),
    "metaclip_2": lambda: MetaClip2Model(MetaClip2Config(text_config=TEXT, vision_config=VISION, projection_dim=12)),
    "dinov3_vit": lambda: DINOv3ViTModel(DINOv3ViTConfig(**VISION, num_register_tokens=3)),
    "vit_mae": lambda: ViTMAEForPreTraining(mae_config()),
    "ijepa": lambda: IJepaModel(IJepaConfig(**VISION)),
    "ijepa-classifier": lambda: IJepaForImageClassification(IJepaConfig(**VISION, **HEAD)),
    "dinov3_convnext": lambda: DINOv3ConvNextModel(DINOv3ConvNextConfig(**STAGES)),
    "convnext": lambda: ConvNextModel(ConvNextConfig(**STAGES)),
    "convnext-classifier": lambda: ConvNextForImageClassification(ConvNextConfig(**STAGES, **HEAD)),
    "convnextv2-classifier": lambda: ConvNextV2ForImageClassification(ConvNextV2Config(**STAGES, **HEAD)),
    "resnet-classifier": lambda: ResNetForImageClassification(ResNetConfig(**RESNET, layer_type="basic", **HEAD)),
    "regnet-classifier": lambda: RegNetForImageClassification(RegNetConfig(**RESNET, groups_width=4, **HEAD)),
    "efficientnet-classifier": lambda: EfficientNetForImageClassification(EfficientNetConfig(**EFFICIENTNET, **HEAD)),
}
DUAL = ["siglip", "siglip2", "metaclip_2"]
TOKENS = [*DUAL, "dinov3_vit", "vit_mae", "ijepa", "ijepa-classifier"]
MAPS = [name for name in BUILD if name not in TOKENS]
CLASSIFIERS = [name for name in BUILD if name.endswith("-classifier")]
PREFIX = {"metaclip_2": 1, "dinov3_vit": 4, "vit_mae": 1}  # said once more by hand; 0 for others


def save(name, folder, *, model=None):
    (calibrated(randomise(BUILD[name]())) if model is None else model).save_pretrained(folder)
    if name == "siglip2":
        processor = Siglip2ImageProcessorPil(patch_size=PATCH, max_num_patches=16)
    elif name in MAPS:
        processor = ConvNextImageProcessorPil(size={"shortest_edge": 2 * STRIDE})
    else:
        processor = ViTImageProcessorPil(size={"height": SIZE, "width": SIZE})
    processor.save_pretrained(folder)
    if name == "siglip2":
        characters = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", ".", *string.ascii_lowercase]
        vocabulary = {token: row for row, token in enumerate(characters)}
        Siglip2Tokenizer(vocab=vocabulary, merges=[], padding_side="right").save_pretrained(folder)
    elif name in DUAL:
        tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def teacher_of(tmp_path_factory):
    """Load one teacher of each family, once."""
    loaded = {}

    def get(name):
        if name not in loaded:
            loaded[name] = load_teacher(save(name, tmp_path_factory.mktemp(name)), device="cpu")
        return loaded[name]

    return get


@torch.no_grad()
def calibrated(model):
    """Batch norms that know what goes through them: else signals die, and so would the tests."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # the mean of all batches, of which there is one
        norm.reset_running_stats()
    if norms:
        model.train()(noise(8, 3, 2 * STRIDE, 2 * STRIDE))
    return model.eval()


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Every family


@pytest.mark.parametrize("name", BUILD)
def test_targets_have_the_shape_of_the_grid(teacher_of, name):
    teacher = teacher_of(name)
    patch = PATCH if name in TOKENS else STRIDE
    assert teacher.patch_size == patch
    output = teacher.encode_images(pixel_values=noise(2, 3, 2 * patch, 3 * patch), layers=[0, teacher.num_layers])
    assert output.image_embeds.shape == (2, teacher.feature_size)
    assert output.features.shape == (2, 2, 3, teacher.feature_size)
    assert output.levels.shape == (2, 2, 2, 3, teacher.hidden_size)
    square = teacher.encode_images([photo(0), photo(1, size=(70, 90))])
    side = teacher.image_size // patch
    assert square.features.shape == (2, side, side, teacher.feature_size) and square.levels is None
    assert square.image_embeds.std(dim=0).max() > 1e-3  # not one answer to all images


@pytest.mark.parametrize("name", TOKENS)
def test_changing_one_patch_changes_its_own_embedding_and_no_other(teacher_of, name):
    teacher, pixel_values = teacher_of(name), noise(1, 3, 3 * PATCH, 5 * PATCH)
    changed = pixel_values.clone()
    changed[..., PATCH : 2 * PATCH, 3 * PATCH : 4 * PATCH] += 1.0  # row 1, column 3
    before, after = (teacher.encode_images(pixel_values=x, layers=[0]).levels[0, 0] for x in (pixel_values, changed))
    assert ((before - after).norm(dim=-1) > 1e-6).nonzero().tolist() == [[1, 3]]


@pytest.mark.parametrize("name", [name for name in MAPS if "efficientnet" not in name])  # whose gates are global
def test_changing_where_a_place_looks_changes_its_own_feature_most(teacher_of, name):
    # Networks of ResNet's kind look at the upper left corner of their cells: see docs/teachers.md.
    teacher, pixel_values = teacher_of(name), noise(1, 3, 4 * STRIDE, 5 * STRIDE)
    corner = name.startswith(("resnet", "regnet"))
    rows, cols = ((n + (0 if corner else 0.5)) * STRIDE for n in (1, 3))  # the centre of row 1, column 3
    changed = pixel_values.clone()
    changed[..., int(rows) - 10 : int(rows) + 10, int(cols) - 10 : int(cols) + 10] += 8.0
    before, after = (teacher.encode_images(pixel_values=x).features[0] for x in (pixel_values, changed))
    assert divmod((before - after).norm(dim=-1).argmax().item(), 5) == (1, 3)


@pytest.mark.parametrize("name", DUAL)
@torch.no_grad()
def test_dual_encoders_say_what_their_own_methods_say(teacher_of, name):
    teacher, pixel_values, class_names = teacher_of(name), noise(2, 3, SIZE, SIZE), ["cat", "a dog owl"]
    inputs = {"pixel_values": pixel_values}
    if name == "siglip2":
        patches = [[pixel_values[:, :, y : y + PATCH, x : x + PATCH] for x in range(0, SIZE, PATCH)]
                   for y in range(0, SIZE, PATCH)]  # fmt: skip
        flat = [patch.permute(0, 2, 3, 1).flatten(1) for row in patches for patch in row]
        inputs = {
            "pixel_values": torch.stack(flat, dim=1),
            "pixel_attention_mask": torch.ones(2, 16),
            "spatial_shapes": torch.tensor([[4, 4]] * 2),
        }
    padding = "max_length" if name.startswith("siglip") else True
    prompts = [f"a photo of a {class_name}." for class_name in class_names]
    tokens = teacher.tokenizer(prompts, padding=padding, truncation=True, max_length=LONGEST, return_tensors="pt")
    image_embeds = teacher.encode_images(pixel_values=pixel_values).image_embeds
    torch.testing.assert_close(image_embeds, teacher.model.get_image_features(**inputs).pooler_output)
    text_embeds = teacher.encode_text(class_names)
    expected = F.normalize(teacher.model.get_text_features(**tokens).pooler_output, dim=-1)
    torch.testing.assert_close(text_embeds, expected)
    logits = teacher.model(**inputs, **tokens).logits_per_image
    ours = classify(image_embeds, text_embeds, logit_scale=teacher.logit_scale)
    torch.testing.assert_close(ours + teacher.logit_bias, logits)
    assert (teacher.logit_bias != 0) == name.startswith("siglip")
    alike = torch.allclose(teacher.encode_text(["CAT"]), text_embeds[:1], atol=1e-5)
    assert alike == name.startswith("siglip")
    tuned = Prompts(teacher, class_names, ("a photo of a {}.",), chunk_size=1)  # of TPT
    torch.testing.assert_close(tuned.encode(tuned.context), text_embeds)


def test_prompts_padded_on_the_left_are_not_tuned(tmp_path):
    teacher = load_teacher(save("siglip", tmp_path), device="cpu")
    teacher.tokenizer.padding_side = "left"
    with pytest.raises(ValueError, match="pads on the right"):
        Prompts(teacher, ["cat"], ("a photo of a {}.",), chunk_size=1)


@pytest.mark.parametrize("name", ["siglip", "siglip2"])
@torch.no_grad()
def test_features_of_siglip_are_the_heads_value_projection_and_mlp(teacher_of, name):
    teacher, pixel_values = teacher_of(name), noise(1, 3, 2 * PATCH, 3 * PATCH)
    tower = teacher.model.vision_model
    tokens = {}
    handle = tower.post_layernorm.register_forward_hook(lambda module, args, output: tokens.update(last=output))
    features = teacher.encode_images(pixel_values=pixel_values).features
    handle.remove()
    head, last = tower.head, tokens["last"]  # (1, 6, C)
    value, bias = head.attention.in_proj_weight[2 * WIDTH :], head.attention.in_proj_bias[2 * WIDTH :]
    attended = head.attention.out_proj(F.linear(last, value, bias))
    torch.testing.assert_close(features.flatten(1, 2), attended + head.mlp(head.layernorm(attended)))


def test_mae_is_shown_every_patch_in_order(teacher_of):
    teacher, pixel_values = teacher_of("vit_mae"), noise(2, 3, SIZE, 2 * SIZE)
    assert mae_config().mask_ratio == 0.75  # as saved
    vit = ViTModel(ViTConfig(**VISION), add_pooling_layer=False).eval()
    vit.load_state_dict(teacher.model.state_dict())
    output = teacher.encode_images(pixel_values=pixel_values, layers=[1])
    with torch.no_grad():
        expected = vit(pixel_values, interpolate_pos_encoding=True, output_hidden_states=True)
    torch.testing.assert_close(output.image_embeds, expected.last_hidden_state[:, 0])
    torch.testing.assert_close(output.features.flatten(1, 2), expected.last_hidden_state[:, 1:])
    torch.testing.assert_close(output.levels[:, 0].flatten(1, 2), expected.hidden_states[1][:, 1:])


@pytest.mark.parametrize("name", ["dinov3_vit", "dinov3_convnext", "ijepa"])
@torch.no_grad()
def test_embeddings_and_features_are_tokens_behind_the_prefix(teacher_of, name):
    teacher = teacher_of(name)
    pixel_values = noise(2, 3, 2 * teacher.patch_size, 3 * teacher.patch_size)
    options = {"interpolate_pos_encoding": True} if name == "ijepa" else {}
    states = teacher.model(pixel_values, **options)
    tokens = states.last_hidden_state
    patches = tokens[:, PREFIX.get(name, 1 if name == "dinov3_convnext" else 0) :]
    output = teacher.encode_images(pixel_values=pixel_values)
    expected = tokens.mean(dim=1) if name == "ijepa" else states.pooler_output
    torch.testing.assert_close(output.image_embeds, expected)
    torch.testing.assert_close(output.features, patches.reshape(2, 2, 3, WIDTH))


@pytest.mark.parametrize("name", CLASSIFIERS)
@torch.no_grad()
def test_class_embeddings_are_what_the_classifier_reads(teacher_of, name):
    teacher = teacher_of(name)
    patch = teacher.patch_size
    pixel_values = noise(2, 3, 2 * patch, 3 * patch) if name in MAPS else noise(2, 3, SIZE, SIZE)
    head = teacher.model.classifier[-1] if name.startswith(("resnet", "regnet")) else teacher.model.classifier
    image_embeds = teacher.encode_images(pixel_values=pixel_values).image_embeds
    torch.testing.assert_close(image_embeds @ head.weight.T + head.bias, teacher.model(pixel_values).logits)
    assert teacher.class_names == LABELS and not teacher.has_text
    torch.testing.assert_close(teacher.encode_text(["owl", "cat"]), F.normalize(head.weight[[2, 0]], dim=-1))


@pytest.mark.parametrize("name", ["convnext", *[name for name in CLASSIFIERS if name in MAPS]])
@torch.no_grad()
def test_features_of_maps_are_places_in_the_space_of_the_embedding(teacher_of, name):
    teacher = teacher_of(name)
    pixel_values = noise(2, 3, 2 * STRIDE, 3 * STRIDE)
    tower = teacher.model if name == "convnext" else teacher.model.base_model
    states = tower(pixel_values, output_hidden_states=True)
    places = states.last_hidden_state.permute(0, 2, 3, 1)  # (B, C, rows, cols) -> (B, rows, cols, C)
    embeds, norm = places.mean(dim=(1, 2)), nn.Identity()
    if name.startswith("convnext"):
        norm = tower.layernorm
    output = teacher.encode_images(pixel_values=pixel_values, layers=[1, 0, teacher.num_layers])
    torch.testing.assert_close(output.image_embeds, states.pooler_output.flatten(1))
    torch.testing.assert_close(output.image_embeds, norm(embeds))
    torch.testing.assert_close(output.features, norm(places))
    assert len(states.hidden_states) == teacher.num_layers + 1
    for level, layer in enumerate((1, 0, -1)):
        maps = states.hidden_states[layer]
        height, width = maps.shape[2] // 2, maps.shape[3] // 3  # of one cell of the last grid
        cells = maps.unfold(2, height, height).unfold(3, width, width).mean(dim=(4, 5)).permute(0, 2, 3, 1)
        repeated = torch.cat([cells] * 20, dim=-1)[..., : teacher.hidden_size]
        torch.testing.assert_close(output.levels[:, level], repeated)


@pytest.mark.parametrize("name", ["siglip", "dinov3_vit", "resnet-classifier"])
def test_a_teacher_survives_pickling(tmp_path, name):
    teacher = load_teacher(save(name, tmp_path), device="cpu")
    twin = pickle.loads(pickle.dumps(teacher))
    torch.testing.assert_close(twin.encode_images(photo(0)).features, teacher.encode_images(photo(0)).features)
    if name != "dinov3_vit":
        torch.testing.assert_close(twin.encode_text(["cat"]), teacher.encode_text(["cat"]))
        assert twin.class_names == teacher.class_names


def test_levels_are_in_float32_whatever_the_teacher_is_run_in(tmp_path):
    exact = load_teacher(save("vit_mae", tmp_path), device="cpu")
    teacher = load_teacher(tmp_path, device="cpu", dtype="bfloat16")
    pixel_values = noise(1, 3, SIZE, SIZE)
    output, expected = (x.encode_images(pixel_values=pixel_values, layers=[2]) for x in (teacher, exact))
    assert teacher.dtype == torch.bfloat16 and output.levels.dtype == torch.float32
    assert F.cosine_similarity(output.features, expected.features, dim=-1).min() > 0.98


# Loading


@pytest.mark.parametrize("name", ["dinov3_vit", "siglip", "resnet-classifier"])
def test_missing_weights_are_not_made_up(tmp_path, name):
    model = randomise(BUILD[name]())
    weights = model.state_dict()
    lost = next(key for key in reversed(weights) if key.endswith("weight"))
    model.save_pretrained(tmp_path, state_dict={key: value for key, value in weights.items() if key != lost})
    with pytest.raises(ValueError, match=f"lacks weights of {type(model).__name__}: {lost}"):
        load_teacher(tmp_path, device="cpu")


def test_code_beside_a_model_is_never_run(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "strange", "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"}})
    )
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ValueError, match=r"(?s)custom code.*never run.*Teacher\.from_module"):
        load_teacher(tmp_path, device="cpu")
    assert not (tmp_path / "ran").exists()


def test_an_image_processor_may_be_given(tmp_path):
    BUILD["dinov3_vit"]().save_pretrained(tmp_path)
    with pytest.raises(OSError, match="Could not load the image processor"):  # there is none
        load_teacher(tmp_path, device="cpu")
    given = ViTImageProcessorPil(size={"height": 48, "width": 48})
    teacher = load_teacher(tmp_path, device="cpu", image_processor=given)
    assert teacher.image_size == 48 and teacher.encode_images(photo(0)).features.shape[1:3] == (6, 6)


@needs_torchvision
def test_dinov3_has_an_image_processor_where_there_is_torchvision(tmp_path):
    from transformers import DINOv3ViTImageProcessor  # of the torchvision backend alone

    save("dinov3_vit", tmp_path)
    DINOv3ViTImageProcessor(size={"height": 30, "width": 30}, resample=3).save_pretrained(tmp_path)
    teacher, image = load_teacher(tmp_path, device="cpu"), photo(0, size=(50, 60))
    assert type(teacher.image_processor) is DINOv3ViTImageProcessor and teacher.image_size == 24  # whole patches
    by_pil = ViTImageProcessorPil(
        size={"height": 24, "width": 24}, resample=3, image_mean=list(teacher.image_processor.image_mean),
        image_std=list(teacher.image_processor.image_std),
    )(image, return_tensors="pt")["pixel_values"]  # fmt: skip
    # It resizes fractions, unrounded and unclipped: beside rounding, a kernel's overshoot at smooth edges.
    difference = (teacher.pixel_values(image) - by_pil).abs()
    assert difference.max() < resampling_slack(teacher.image_processor) and by_pil.std() > 0.5


# Image processors


def convnext_processor(backend):
    """The class of ConvNeXt's image processor; that of torchvision cannot be imported without it."""
    if backend == "pil":
        return ConvNextImageProcessorPil
    from transformers import ConvNextImageProcessor

    return ConvNextImageProcessor


@pytest.mark.parametrize("backend", ["pil", pytest.param("torchvision", marks=needs_torchvision)])
@pytest.mark.parametrize(("side", "size"), [(64, (90, 71)), (64, (30, 50)), (384, (90, 71))])
def test_convnexts_crop_is_done_by_the_usual_names(side, size, backend):
    options = {"size": {"shortest_edge": side}, "image_mean": [0.4, 0.5, 0.6], "crop_pct": 0.8}
    theirs = convnext_processor(backend)(**options)
    image = photo(0, size=size)
    pixels, expected = (p(image, return_tensors="pt").pixel_values for p in (plain_image_processor(theirs), theirs))
    torch.testing.assert_close(pixels, expected)


def test_naflex_is_shown_the_largest_square_it_has_patches_for(teacher_of):
    teacher = teacher_of("siglip2")
    theirs = AutoImageProcessor.from_pretrained(teacher.name)  # of the backend that the teacher has taken, too
    inputs = theirs(photo(0, size=(50, 50)), return_tensors="pt")
    with torch.no_grad():
        expected = teacher.model.get_image_features(**inputs).pooler_output
    torch.testing.assert_close(teacher.encode_images(photo(0, size=(50, 50))).image_embeds, expected)


@pytest.mark.parametrize(
    ("data", "size"),
    [
        ({"crop_pct": 0.875}, {"shortest_edge": 36}),
        ({"crop_pct": 0.9, "crop_mode": "squash"}, {"height": 35, "width": 35}),
    ],
)
def test_timms_transforms_become_a_processor(data, size):
    config = {"input_size": (3, 32, 32), "interpolation": "bicubic", "mean": (0.1,) * 3, "std": (0.2,) * 3} | data
    plain = plain_image_processor(TimmWrapperImageProcessor(data_config=config))
    assert {key: value for key, value in dict(plain.size).items() if value} == size
    assert plain(photo(0), return_tensors="pt").pixel_values.shape == (1, 3, 32, 32)
    assert list(plain.image_mean) == [0.1] * 3 and plain.resample == 3
    with pytest.raises(ValueError, match="crop_mode 'center'.*got 'border'"):
        plain_image_processor(TimmWrapperImageProcessor(data_config=config | {"crop_mode": "border"}))


class TimmWrapperImageProcessor(SimpleNamespace):
    """By the name of that which needs torchvision."""


@pytest.mark.parametrize(
    "processor",
    [
        ViTImageProcessorPil(size={"height": 30, "width": 30}),  # SigLIP so400m: 384 pixels, patches of 14
        CLIPImageProcessorPil(size={"shortest_edge": 33}, crop_size={"height": 29, "width": 29}),
    ],
)
def test_images_are_made_a_multiple_of_the_patch_size(tmp_path, processor):
    teacher = load_teacher(save("siglip", tmp_path), device="cpu", image_processor=processor)
    assert teacher.image_size == 24 and teacher.encode_images(photo(0)).features.shape[1:3] == (3, 3)
    assert processor(photo(0, size=(50, 50)), return_tensors="pt").pixel_values.shape[-1] != 24  # not ours to change
    with pytest.raises(ValueError, match="multiples of the patch size 8, got 30 pixels"):
        load_teacher(tmp_path, device="cpu", image_processor=fixed_processor)


def fixed_processor(images, return_tensors):
    return {"pixel_values": torch.zeros(len(images), 3, 30, 30)}


def test_a_student_is_shown_the_crop_that_a_convolutional_teacher_sees(teacher_of):
    teacher = teacher_of("resnet-classifier")
    pixels = np.zeros((90, 90, 3), dtype=np.uint8)
    pixels[:3], pixels[:, :3] = 255, 255  # lines at two edges, which are cropped away
    image = Image.fromarray(pixels)
    student_processor = matching_image_processor(teacher, 128)
    assert student_processor(image, return_tensors="pt").pixel_values.shape[-2:] == (128, 128)
    for seen in (teacher.pixel_values(image), student_processor(image, return_tensors="pt").pixel_values):
        assert (seen.amax(dim=(2, 3)) - seen.amin(dim=(2, 3))).max() < 1e-4
    pixels[45] = 255  # one in the middle is not
    assert teacher.pixel_values(Image.fromarray(pixels)).std() > 0.1


# timm: it needs torchvision, so its models are stood in for by modules with the methods that are used. The real ones
# follow, for `make test-torchvision`.


class StubViT(nn.Module):
    """As timm's VisionTransformer: a class token in front, the mean of the patches pooled."""

    num_prefix_tokens, num_features = 1, WIDTH
    feature_info = ({"num_chs": WIDTH, "reduction": PATCH},) * 2

    def __init__(self):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.norm, self.fc_norm, self.head = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3)

    def forward_intermediates(self, pixel_values):
        maps = self.patch_embed(pixel_values)
        patches = maps.flatten(2).transpose(1, 2)
        return self.norm(torch.cat([torch.ones_like(patches[:, :1]), patches], dim=1)), [maps, 2 * maps]

    def forward_features(self, pixel_values):
        return self.forward_intermediates(pixel_values)[0]

    def forward_head(self, tokens, pre_logits=False):
        pooled = self.fc_norm(tokens[:, 1:].mean(dim=1))
        return pooled if pre_logits else self.head(pooled)

    def get_classifier(self):
        return self.head


class StubConv(nn.Module):
    """As timm's MobileNetV3: a head that widens what it has pooled. As Swin, with channels last."""

    num_features, head_hidden_size = 8, WIDTH
    feature_info = ({"num_chs": 4, "reduction": 8}, {"num_chs": 8, "reduction": 16})

    def __init__(self, output_fmt):
        super().__init__()
        self.output_fmt = output_fmt
        self.stem, self.stage = nn.Conv2d(3, 4, 8, 8), nn.Conv2d(4, 8, 2, 2)
        self.conv_head, self.classifier = nn.Conv2d(8, WIDTH, 1), nn.Linear(WIDTH, 3)

    def forward_intermediates(self, pixel_values):
        stem = self.stem(pixel_values)
        last = self.stage(stem)
        return (last.permute(0, 2, 3, 1) if self.output_fmt == "NHWC" else last), [stem, last]

    def forward_features(self, pixel_values):
        return self.forward_intermediates(pixel_values)[0]

    def forward_head(self, maps, pre_logits=False):
        maps = maps.permute(0, 3, 1, 2) if self.output_fmt == "NHWC" else maps
        pooled = self.conv_head(maps.mean(dim=(2, 3), keepdim=True)).relu().flatten(1)
        return pooled if pre_logits else self.classifier(pooled)

    def get_classifier(self):
        return self.classifier


@pytest.mark.parametrize("wrapped", [StubViT(), StubConv("NCHW"), StubConv("NHWC")], ids=["vit", "conv", "last"])
@torch.no_grad()
def test_models_of_timm_are_read_through_their_own_methods(wrapped):
    model = nn.Module()
    model.timm_model = randomise(wrapped)
    model.config = SimpleNamespace(model_type="timm_wrapper", architectures=None, num_labels=3)
    vision = FamilyVision(model)
    patch = vision.patch_size
    pixel_values = noise(2, 3, 2 * patch, 3 * patch)
    answers = vision.encode(pixel_values, [1, 0])
    last, maps = wrapped.forward_intermediates(pixel_values)
    logits = wrapped.forward_head(last)
    assert vision.num_layers == 1 and vision.feature_size == WIDTH
    torch.testing.assert_close(F.linear(answers["image_embeds"], vision.head.weight, vision.head.bias), logits)
    # A picture whose places all look like one has the feature of that place as its embedding.
    for row, col in ((0, 2), (1, 0)):
        cell = pixel_values[..., row * patch : (row + 1) * patch, col * patch : (col + 1) * patch]
        alike = vision.encode(cell.repeat(1, 1, 2, 3), None)["image_embeds"]
        torch.testing.assert_close(answers["features"][:, row, col], alike)
    torch.testing.assert_close(answers["levels"][:, 0], maps[1].permute(0, 2, 3, 1))
    assert answers["levels"].shape == (2, 2, 2, 3, vision.hidden_size)


NO_TIMM = "timm needs torchvision, which cannot be loaded beside the CPU build of torch"


@pytest.mark.parametrize(
    "architecture", ["test_vit", "test_resnet", "test_convnext", "test_efficientnet", "mobilenetv3_small_050"]
)
@torch.no_grad()
def test_a_real_model_of_timm_is_a_teacher(tmp_path, architecture):
    pytest.importorskip("timm", reason=NO_TIMM, exc_type=ImportError)
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    config = TimmWrapperConfig(architecture=architecture, num_labels=3, label_names=LABELS, **HEAD)
    model = TimmWrapperForImageClassification(config).eval()
    model.save_pretrained(tmp_path)
    teacher = load_teacher(tmp_path, device="cpu", image_processor=processor(160))
    output = teacher.encode_images([photo(0)], layers=[0, teacher.num_layers])
    side = 160 // teacher.patch_size
    assert output.features.shape == (1, side, side, teacher.feature_size)
    assert output.levels.shape == (1, 2, side, side, teacher.hidden_size)
    head = teacher.model.timm_model.get_classifier()
    logits = model(teacher.pixel_values(photo(0))).logits
    torch.testing.assert_close(F.linear(output.image_embeds, head.weight, head.bias), logits)
    assert teacher.class_names == LABELS


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    ("crop_mode", "crop_pct", "reach"), [("center", 0.8, 0), ("squash", 0.8, 0), ("center", 0.95, 1)]
)
def test_timms_own_transforms_are_done_by_the_usual_names(tmp_path, crop_mode, crop_pct, reach, interpolation):
    pytest.importorskip("timm", reason=NO_TIMM, exc_type=ImportError)
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    data = {"input_size": (3, 64, 64), "crop_mode": crop_mode, "crop_pct": crop_pct, "interpolation": interpolation}
    data |= {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3)}
    config = TimmWrapperConfig(architecture="test_convnext", num_labels=3, label_names=LABELS, pretrained_cfg=data)
    TimmWrapperForImageClassification(config).save_pretrained(tmp_path)
    transforms = AutoImageProcessor.from_pretrained(tmp_path).val_transforms
    teacher = load_teacher(tmp_path, device="cpu")
    for size in ((44, 36), (301, 200), (161, 160), (64, 64), (200, 333)):
        pixels, expected = teacher.pixel_values(photo(0, size=size))[0], transforms(photo(0, size=size))
        # Where an odd number of pixels is cropped away, timm rounds the half to an even start, transformers down: its
        # crop may begin a pixel further on. Both resize pictures with PIL: the pixels are the same ones.
        shifted = [
            (expected[:, : 64 - down, : 64 - right] - pixels[:, down:, right:]).abs().max()
            for down in range(reach + 1)
            for right in range(reach + 1)
        ]
        assert min(shifted) < 1e-5


# Any module


class Blocks(nn.Module):
    """Mean colours of cells of 8 x 8 pixels, through a linear layer."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(3, WIDTH)
        self.words = nn.Embedding(300, WIDTH)


def blocks(module, pixel_values):
    cells = F.avg_pool2d(pixel_values, 8).permute(0, 2, 3, 1)  # (B, rows, cols, 3)
    features = module.mix(cells)
    return features.mean(dim=(1, 2)), features, [cells, 2 * cells]


def blocks_text(module, prompts):
    return torch.stack([module.words(torch.tensor(list(prompt.encode()))).mean(dim=0) for prompt in prompts])


def processor(side=SIZE):
    return ViTImageProcessorPil(size={"height": side, "width": side})


def module_teacher(outputs=blocks, **options):
    return Teacher.from_module(
        Blocks(), outputs=outputs, **{"image_processor": processor(), "patch_size": 8, **options}
    )


def test_any_module_is_a_teacher():
    teacher = module_teacher(name="blocks")
    assert (teacher.feature_size, teacher.hidden_size, teacher.num_layers) == (WIDTH, 3, 1)
    assert (teacher.image_size, teacher.patch_size, teacher.name, teacher.has_text) == (SIZE, 8, "blocks", False)
    assert not teacher.model.training and not any(p.requires_grad for p in teacher.model.parameters())
    pixel_values = noise(2, 3, 16, 24)
    output = teacher.encode_images(pixel_values=pixel_values, layers=[1, 0])
    embeds, features, levels = blocks(teacher.model, pixel_values)
    torch.testing.assert_close(output.image_embeds, embeds)
    torch.testing.assert_close(output.features, features)
    torch.testing.assert_close(output.levels, torch.stack(levels[::-1], dim=1))
    assert not output.features.is_inference()
    with pytest.raises(ValueError, match="neither a text tower nor a classifier"):
        teacher.encode_text(["cat"])
    plain = module_teacher(lambda module, pixels: TeacherOutput(*blocks(module, pixels)[:2]))
    expected = blocks(plain.model, pixel_values)[1]
    torch.testing.assert_close(plain.encode_images(pixel_values=pixel_values).features, expected)
    with pytest.raises(ValueError, match="give no levels"):
        plain.encode_images(pixel_values=pixel_values, layers=[0])


def test_a_module_may_read_text_or_know_classes():
    teacher = module_teacher(text=blocks_text)
    expected = F.normalize(blocks_text(teacher.model, ["a cat", "a dog"]), dim=-1)
    torch.testing.assert_close(teacher.encode_text(["cat", "dog"], ["a {}"]), expected)
    embeds = noise(2, WIDTH)
    classes = module_teacher(class_names=["cat", "dog"], class_embeds=embeds)
    assert classes.class_names == ["cat", "dog"]
    torch.testing.assert_close(classes.encode_text(["dog"]), F.normalize(embeds[1:], dim=-1))
    twin = pickle.loads(pickle.dumps(teacher))
    torch.testing.assert_close(twin.encode_text(["cat", "dog"], ["a {}"]), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda embeds, features: features, "expected .image_embeds, features. or .* got Tensor"),
        (lambda embeds, features: (embeds,), "got 1 values"),
        (
            lambda embeds, features: (embeds[0], features),
            r"image_embeds of shape \(1, F\) for 1 x 3 x 32 x 32 .*\(16,\)",
        ),
        (
            lambda embeds, features: (embeds, features.flatten(1, 2)),
            r"features of shape \(1, 4, 4, 16\) .*\(1, 16, 16\)",
        ),
        (lambda embeds, features: (embeds, features[..., 1:]), r"features of shape \(1, 4, 4, 16\) .*\(1, 4, 4, 15\)"),
        (lambda embeds, features: (embeds, features[:, 1:]), r"features .* patch_size 8, got \(1, 3, 4, 16\)"),
        (
            lambda embeds, features: (embeds, features, [features[:, 1:]]),
            r"levels of shape \(1, 1, 4, 4, C\) .*\(1, 1, 3, 4, 16\)",
        ),
        (lambda embeds, features: (embeds, features, [features, features[:, 1:]]), "levels of one shape .* 3, 4, 16"),
        (lambda embeds, features: (embeds, features, [None]), "levels of one shape .* got .'NoneType'"),
        (
            lambda embeds, features: (embeds.int(), features),
            "image_embeds to be a floating point tensor, got torch.int32",
        ),
        (lambda embeds, features: (embeds, None), "features to be a floating point tensor, got NoneType"),
    ],
)
def test_wrong_outputs_of_a_module_are_refused_at_once(change, message):
    with pytest.raises(ValueError, match=message):
        module_teacher(lambda module, pixels: change(*blocks(module, pixels)[:2]))


def test_outputs_that_are_not_finite_are_refused_by_image():
    teacher = module_teacher(lambda module, pixels: [1 / part for part in blocks(module, pixels)[:2]])
    nn.init.zeros_(teacher.model.mix.bias)
    pixel_values = noise(3, 3, SIZE, SIZE)
    pixel_values[1] = 0
    with pytest.raises(ValueError, match="finite image_embeds of teacher 'Blocks' .* infinity in image 1"):
        teacher.encode_images(pixel_values=pixel_values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": 0}, "patch_size: expected an integer number of pixels, 1 or more, got 0"),
        ({"image_processor": fixed_processor}, "multiples of the patch size 8, got 30 pixels"),
        ({"class_names": ["cat"]}, "class_names, class_embeds: expected both or neither"),
        ({"class_names": ["cat"], "class_embeds": torch.ones(2, WIDTH)}, r"expected shape \(1, 16\), got \(2, 16\)"),
    ],
)
def test_a_module_with_wrong_options_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        module_teacher(**options)


def test_text_embeddings_of_a_wrong_shape_are_refused():
    teacher = module_teacher(text=lambda module, prompts: torch.ones(len(prompts), 3))
    with pytest.raises(ValueError, match=r"text: expected shape \(2, 16\) for as many prompts, got \(2, 3\)"):
        teacher.encode_text(["cat", "dog"])


# What students learn from


@pytest.mark.parametrize("name", ["convnext", "module"])
def test_a_student_learns_from_any_teacher(teacher_of, tmp_path, name):
    teacher = module_teacher(image_processor=processor(2 * STRIDE)) if name == "module" else teacher_of(name)
    model = student(feature_size=WIDTH, num_levels=1, level_size=teacher.hidden_size)
    image_processor = matching_image_processor(teacher, model.config.image_size)
    scenes = SceneDataset(8, seed=0)
    images = [scenes[row]["image"] for row in range(len(scenes))]
    cache = TargetCache.build(images, teacher, image_processor, layers=[teacher.num_layers])
    assert cache.levels.shape[-1] == teacher.hidden_size
    cosines = []
    for steps in (1, 30):
        config = DistillationConfig(
            output_dir=str(tmp_path / str(steps)),
            max_steps=steps,
            batch_size=8,
            learning_rate=3e-3,
            checkpoint_steps=0,
            report_to="none",
        )
        result = distill(
            copy.deepcopy(model), cache, config=config, image_processor=image_processor, validation_data=cache
        )
        cosines.append(result.metrics[-1]["feature_cosine"])
    assert cosines[1] > cosines[0] + 0.1


@pytest.mark.parametrize("name", ["convnext", "ijepa", "module"])
def test_answers_between_the_places_of_any_grid(teacher_of, name):
    teacher = module_teacher() if name == "module" else teacher_of(name)
    patch = teacher.patch_size
    output = encode_densely(teacher, noise(1, 3, 2 * patch, 3 * patch), 2)
    assert output.features.shape == (1, 4, 6, teacher.feature_size) and output.features.isfinite().all()
    side = teacher.image_size // patch
    assert teacher_features(teacher, [photo(0)], fine=False).shape[1:3] == (side, side)
    fine = teacher_features(teacher, [photo(0, size=(60, 30))], fine=True)  # twice the side, and twice between
    assert fine.shape == (1, 2 * side, 4 * side, teacher.feature_size)


def test_families_are_those_of_the_guide():
    guide = (Path(__file__).parents[1] / "docs" / "teachers.md").read_text()
    for family in [*teacher_families.VISION_TOWERS, *teacher_families.DUAL_ENCODERS]:
        if not family.endswith("_vision_model"):
            assert f"`{family}`" in guide
