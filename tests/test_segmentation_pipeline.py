"""Dense labels from end to end: processors put maps where they belong, heads train, pipelines name parts of pictures.

Legend: (H, W) a picture, S side of the model's input, K classes.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForSemanticSegmentation, pipeline
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.utils import is_torchvision_available

import apm_hf.image_processing_pil_apm as processing
from apm_hf import APMForSemanticSegmentation, APMImageProcessor, APMImageProcessorPil, APMModel
from apm_hf.assets import DEMO_MODEL
from apm_hf.data.scenes import PART_NAMES, SceneDataset
from apm_hf.evaluation.masks.probes import LinearProbe, MeanIoU, sample_locations, segmentation_model
from apm_hf.modeling_apm import IGNORE_INDEX
from apm_hf.position_encoding import grid_coordinates
from fixtures_tiny import FEATURE_SIZE, STUDENT_SIZE, student_config

NUM_TRAIN, NUM_TEST, NUM_LOCATIONS = 48, 8, 96  # scenes, scenes, pixels of each
TRAIN_SEED, TEST_SEED = 12, 13  # the embedded models have seen scenes of the seeds 0 and 1
SIDE = 20  # of the processors below
CROP = {"do_center_crop": True, "crop_size": {"height": SIDE, "width": SIDE}}
# Ways from a picture of any shape to a square.
GEOMETRIES = {
    "squeezed": {"size": {"height": SIDE, "width": SIDE}},
    "cropped": {"size": {"shortest_edge": 24}, **CROP},
    "squeezed, then cropped": {"size": {"height": 25, "width": 31}, **CROP},
    "cropped and padded": {"size": {"shortest_edge": 13}, **CROP},  # the short side is smaller than the crop
    "padded around": {"size": {"height": 13, "width": 16}, **CROP},
    "padded behind": {
        "size": {"height": 15, "width": 12},
        "do_pad": True,
        "pad_size": {"height": SIDE, "width": SIDE},
    },
    "as it is": {"do_resize": False, **CROP},
}
each_geometry = pytest.mark.parametrize("options", GEOMETRIES.values(), ids=GEOMETRIES)
needs_torchvision = pytest.mark.skipif(not is_torchvision_available(), reason="torchvision is not installed")


@pytest.fixture(params=[APMImageProcessorPil, pytest.param(APMImageProcessor, marks=needs_torchvision)])
def backend(request):
    return request.param


# ---- maps through image processors


def striped(height: int, width: int) -> np.ndarray:
    """`(height, width)`, a different number of 1..6 for each of 2 x 3 unequal blocks."""
    rows, cols = np.digitize(np.arange(height) / height, [0.4]), np.digitize(np.arange(width) / width, [0.3, 0.55])
    return (1 + 3 * rows[:, None] + cols).astype(np.uint8)


def as_picture(labels: np.ndarray) -> Image.Image:
    """Grey levels that tell the label, even after interpolation inside a block."""
    return Image.fromarray(np.repeat((labels * 40)[..., None], 3, axis=2))


def read_labels(pixel_values: Tensor) -> Tensor:
    """`(B, S, S)`: the label that grey levels tell, 0 for black."""
    return (pixel_values[:, 0] * 255 / 40).round().long()


def processor(backend, options, **more):
    return backend(do_normalize=False, **options, **more)


@each_geometry
@pytest.mark.parametrize("size", [(40, 40), (30, 52), (61, 33)])
def test_label_maps_become_what_pictures_become(backend, options, size):
    labels = striped(*size)
    batch = processor(backend, options, resample=0)(as_picture(labels), labels, return_tensors="pt")
    expected = read_labels(batch["pixel_values"])
    assert expected.shape == batch["labels"].shape == (1, SIDE, SIDE) and batch["labels"].dtype == torch.int64
    assert torch.equal(batch["labels"], expected.masked_fill(expected == 0, IGNORE_INDEX))


@each_geometry
@pytest.mark.parametrize("size", [(40, 40), (30, 52), (61, 33)])
def test_answers_land_where_they_were_seen(backend, options, size):
    labels = striped(*size)
    image_processor = processor(backend, options)
    seen = read_labels(image_processor(as_picture(labels), return_tensors="pt")["pixel_values"])
    outputs = SimpleNamespace(logits=F.one_hot(seen, 7).permute(0, 3, 1, 2).float())
    (answer,) = image_processor.post_process_semantic_segmentation(outputs, [size], outside=IGNORE_INDEX)
    assert answer.shape == size and answer.dtype == torch.int64
    known = (answer != IGNORE_INDEX).numpy()
    resized = np.array(resized_size(options, size))
    pixel = size / resized  # of what is seen, in pixels of the picture
    rows, cols = np.flatnonzero(known.any(axis=1)), np.flatnonzero(known.any(axis=0))
    assert known[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1].all(), "one rectangle is seen"
    assert np.abs([len(rows), len(cols)] - np.minimum(SIDE / resized, 1) * size).max() <= 1
    for places, length, scale in zip((rows, cols), size, pixel, strict=True):
        assert abs(places[0] - (length - 1 - places[-1])) <= 1 + scale, "as much is cut off at either end"
    wrong = (answer.numpy() != labels) & known
    assert known.any() and not (wrong & ~near_borders(labels, np.ceil(1.5 * pixel).astype(int))).any()


def resized_size(options, size: tuple[int, int]) -> tuple[int, int]:
    if not options.get("do_resize", True):
        return size
    edge = options["size"].get("shortest_edge")
    height, width = (int(side * edge / min(size)) for side in size) if edge else options["size"].values()
    return height, width


def near_borders(labels: np.ndarray, reach: np.ndarray) -> np.ndarray:
    """Whether another label, or the end of the picture, lies within `reach` (rows, columns)."""
    height, width = labels.shape
    padded = np.pad(labels, 1)
    near = np.ones(labels.shape, dtype=bool)
    for r in range(height):
        for c in range(width):
            window = padded[max(0, r + 1 - reach[0]) : r + 2 + reach[0], max(0, c + 1 - reach[1]) : c + 2 + reach[1]]
            near[r, c] = len(np.unique(window)) > 1
    return near


def test_resized_maps_are_those_of_transformers_other_models(backend, monkeypatch):
    logits = torch.randn(2, 5, 6, 6)
    sizes = [(31, 17), (6, 6)]
    image_processor = processor(backend, GEOMETRIES["squeezed"])
    pairs = zip(logits, sizes, strict=True)
    expected = [F.interpolate(one[None], size, mode="bilinear")[0].argmax(dim=0) for one, size in pairs]
    outputs = SimpleNamespace(logits=logits)
    for strip in (processing.STRIP_ELEMENTS, 5 * 17 * 4, 1):  # so many logits at a time, at least a row of them
        monkeypatch.setattr(processing, "STRIP_ELEMENTS", strip)
        for target_sizes in (sizes, torch.tensor(sizes)):
            answers = image_processor.post_process_semantic_segmentation(outputs, target_sizes)
            assert all(torch.equal(*pair) for pair in zip(answers, expected, strict=True))
    unresized = image_processor.post_process_semantic_segmentation(outputs)
    assert torch.equal(torch.stack(unresized), logits.argmax(dim=1))
    with pytest.raises(ValueError, match=r"target_sizes: expected 2 \(height, width\), got 1"):
        image_processor.post_process_semantic_segmentation(outputs, sizes[:1])


def test_scores_are_the_resized_logits_of_their_maps(backend, monkeypatch):
    monkeypatch.setattr(processing, "STRIP_ELEMENTS", 5 * 17 * 4)  # more strips than one
    outputs, size = SimpleNamespace(logits=torch.randn(1, 5, 6, 6)), (31, 17)
    squeezed, cropped = (processor(backend, GEOMETRIES[name]) for name in ("squeezed", "cropped"))
    (unresized,) = squeezed.post_process_semantic_segmentation(outputs, return_segmentation_scores=True)
    assert torch.equal(unresized.segmentation_scores, outputs.logits[0])
    (result,) = squeezed.post_process_semantic_segmentation(outputs, [size], return_segmentation_scores=True)
    expected = F.interpolate(outputs.logits, size, mode="bilinear")[0]
    torch.testing.assert_close(result.segmentation_scores, expected)
    for answers, options in ((unresized, {}), (result, {"target_sizes": [size]})):
        (labels,) = squeezed.post_process_semantic_segmentation(outputs, **options)
        assert torch.equal(answers.segmentation, labels) and torch.equal(
            answers.segmentation, answers.segmentation_scores.argmax(dim=0)
        )
    (result,) = cropped.post_process_semantic_segmentation(
        outputs, [size], outside=IGNORE_INDEX, return_segmentation_scores=True
    )
    unseen = result.segmentation == IGNORE_INDEX
    assert unseen.any() and torch.equal(result.segmentation_scores.isnan(), unseen.expand(5, -1, -1))


def test_pictures_that_a_crop_cuts_are_refused_unless_told_what_to_write_there(backend):
    image_processor = processor(backend, GEOMETRIES["cropped"])
    outputs = SimpleNamespace(logits=torch.randn(1, 5, 6, 6))
    with pytest.raises(ValueError, match=r"cuts \d+ pixels off a picture of \(40, 60\).*`outside`.*do_center_crop"):
        image_processor.post_process_semantic_segmentation(outputs, [(40, 60)])
    uncut = processor(backend, {**GEOMETRIES["cropped"], "size": {"shortest_edge": SIDE}})
    assert uncut.post_process_semantic_segmentation(outputs, [(40, 40)])[0].shape == (40, 40)


def test_label_maps_come_in_many_forms(backend):
    maps = [striped(30, 40), striped(24, 24)]
    pictures = [as_picture(labels) for labels in maps]
    image_processor = processor(backend, GEOMETRIES["cropped"])
    expected = image_processor(pictures, maps, return_tensors="pt")
    assert expected["labels"].shape == (2, SIDE, SIDE)
    palette = Image.fromarray(maps[1])
    palette.putpalette(list(range(255, -1, -1)) * 3)  # whatever the colours: the indices are the labels
    for given in (
        [torch.from_numpy(maps[0]), palette],
        [Image.fromarray(maps[0].astype(np.int32)), maps[1].astype(np.int64)],
    ):
        batch = image_processor(pictures, segmentation_maps=given, return_tensors="pt")
        assert torch.equal(batch["labels"], expected["labels"])
        assert torch.equal(batch["pixel_values"], expected["pixel_values"])
    stacked = image_processor([pictures[0]] * 2, np.stack([maps[0]] * 2), return_tensors="pt")
    assert torch.equal(stacked["labels"], expected["labels"][:1].expand(2, -1, -1))
    finer = image_processor(pictures, [labels.repeat(3, 0).repeat(3, 1) for labels in maps], return_tensors="pt")
    assert torch.equal(finer["labels"], expected["labels"]), "a map may be finer than its picture"
    assert "labels" not in image_processor(pictures)
    half = image_processor(pictures[0], maps[0], crop_size={"height": 10, "width": 10}, return_tensors="pt")
    assert torch.equal(half["labels"], expected["labels"][:1, 5:15, 5:15]), "options of a call count"


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        ([np.zeros((4, 4), int)] * 2, "expected one for each of 1 images, got 2"),
        (np.zeros((4, 4)), r"expected integers \(rows, cols\), got float64 \(4, 4\)"),
        (Image.new("RGB", (4, 4)), r"got uint8 \(4, 4, 3\)"),
        ("map.png", "expected integers"),
    ],
)
def test_label_maps_that_are_none_are_refused(backend, maps, message):
    with pytest.raises(ValueError, match=f"segmentation_maps: .*{message}"):
        processor(backend, GEOMETRIES["squeezed"])(as_picture(striped(30, 30)), maps)


# ---- training


def tiny_segmenter(**options) -> APMForSemanticSegmentation:
    torch.manual_seed(0)
    return APMForSemanticSegmentation(student_config(num_labels=3, initializer_range=0.3), **options)


def test_with_a_frozen_model_the_classifier_alone_is_trained_and_queries_are_chunked(monkeypatch):
    pixel_values, labels = torch.randn(2, 3, STUDENT_SIZE, STUDENT_SIZE), torch.randint(3, (2, 12, 10))
    free, frozen = tiny_segmenter(), tiny_segmenter()
    frozen.apm.requires_grad_(False)
    calls, forward = [], type(frozen.apm.decoder).forward

    def spy(decoder, trigger_column, rows, columns, *arguments):
        calls.append((decoder, rows.shape[1] * columns.shape[2], torch.is_grad_enabled()))
        return forward(decoder, trigger_column, rows, columns, *arguments)

    monkeypatch.setattr(type(frozen.apm.decoder), "forward", spy)
    monkeypatch.setattr("apm_hf.modeling_apm.CHUNK_ELEMENTS", 2 * 32 * 50)  # 50 of 120 locations at a time
    losses = [model(pixel_values, labels=labels, output_size=(12, 10)).loss for model in (free, frozen)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for name in ("weight", "bias"):
        torch.testing.assert_close(getattr(free.classifier, name).grad, getattr(frozen.classifier, name).grad)
    assert all(parameter.grad is None for parameter in frozen.apm.parameters())
    assert free.apm.decoder.feature_head.weight.grad.abs().max() > 0
    assert [call[1:] for call in calls if call[0] is free.apm.decoder] == [(120, True)]
    chunks = [call[1:] for call in calls if call[0] is frozen.apm.decoder]
    assert chunks == [(50, False), (50, False), (20, False)]


def test_gradients_reach_the_pixels_of_a_frozen_model():
    model = tiny_segmenter()
    model.requires_grad_(False)
    pixel_values = torch.randn(1, 3, STUDENT_SIZE, STUDENT_SIZE, requires_grad=True)
    model(pixel_values).logits.sum().backward()
    assert pixel_values.grad.abs().max() > 0


def test_a_processed_batch_trains_a_segmenter():
    labels = np.zeros((STUDENT_SIZE, STUDENT_SIZE), dtype=np.uint8)
    labels[:, 10:], labels[:4] = 2, 255
    picture = Image.fromarray(np.where(labels == 2, 230, 20).astype(np.uint8))
    size = {"height": STUDENT_SIZE, "width": STUDENT_SIZE}
    batch = APMImageProcessorPil(size=size)(picture, labels, return_tensors="pt")
    # With local patches: what decides here is the colour of a place.
    config = student_config(num_labels=3, initializer_range=0.3, local_patch=True)
    model = APMForSemanticSegmentation(config, output_size=labels.shape)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(60):
        losses.append(model(**batch).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.1 * losses[0]
    predicted = model(batch["pixel_values"]).logits[0].argmax(0).numpy()
    assert predicted.shape == labels.shape and (predicted == labels)[labels != 255].mean() > 0.95


def test_a_model_fed_with_embeddings_answers_at_any_resolution():
    model = APMForSemanticSegmentation(
        student_config(num_labels=3, initializer_range=0.3, trigger_source="embedding", local_patch=False)
    )
    trigger_column = torch.randn(2, FEATURE_SIZE)
    logits = model(trigger_column=trigger_column, output_size=(5, 7)).logits
    features = model.apm.query(trigger_column, grid_coordinates(5, 7)).last_hidden_state
    torch.testing.assert_close(logits.flatten(2).transpose(1, 2), model.classifier(features))
    with pytest.raises(ValueError, match="expected trigger_column, got none"):
        model(torch.randn(2, 3, STUDENT_SIZE, STUDENT_SIZE))


# ---- finer maps by default


def test_output_size_of_a_model_is_used_where_a_call_names_none(tmp_path):
    pixel_values = torch.randn(1, 3, STUDENT_SIZE, STUDENT_SIZE)
    model = tiny_segmenter(output_size=(6, 8)).eval()
    expected = model(pixel_values, output_size=(6, 8)).logits
    assert torch.equal(model(pixel_values).logits, expected)
    assert model(pixel_values, output_size=(2, 2)).logits.shape[-2:] == (2, 2)
    model.save_pretrained(tmp_path)
    assert "output_size" not in (tmp_path / "config.json").read_text()
    assert AutoModelForSemanticSegmentation.from_pretrained(tmp_path)(pixel_values).logits.shape[-2:] == (3, 3)
    finer = AutoModelForSemanticSegmentation.from_pretrained(tmp_path, output_size=(6, 8))
    torch.testing.assert_close(finer(pixel_values).logits, expected)
    finer.output_size = None
    assert finer(pixel_values).logits.shape[-2:] == (3, 3)


# ---- the pipeline


@torch.no_grad()
def fitted(model: APMModel, image_processor) -> APMForSemanticSegmentation:
    """With a probe for the parts of scenes."""
    generator = torch.Generator().manual_seed(0)
    features, labels = [], []
    for scene in SceneDataset(NUM_TRAIN, seed=TRAIN_SEED):
        picked = sample_locations(scene["part_mask"], NUM_LOCATIONS, generator)
        pixel_values = image_processor(scene["image"], return_tensors="pt")["pixel_values"]
        features.append(model(pixel_values, grid_coordinates(96, 96)[picked]).last_hidden_state[0])
        labels.append(torch.from_numpy(scene["part_mask"]).flatten()[picked])
    probe = LinearProbe.fit(torch.cat(features), torch.cat(labels), num_classes=len(PART_NAMES), max_iter=100)
    return segmentation_model(model, probe, dict(enumerate(PART_NAMES)))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The embedded APM, and one with random weights, with their probes; as they are saved."""
    image_processor = AutoImageProcessor.from_pretrained(DEMO_MODEL)
    model = APMModel.from_pretrained(DEMO_MODEL).eval()
    torch.manual_seed(0)
    models = {"distilled": model, "random": APMModel(model.config).eval()}
    folders = {}
    for name, candidate in models.items():
        folders[name] = tmp_path_factory.mktemp(name)
        fitted(candidate, image_processor).save_pretrained(folders[name])
        image_processor.save_pretrained(folders[name])
    return folders


