"""Teachers of every supported family, tiny and random but of the real classes, saved and loaded as real ones are."""

import io
import json
import logging
import math

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    DeiTModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    PreTrainedTokenizerFast,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from apm_hf.teachers import load_teacher
from apm_hf.teachers import teacher as teachers
from apm_hf.teachers import text as teacher_text
from apm_hf.teachers import vision as teacher_vision
from apm_hf.teachers.families import VisionTower
from apm_hf.teachers.zero_shot import ENSEMBLE_TEMPLATES, classify

SIZE, PATCH, WIDTH, PROJECTION, NUM_REGISTERS, NUM_LAYERS = 32, 8, 32, 24, 3, 3
WORDS = "[PAD] [UNK] [CLS] [SEP] a photo of picture dark cat dog owl great white shark { } .".split()
LABELS = ["cat", "dog", "crane", "Owl", "maillot", "crane", "owl", "DOG"]

TRANSFORMER = {"hidden_size": WIDTH, "num_hidden_layers": NUM_LAYERS, "num_attention_heads": 2}
TEXT = TRANSFORMER | {"intermediate_size": 48, "vocab_size": len(WORDS), "max_position_embeddings": 12}
DINO = TRANSFORMER | {"image_size": SIZE, "patch_size": PATCH}
VISION = DINO | {"intermediate_size": 48}
HEAD = {"id2label": dict(enumerate(LABELS)), "label2id": {label: row for row, label in enumerate(LABELS)}}

PREFIX = {  # tokens in front of the patches, said here once more by hand
    "clip": 1,
    "dual-vit": 1,
    "dual-deit": 2,
    "dual-clip": 1,
    "dual-dinov2": 1,
    "dual-dinov2-registers": 1 + NUM_REGISTERS,
    "dinov2": 1,
    "dinov2-registers": 1 + NUM_REGISTERS,
    "dinov2-classifier": 1,
    "vit": 1,
    "vit-classifier": 1,
    "deit": 2,
    "deit-classifier": 2,
    "deit-distilled": 2,
}
DUAL = [name for name in PREFIX if name == "clip" or name.startswith("dual-")]
CLASSIFIERS = ["vit-classifier", "deit-classifier", "deit-distilled"]


def dual_encoder(vision_model):
    config = VisionTextDualEncoderConfig.from_vision_text_configs(
        vision_model.config, BertConfig(**TEXT), projection_dim=PROJECTION
    )
    return VisionTextDualEncoderModel(config=config)


def build_model(name):
    registers = {"num_register_tokens": NUM_REGISTERS}
    bos_and_eos = {"pad_token_id": 0, "bos_token_id": WORDS.index("[CLS]"), "eos_token_id": WORDS.index("[SEP]")}
    build = {
        "clip": lambda: CLIPModel(
            CLIPConfig(text_config=TEXT | bos_and_eos, vision_config=VISION, projection_dim=PROJECTION)
        ),
        "dual-vit": lambda: dual_encoder(ViTModel(ViTConfig(**VISION))),
        "dual-deit": lambda: dual_encoder(DeiTModel(DeiTConfig(**VISION))),
        "dual-clip": lambda: dual_encoder(CLIPVisionModel(CLIPVisionConfig(**VISION))),
        "dual-dinov2": lambda: dual_encoder(Dinov2Model(Dinov2Config(**DINO))),
        "dual-dinov2-registers": lambda: dual_encoder(
            Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**DINO, **registers))
        ),
        "dinov2": lambda: Dinov2Model(Dinov2Config(**DINO)),
        "dinov2-registers": lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**DINO, **registers)),
        "dinov2-classifier": lambda: Dinov2ForImageClassification(Dinov2Config(**DINO, **HEAD)),
        "vit": lambda: ViTModel(ViTConfig(**VISION)),
        "vit-classifier": lambda: ViTForImageClassification(ViTConfig(**VISION, **HEAD)),
        "deit": lambda: DeiTModel(DeiTConfig(**VISION)),
        "deit-classifier": lambda: DeiTForImageClassification(DeiTConfig(**VISION, **HEAD)),
        "deit-distilled": lambda: DeiTForImageClassificationWithTeacher(DeiTConfig(**VISION, **HEAD)),
        "bert": lambda: BertModel(BertConfig(**TEXT)),
        "clip-text": lambda: CLIPTextModel(CLIPTextConfig(**TEXT, **bos_and_eos)),
        "clip-vision": lambda: CLIPVisionModel(CLIPVisionConfig(**VISION)),
    }
    return randomise(build[name]())