def label_map(answers) -> np.ndarray:
    """`(H, W)` from a pipeline's masks, which must cover every pixel once."""
    masks = np.stack([np.asarray(answer["mask"]) for answer in answers])
    assert set(np.unique(masks)) <= {0, 255} and ((masks == 255).sum(axis=0) == 1).all()
    return np.array([PART_NAMES.index(answer["label"]) for answer in answers])[masks.argmax(axis=0)]


def scores(pipe, *, image_size: int) -> tuple[float, float]:
    """Mean IoU of the parts, and IoU of everything that is not background with all that is named otherwise."""
    parts, shared, either = MeanIoU(len(PART_NAMES)), 0, 0
    for scene in SceneDataset(NUM_TEST, seed=TEST_SEED, image_size=image_size):
        found, truth = label_map(pipe(scene["image"])), scene["part_mask"]
        parts.update(found, truth)
        shared += ((found > 0) & (truth > 0)).sum()
        either += ((found > 0) | (truth > 0)).sum()
    return parts.mean_iou, shared / either


@pytest.mark.parametrize("model_kwargs", [None, {"output_size": (96, 96)}], ids=["grid", "finer"])
def test_pipeline_finds_objects_far_better_than_random_weights_do(folders, model_kwargs):
    pipes = [pipeline("image-segmentation", str(folder), model_kwargs=model_kwargs) for folder in folders.values()]
    learnt, control = (scores(pipe, image_size=120) for pipe in pipes)
    # Parts are many and the test scenes few; how much better they are found depends on which weights were drawn.
    assert learnt[0] > control[0] and learnt[1] > control[1] + 0.15