@torch.no_grad()
def randomise(model):
    """Every weight away from 0 and 1: a forgotten or repeated layernorm, or a wrong token, must show."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        offset = 1.0 if (parameter == 1).all() else 0.0
        parameter.copy_(offset + 0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def build_image_processor(name):
    if "dino" in name:  # DINOv2's recipe: resize the shorter side, then crop
        return BitImageProcessorPil(size={"shortest_edge": 40}, crop_size={"height": SIZE, "width": SIZE})
    if name == "clip":
        return CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    return ViTImageProcessorPil(size={"height": SIZE, "width": SIZE})


def build_tokenizer():
    vocabulary = {word: row for row, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "attention_mask"],
    )


def save(name, folder, *, model=None):
    (build_model(name) if model is None else model).save_pretrained(folder)
    build_image_processor(name).save_pretrained(folder)
    if name in DUAL:
        build_tokenizer().save_pretrained(folder)
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


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def photo(mode="RGB", size=(40, 30)):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@torch.no_grad()
def run_tower(teacher, pixel_values):
    """The vision tower called directly, as transformers' documentation does."""
    model = teacher.model
    tower = next(
        (getattr(model, key) for key in ("vision_model", "vit", "deit", "dinov2") if hasattr(model, key)), model
    )
    options = {} if "dino" in tower.config.model_type else {"interpolate_pos_encoding": True}
    return tower, tower(pixel_values=pixel_values, output_hidden_states=True, **options)


# Images


@pytest.mark.parametrize("name", PREFIX)
def test_targets_are_float32_without_gradients_in_shape_of_the_grid(teacher_of, name):
    teacher = teacher_of(name)
    output = teacher.encode_images(pixel_values=noise(2, 3, 3 * PATCH, 5 * PATCH), layers=(1, 3))
    width = PROJECTION if name in DUAL else WIDTH
    assert output.image_embeds.shape == (2, width)
    assert output.features.shape == (2, 3, 5, width)
    assert output.levels.shape == (2, 2, 3, 5, WIDTH)
    assert all(value.dtype == torch.float32 and not value.requires_grad for value in output.values())
    assert (teacher.feature_size, teacher.image_size, teacher.patch_size) == (width, SIZE, PATCH)
    assert not teacher.model.training
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    assert teacher.encode_images(pixel_values=noise(1, 3, SIZE, SIZE)).levels is None


@pytest.mark.parametrize("name", PREFIX)
def test_tokens_are_those_behind_the_prefix(teacher_of, name):
    teacher, pixel_values = teacher_of(name), noise(2, 3, 3 * PATCH, 5 * PATCH)
    output = teacher.encode_images(pixel_values=pixel_values, layers=(0, 3, 1))
    _, states = run_tower(teacher, pixel_values)
    patches = slice(PREFIX[name], PREFIX[name] + 15)
    assert states.last_hidden_state.shape[1] == patches.stop
    for level, layer in enumerate((0, 3, 1)):
        expected = states.hidden_states[layer][:, patches].reshape(2, 3, 5, WIDTH)
        torch.testing.assert_close(output.levels[:, level], expected)
    if name not in DUAL:
        torch.testing.assert_close(output.image_embeds, states.last_hidden_state[:, 0])
        torch.testing.assert_close(output.features, states.last_hidden_state[:, patches].reshape(2, 3, 5, WIDTH))


@pytest.mark.parametrize("name", PREFIX)
def test_changing_one_patch_changes_its_own_embedding_and_no_other(teacher_of, name):
    teacher, pixel_values = teacher_of(name), noise(1, 3, 3 * PATCH, 5 * PATCH)
    changed = pixel_values.clone()
    changed[..., PATCH : 2 * PATCH, 3 * PATCH : 4 * PATCH] += 1.0  # row 1, column 3
    before, after = (teacher.encode_images(pixel_values=x, layers=[0]).levels[0, 0] for x in (pixel_values, changed))
    moved = (before - after).norm(dim=-1) > 1e-6
    assert moved.nonzero().tolist() == [[1, 3]]


@pytest.mark.parametrize("name", DUAL)
def test_image_embeds_of_a_dual_encoder_are_its_image_features(teacher_of, name):
    teacher, pixel_values = teacher_of(name), noise(2, 3, SIZE, SIZE)
    with torch.no_grad():
        expected = teacher.model.get_image_features(pixel_values=pixel_values).pooler_output
    torch.testing.assert_close(teacher.encode_images(pixel_values=pixel_values).image_embeds, expected)


@pytest.mark.parametrize("name", DUAL)
@torch.no_grad()
def test_features_of_a_dual_encoder_take_the_way_of_its_class_token(teacher_of, name):
    teacher, pixel_values = teacher_of(name), noise(2, 3, SIZE, 2 * SIZE)
    tower, states = run_tower(teacher, pixel_values)

    def embed(token):
        if "clip" in name:
            token = tower.post_layernorm(token)
        elif "dino" not in name:
            token = tower.pooler.activation(tower.pooler.dense(token))
        return teacher.model.visual_projection(token)

    tokens = states.last_hidden_state
    torch.testing.assert_close(embed(tokens[:, 0]), teacher.model.visual_projection(states.pooler_output))
    features = teacher.encode_images(pixel_values=pixel_values).features
    for row, col in ((0, 0), (0, 7), (3, 0), (2, 5)):
        torch.testing.assert_close(features[:, row, col], embed(tokens[:, PREFIX[name] + row * 8 + col]))


@pytest.mark.parametrize("name", CLASSIFIERS)
@torch.no_grad()
def test_image_embeds_of_a_classifier_are_what_its_head_sees(teacher_of, name):
    teacher, pixel_values = teacher_of(name), noise(2, 3, SIZE, SIZE)
    head = teacher.model.cls_classifier if name == "deit-distilled" else teacher.model.classifier
    output = teacher.model(pixel_values=pixel_values)
    image_embeds = teacher.encode_images(pixel_values=pixel_values).image_embeds
    expected = output.cls_logits if name == "deit-distilled" else output.logits
    torch.testing.assert_close(image_embeds @ head.weight.T + head.bias, expected)


def test_a_student_can_be_trained_on_the_targets(teacher_of):
    output = teacher_of("clip").encode_images(pixel_values=noise(2, 3, SIZE, SIZE), layers=[1])
    for target in (*output.values(), teacher_of("clip").encode_text(["cat", "dog"])):
        student = torch.zeros_like(target, requires_grad=True)
        (student * target).sum().backward()  # autograd keeps the target, which it refuses for inference tensors
        torch.testing.assert_close(student.grad, target)


def test_images_are_processed_by_the_teachers_own_processor(teacher_of):
    teacher, images = teacher_of("dinov2"), [photo(), photo(size=(33, 64))]
    pixel_values = teacher.image_processor(images=images, return_tensors="pt").pixel_values
    assert pixel_values.shape == (2, 3, SIZE, SIZE)
    expected = teacher.encode_images(pixel_values=pixel_values)
    output = teacher.encode_images(images)
    torch.testing.assert_close(output.features, expected.features)
    single = teacher.encode_images(images[1])
    torch.testing.assert_close(single.image_embeds, expected.image_embeds[1:])


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV", "RGBX"])
def test_any_opaque_mode_is_read_as_rgb(teacher_of, mode):
    image = photo(mode)
    output, expected = (teacher_of("vit").encode_images(x) for x in (image, image.convert("RGB")))
    torch.testing.assert_close(output.image_embeds, expected.image_embeds, rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "La", "RGBa"])
def test_transparent_pixels_are_white_whatever_colour_they_hide(teacher_of, mode):
    left = Image.new("L", (40, 30), 0)
    left.paste(255, (0, 0, 20, 30))  # opaque on the left half only
    image = photo("RGBA")
    image.putalpha(left)
    if mode in ("LA", "La"):
        image = image.convert("LA").convert(mode)
    elif mode == "RGBa":
        image = image.convert("RGBa")
    elif mode in ("P", "PA"):
        image = image.convert("L").convert("P")
        if mode == "PA":
            image.putalpha(left)
        else:
            image.paste(0, (20, 0, 40, 30))
            image.info["transparency"] = bytes([0]) + bytes([255]) * 255
    assert image.mode == mode
    expected = image.convert("LA" if mode == "La" else "RGBA").convert("RGB")
    expected.paste((255, 255, 255), (20, 0, 40, 30))
    if mode == "P":
        expected = Image.composite(
            expected, Image.new("RGB", (40, 30), "white"), image.convert("RGBA").getchannel("A")
        )
    output, expected = (teacher_of("vit").encode_images(x) for x in (image, expected))
    torch.testing.assert_close(output.image_embeds, expected.image_embeds)