def test_pipeline_answers_in_the_pictures_size_alone_and_in_batches(folders):
    pipe = pipeline("image-segmentation", str(folders["distilled"]))
    scene = SceneDataset(3, seed=TEST_SEED, image_size=120)[2]["image"]
    pictures = [scene, scene.resize((150, 100)), scene.crop((0, 20, 110, 120))]
    alone = [pipe(picture) for picture in pictures]
    for picture, answers in zip(pictures, alone, strict=True):
        assert len(answers) > 1 and all(answer["mask"].size == picture.size for answer in answers)
        assert {answer["label"] for answer in answers} <= set(PART_NAMES)
        label_map(answers)
    together = pipe(pictures, batch_size=2)
    for first, second in zip(alone, together, strict=True):
        assert (label_map(first) == label_map(second)).mean() > 0.999  # products of other batch sizes round otherwise


def test_pipeline_gives_finer_maps_from_finer_queries(folders):
    pipe = pipeline("image-segmentation", str(folders["distilled"]))
    scene = SceneDataset(3, seed=TEST_SEED)[2]["image"]
    coarse = label_map(pipe(scene))
    pipe.model.output_size = (96, 96)
    fine = label_map(pipe(scene))
    with torch.no_grad():
        logits = pipe.model(pipe.image_processor(scene, return_tensors="pt")["pixel_values"]).logits
    assert (fine == logits[0].argmax(0).numpy()).mean() > 0.999 and (fine != coarse).any()