def test_16_bit_grey_is_scaled_not_clipped(teacher_of):
    values = np.asarray(photo("L")).astype(np.uint16) * 200
    grey, deep = Image.fromarray(np.rint(values / 257).astype(np.uint8)), Image.fromarray(values)
    assert deep.mode == "I;16"
    expected = teacher_of("vit").encode_images(grey).image_embeds
    torch.testing.assert_close(teacher_of("vit").encode_images(deep).image_embeds, expected)
    torch.testing.assert_close(teacher_of("vit").encode_images(deep.convert("I")).image_embeds, expected)


def test_photos_lying_on_their_side_are_turned_upright(teacher_of):
    image = photo()
    image.getexif()[0x0112] = 6  # orientation: the camera was turned by 90 degrees
    upright = photo().transpose(Image.Transpose.ROTATE_270)
    output, expected = (teacher_of("vit").encode_images(x) for x in (image, upright))
    torch.testing.assert_close(output.image_embeds, expected.image_embeds)


@pytest.mark.parametrize("kind", [np.asarray, torch.tensor])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_arrays_and_tensors_are_read_like_images(teacher_of, kind, mode):
    array = np.asarray(photo(mode))
    expected = teacher_of("vit").encode_images([photo(mode)] * 2).image_embeds
    layouts = [array, array[..., None], array[None]] if mode == "L" else [array, np.moveaxis(array, 2, 0)]
    for layout in layouts:
        image = kind(np.ascontiguousarray(layout))
        torch.testing.assert_close(teacher_of("vit").encode_images([image, image]).image_embeds, expected)
        torch.testing.assert_close(teacher_of("vit").encode_images(image).image_embeds, expected[:1])
        if image.ndim == 3:
            batch = kind(np.stack([layout, layout]))
            torch.testing.assert_close(teacher_of("vit").encode_images(batch).image_embeds, expected)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "at least one image"),
        (np.zeros((0, 3, 8, 8), np.uint8), "at least one image"),
        ("photo.jpg", "Image 0: expected a PIL image, NumPy array or torch tensor, got str"),
        ([photo(), None], "Image 1: .* got NoneType"),
        ([photo(), np.zeros((8, 8, 3), np.float32)], "Image 1: expected an array of uint8.*float32.*`pixel_values`"),
        (torch.zeros(3, 8, 8), r"Image 0: expected an array of uint8.*torch.float32"),
        (np.zeros((8, 8, 2), np.uint8), r"Image 0: expected .*channel.* got .*\(8, 8, 2\)"),
        (np.zeros((8, 0, 3), np.uint8), "Image 0: expected .* got .*"),
        (np.zeros(8, np.uint8), r"Image 0: expected .* got .*\(8,\)"),
        (Image.new("F", (8, 8), 1000.0), "Image 0: expected .*1000"),
        ([photo(), Image.new("RGB", (0, 8))], r"Image 1: expected at least one pixel.*\(0, 8\)"),
    ],
)
def test_what_is_no_image_is_refused_by_index(teacher_of, images, message):
    with pytest.raises(ValueError, match=message):
        teacher_of("vit").encode_images(images)


def test_a_truncated_file_is_refused_by_index(teacher_of, tmp_path):
    path = tmp_path / "half.png"
    photo().save(path)
    path.write_bytes(path.read_bytes()[:1500])
    with Image.open(path) as image, pytest.raises(ValueError, match="Image 1: expected a readable image.*truncated"):
        teacher_of("vit").encode_images([photo(), image])


def test_images_and_pixel_values_exclude_each_other(teacher_of):
    for options in ({}, {"images": photo(), "pixel_values": noise(1, 3, SIZE, SIZE)}):
        with pytest.raises(ValueError, match="exactly one of"):
            teacher_of("vit").encode_images(**options)


@pytest.mark.parametrize(
    ("pixel_values", "message"),
    [
        (torch.zeros(3, SIZE, SIZE), r"\(B, 3, H, W\), got torch.float32 \(3, 32, 32\)"),
        (torch.zeros(1, 1, SIZE, SIZE), r"got torch.float32 \(1, 1, 32, 32\)"),
        (torch.zeros(0, 3, SIZE, SIZE), r"got torch.float32 \(0, 3, 32, 32\)"),
        (torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8), "got torch.uint8.*pass unprocessed images as `images`"),
        (torch.zeros(1, 3, SIZE, SIZE + 4), r"multiples of the patch size 8, got \(32, 36\)"),
        (torch.zeros(1, 3, 4, SIZE), r"multiples of the patch size 8, got \(4, 32\)"),
    ],
)
def test_pixel_values_that_fit_no_grid_are_refused(teacher_of, pixel_values, message):
    with pytest.raises(ValueError, match=message):
        teacher_of("dinov2").encode_images(pixel_values=pixel_values)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_pixel_values_that_are_not_finite_are_refused_by_index(teacher_of, value):
    pixel_values = noise(4, 3, SIZE, SIZE)
    pixel_values[[1, 3], 0, 5, 5] = value
    with pytest.raises(ValueError, match="finite pixel values, got NaN or infinity in image 1, image 3"):
        teacher_of("vit").encode_images(pixel_values=pixel_values)


def test_targets_that_overflow_are_refused_by_index(teacher_of):
    pixel_values = noise(3, 3, SIZE, SIZE)
    pixel_values[2] = 3e38  # finite, but not once a patch has been summed up
    with pytest.raises(ValueError, match="finite image_embeds of teacher .* in torch.float32.*infinity in image 2"):
        teacher_of("vit").encode_images(pixel_values=pixel_values)


@pytest.mark.parametrize("layers", [(), (0, 4), (-1,), (1.5,)])
def test_layers_out_of_range_are_refused(teacher_of, layers):
    with pytest.raises(ValueError, match="`layers` from 0 to 3"):
        teacher_of("vit").encode_images(pixel_values=noise(1, 3, SIZE, SIZE), layers=layers)


def test_a_token_count_that_does_not_fit_the_grid_is_refused(tmp_path):
    teacher = load_teacher(save("dinov2-registers", tmp_path), device="cpu")
    teacher.model.config.num_register_tokens = 0
    with pytest.raises(ValueError, match="1 prefix tokens and 4 x 4 patches, got 20 tokens"):
        teacher.encode_images(pixel_values=noise(1, 3, SIZE, SIZE))


# Text


@pytest.mark.parametrize("name", DUAL)
@torch.no_grad()
def test_zero_shot_logits_are_those_of_the_dual_encoder(teacher_of, name):
    teacher, class_names, pixel_values = teacher_of(name), ["cat", "great white shark"], noise(3, 3, SIZE, SIZE)
    tokens = teacher.tokenizer([f"a photo of a {x}." for x in class_names], padding=True, return_tensors="pt")
    expected = teacher.model(pixel_values=pixel_values, **tokens).logits_per_image
    image_embeds = teacher.encode_images(pixel_values=pixel_values).image_embeds
    text_embeds = teacher.encode_text(class_names)
    torch.testing.assert_close(classify(image_embeds, text_embeds, logit_scale=teacher.logit_scale), expected)


@torch.no_grad()
def test_templates_are_averaged_as_unit_vectors(teacher_of):
    teacher, class_names = teacher_of("clip"), ["cat", "great white shark", "dog"]
    text_embeds = teacher.encode_text(class_names, ["a {}.", "dark picture of {class} a {}"])
    for name, actual in zip(class_names, text_embeds, strict=True):
        prompts = [f"a {name}.", f"dark picture of {name} a {name}"]
        tokens = [teacher.tokenizer(prompt, return_tensors="pt") for prompt in prompts]
        units = [nn.functional.normalize(teacher.model.get_text_features(**x).pooler_output[0], dim=0) for x in tokens]
        mean = sum(units) / 2
        torch.testing.assert_close(actual, mean / mean.norm())
        # averaging before normalising, or forgetting a template, gives another vector
        assert (actual - units[0]).norm() > 0.01


def test_rows_of_text_follow_the_names_in_unit_length(teacher_of):
    teacher = teacher_of("dual-vit")
    forward = teacher.encode_text(["cat", "dog", "owl"], ENSEMBLE_TEMPLATES)
    assert forward.dtype == torch.float32 and forward.shape == (3, PROJECTION)
    torch.testing.assert_close(forward.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(teacher.encode_text(["owl", "dog", "cat"], ENSEMBLE_TEMPLATES), forward.flip(0))
    assert (forward[0] - forward[1]).norm() > 0.01


def test_many_names_are_embedded_in_batches(teacher_of, monkeypatch):
    teacher, class_names = teacher_of("clip"), ["cat", "dog photo", "owl", "great white shark", "a dog"]
    whole = teacher.encode_text(class_names)
    monkeypatch.setattr(teacher_text, "TEXT_BATCH_SIZE", 2)
    torch.testing.assert_close(teacher.encode_text(class_names), whole)


def test_prompts_longer_than_the_text_tower_are_cut(teacher_of):
    long_name = " ".join(["dog"] * 50)
    assert teacher_of("dual-vit").encode_text([long_name]).isfinite().all()


def test_braces_in_names_and_doubled_braces_in_templates_are_text(teacher_of):
    teacher = teacher_of("clip")
    literal = teacher.encode_text(["a { cat } dog"], ["{}"])
    torch.testing.assert_close(teacher.encode_text(["cat"], ["a {{ {class} }} dog"]), literal)
    torch.testing.assert_close(teacher.encode_text(["{ cat }"], ["a {} dog"]), literal)


@pytest.mark.parametrize(
    ("class_names", "templates", "message"),
    [
        ([], ["a {}"], "`class_names` to be one or more strings"),
        ("cat", ["a {}"], "`class_names` to be one or more strings.*'cat'"),
        (["cat", " "], ["a {}"], "`class_names` .* none blank"),
        (["cat", 3], ["a {}"], "`class_names` .* got .*3"),
        (["cat", "dog", "cat"], ["a {}"], "more than once: cat"),
        (["cat"], [], "`templates` to be one or more strings"),
        (["cat"], "a {}", "`templates` to be one or more strings"),
        (["cat"], ["a {}", "a photo"], "'{}' or '{class}' and no other field, got 'a photo'"),
        (["cat"], ["a {name}"], "no other field, got 'a {name}'"),
        (["cat"], ["a {} {1}"], "no other field, got"),
        (["cat"], ["a {"], "'{}' or '{class}', got 'a {'"),
    ],
)
@pytest.mark.parametrize("name", ["clip", "vit-classifier"])
def test_bad_names_and_templates_are_refused(teacher_of, name, class_names, templates, message):
    with pytest.raises(ValueError, match=message):
        teacher_of(name).encode_text(class_names, templates)


def test_text_that_overflows_is_refused_by_prompt(tmp_path):
    teacher = load_teacher(save("dual-vit", tmp_path), device="cpu")
    with torch.no_grad():
        teacher.model.text_model.embeddings.word_embeddings.weight[WORDS.index("dog")] = math.inf
    with pytest.raises(ValueError, match=r"finite text embeddings .* infinity in 'a photo of a dog\.'\."):
        teacher.encode_text(["cat", "dog"])


# Classifiers


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_class_embeddings_of_a_classifier_are_its_unit_weights(teacher_of, name):
    teacher = teacher_of(name)
    head = teacher.model.cls_classifier if name == "deit-distilled" else teacher.model.classifier
    expected = nn.functional.normalize(head.weight, dim=-1)
    assert not teacher.has_text and teacher.tokenizer is None and teacher.logit_scale == 100.0
    torch.testing.assert_close(teacher.encode_text(teacher.class_names), expected)
    torch.testing.assert_close(teacher.encode_text(["maillot", "cat"]), expected[[4, 0]])


def test_labels_are_looked_up_exactly_then_ignoring_case(teacher_of):
    teacher = teacher_of("vit-classifier")
    weights = nn.functional.normalize(teacher.model.classifier.weight, dim=-1)
    torch.testing.assert_close(teacher.encode_text(["Owl", "CAT", "owl", "DOG", "dog"]), weights[[3, 0, 6, 7, 1]])


def test_labels_that_occur_twice_are_told_apart_by_index(teacher_of):
    teacher = teacher_of("vit-classifier")
    weights = nn.functional.normalize(teacher.model.classifier.weight, dim=-1)
    assert teacher.class_names == ["cat", "dog", "crane (2)", "Owl", "maillot", "crane (5)", "owl", "DOG"]
    torch.testing.assert_close(teacher.encode_text(["Crane (5)", "crane (2)"]), weights[[5, 2]])
    for name in ("crane", "CRANE"):
        with pytest.raises(ValueError, match=rf"'{name}' \(ambiguous: 'crane \(2\)' or 'crane \(5\)'\)"):
            teacher.encode_text(["cat", name])
    with pytest.raises(ValueError, match=r"'OWL' \(ambiguous: 'Owl' or 'owl'\)"):
        teacher.encode_text(["OWL"])


def test_unknown_labels_are_listed_up_to_five(teacher_of):
    wrong = ["horse", "cow", "hen", "pig", "goat", "duck", "Dog"]
    with pytest.raises(ValueError) as raised:
        teacher_of("vit-classifier").encode_text(["cat", *wrong])
    message = str(raised.value)
    assert "among the 8 labels" in message and "got 7 of 8 wrong" in message
    assert (
        "'horse' (unknown), 'cow' (unknown), 'hen' (unknown), 'pig' (unknown), 'goat' (unknown) and 2 more" in message
    )


def test_one_label_in_two_spellings_is_refused(teacher_of):
    with pytest.raises(ValueError, match=r"'Cat' \(given twice\)"):
        teacher_of("vit-classifier").encode_text(["cat", "Cat"])


def test_templates_given_to_a_classifier_are_warned_about_once(tmp_path, caplog):
    teacher = load_teacher(save("vit-classifier", tmp_path), device="cpu")
    with caplog.at_level(logging.WARNING, logger="apm_hf.teachers"):
        default = teacher.encode_text(["cat"])
        teacher.encode_text(["cat"], ["a photo of a {}."])
        assert not caplog.records
        torch.testing.assert_close(teacher.encode_text(["cat"], ["a {}"]), default)
        teacher.encode_text(["cat"], ["the {}"])
    assert [record.message for record in caplog.records if "`templates` are ignored" in record.message] == [
        f"Teacher '{tmp_path}' has no text tower: `templates` are ignored."
    ]


def test_a_head_over_more_than_the_class_token_gives_no_class_embeddings(teacher_of):
    teacher = teacher_of("dinov2-classifier")
    assert teacher.class_names is None
    with pytest.raises(ValueError, match=r"reads 64 values .*mean patch.*not the 32 of `image_embeds`"):
        teacher.encode_text(["cat"])


@pytest.mark.parametrize("name", ["vit", "deit", "dinov2", "dinov2-registers"])
def test_a_bare_model_knows_no_class_names(teacher_of, name):
    assert teacher_of(name).class_names is None and not teacher_of(name).has_text
    with pytest.raises(ValueError, match="neither a text tower nor a classifier"):
        teacher_of(name).encode_text(["cat"])


# Loading


def test_a_half_precision_checkpoint_is_run_in_float32_on_the_cpu(tmp_path):
    model = build_model("vit-classifier").half()
    teacher = load_teacher(str(save("vit-classifier", tmp_path, model=model)), device="cpu")
    assert teacher.dtype == torch.float32 and teacher.device == torch.device("cpu") and teacher.name == str(tmp_path)
    expected = nn.functional.normalize(model.classifier.weight.float(), dim=-1)
    torch.testing.assert_close(teacher.encode_text(teacher.class_names), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16"])
def test_targets_are_float32_whatever_the_teacher_is_run_in(tmp_path, dtype):
    teacher = load_teacher(save("clip", tmp_path), device="cpu", dtype=dtype)
    exact = load_teacher(tmp_path, device="cpu")
    assert teacher.dtype == torch.bfloat16
    output, expected = (x.encode_images(pixel_values=noise(2, 3, SIZE, SIZE), layers=[1]) for x in (teacher, exact))
    assert all(value.dtype == torch.float32 for value in output.values())
    assert nn.functional.cosine_similarity(output.image_embeds, expected.image_embeds).min() > 0.99
    text_embeds = teacher.encode_text(["cat"])
    assert text_embeds.dtype == torch.float32
    assert nn.functional.cosine_similarity(text_embeds, exact.encode_text(["cat"])).min() > 0.99


def test_the_crop_of_the_processor_is_the_image_size_not_that_of_the_config(tmp_path):
    save("dinov2", tmp_path)
    BitImageProcessorPil(size={"shortest_edge": 20}, crop_size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    teacher = load_teacher(tmp_path, device="cpu")
    assert teacher.model.config.image_size == SIZE and teacher.image_size == 16
    assert teacher.encode_images(photo()).features.shape == (1, 2, 2, WIDTH)


@pytest.mark.parametrize(
    ("name", "got"), [("bert", "bert"), ("clip-text", "clip_text_model"), ("clip-vision", "clip_vision_model")]
)
def test_families_that_give_no_targets_are_refused(tmp_path, name, got):
    build_model(name).save_pretrained(tmp_path)
    with pytest.raises(ValueError) as raised:
        load_teacher(tmp_path)
    supported = (
        "clip, convnext, convnextv2, deit, dinov2, dinov2_with_registers, dinov3_convnext, dinov3_vit, efficientnet, "
        "ijepa, metaclip_2, regnet, resnet, siglip, siglip2, timm_wrapper, vision-text-dual-encoder, vit, vit_mae"
    )
    assert str(raised.value) == (
        f"Expected teacher '{tmp_path}' to be one of {supported}, got '{got}'; "
        "make a teacher of any other module by Teacher.from_module."
    )


def test_an_unknown_vision_tower_in_a_dual_encoder_is_refused(tmp_path):
    save("dual-vit", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    edit_config(tmp_path, vision_config=config["vision_config"] | {"model_type": "beit"})
    with pytest.raises(ValueError, match=r"\(vision tower\)' to be one of clip_vision_model, .* got 'beit'"):
        load_teacher(tmp_path)


def test_a_type_that_transformers_does_not_know_is_refused(tmp_path):
    save("vit", tmp_path)
    edit_config(tmp_path, model_type="brand-new")
    with pytest.raises(ValueError, match="(?s)configuration of teacher.*brand-new"):
        load_teacher(tmp_path)


def test_missing_weights_are_not_made_up(tmp_path):
    save("vit", tmp_path)
    edit_config(tmp_path, architectures=["ViTForImageClassification"])
    with pytest.raises(ValueError, match="lacks weights of ViTForImageClassification: classifier.bias"):
        load_teacher(tmp_path)


@pytest.mark.parametrize(
    ("name", "pattern", "error", "message"),
    [
        ("vit", "config.json", (OSError, ValueError), "Could not load the configuration of teacher"),
        ("vit", "model.safetensors", OSError, "Could not load the model of teacher"),
        ("vit", "preprocessor_config.json", OSError, "Could not load the image processor of teacher"),
        ("dual-vit", "tokenizer*", (OSError, ValueError), "tokenizer"),
        ("clip", "tokenizer*", (OSError, ValueError), "tokenizer"),
    ],
)
def test_missing_files_are_named(tmp_path, name, pattern, error, message):
    for path in save(name, tmp_path).glob(pattern):
        path.unlink()
    with pytest.raises(error, match=message) as raised:
        load_teacher(tmp_path)
    assert str(tmp_path) in str(raised.value)


@pytest.mark.parametrize("family", [ViTModel, DeiTModel])
def test_a_bare_model_needs_no_pooler(tmp_path, family):
    model = randomise(family(family.config_class(**VISION), add_pooling_layer=False))
    teacher = load_teacher(save("vit", tmp_path, model=model), device="cpu")
    with torch.no_grad():
        expected = model(pixel_values=noise(1, 3, SIZE, SIZE)).last_hidden_state[:, 0]
    output = teacher.encode_images(pixel_values=noise(1, 3, SIZE, SIZE))
    torch.testing.assert_close(output.image_embeds, expected)


def test_a_model_that_is_not_there_is_named_with_the_hubs_message(tmp_path):
    with pytest.raises(OSError, match="Could not load the configuration of teacher .*nowhere'.\n.*nowhere"):
        load_teacher(tmp_path / "nowhere")


def test_a_new_family_is_one_entry(tmp_path, monkeypatch):
    class NewConfig(ViTConfig):
        model_type = "brand-new-vit"

    class NewModel(ViTModel):
        config_class = NewConfig

    model = NewModel(NewConfig(**VISION), add_pooling_layer=False).eval()
    monkeypatch.setitem(teacher_vision.VISION_TOWERS, "brand-new-vit", VisionTower(lambda tower: 1))
    vision = teacher_vision.FamilyVision(model)
    teacher = teachers.Teacher("new", model, build_image_processor("vit"), vision)
    pixel_values = noise(2, 3, SIZE, SIZE)
    with torch.no_grad():
        expected = model(pixel_values=pixel_values).last_hidden_state
    output = teacher.encode_images(pixel_values=pixel_values)
    torch.testing.assert_close(output.image_embeds, expected[:, 0])
    torch.testing.assert_close(output.features.flatten(1, 2), expected[:, 1:])


# Real teachers


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deit-tiny", "deit-tiny-lit"])
def test_a_real_teacher_recognises_photos(shared_dir, name):
    parquet = pytest.importorskip("pyarrow.parquet")
    (path,) = (shared_dir / "data" / "imagenet_sample1k").rglob("*.parquet")
    rows = parquet.read_table(path, columns=["image", "label"]).to_pylist()[::15][:64]
    images = [Image.open(io.BytesIO(row["image"]["bytes"])) for row in rows]
    class_names = load_teacher(shared_dir / "teachers" / "deit-tiny", device="cpu").class_names
    teacher = load_teacher(shared_dir / "teachers" / name, device="cpu")
    logits = classify(teacher.encode_images(images).image_embeds, teacher.encode_text(class_names))
    correct = logits.argmax(dim=1) == torch.tensor([row["label"] for row in rows])
    assert len(correct) == 64 and correct.float().mean() > 0.6
