"""Probes against scikit-learn's own, sampling and scores against counting, and the example that fits a probe."""

import importlib.util
import json
import logging
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import jaccard_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from transformers import AutoModel

import apm_hf.evaluation.masks.probes as probes
from apm_hf import APMForSemanticSegmentation
from apm_hf.data.scenes import PART_NAMES, SceneDataset
from apm_hf.evaluation.masks.probes import (
    ABSENT_BIAS,
    KNNProbe,
    LinearProbe,
    MeanIoU,
    sample_locations,
    segmentation_model,
)
from apm_hf.position_encoding import grid_coordinates
from fixtures_tiny import FEATURE_SIZE, STUDENT_SIZE, student

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "train_segmentation.py"


def clouds(num_classes: int, *, num: int = 300, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features `(num, 6)` of overlapping classes, far from the origin and at different scales, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(num_classes, 6, generator=torch.Generator().manual_seed(9))
    labels = torch.arange(num) % num_classes
    features = centres[labels] + torch.randn(num, 6, generator=generator)
    return features * torch.tensor([1.0, 10, 0.1, 1, 5, 1]) + torch.tensor([0.0, 50, 0, -3, 0, 1]), labels


# ---- linear probes


@pytest.mark.parametrize("num_classes", [2, 3, 5])
def test_linear_probe_is_scikit_learns_on_standardised_features(num_classes):
    features, labels = clouds(num_classes)
    held_out, _ = clouds(num_classes, seed=1)
    probe = LinearProbe.fit(features, labels, num_classes=num_classes, regularisation=0.01)
    reference = make_pipeline(StandardScaler(), LogisticRegression(C=1 / (0.01 * len(labels)), max_iter=1000))
    reference.fit(features.double().numpy(), labels.numpy())
    expected = reference.predict_proba(held_out.double().numpy())
    np.testing.assert_allclose(probe.logits(held_out).softmax(-1).numpy(), expected, atol=2e-3)
    assert probe.weight.shape == (num_classes, 6) and probe.bias.shape == (num_classes,)
    assert probe.weight.dtype == probe.bias.dtype == torch.float32
    assert (probe.predict(held_out.reshape(2, 150, 6)) == probe.predict(held_out).reshape(2, 150)).all()


def test_units_and_number_of_the_features_play_no_role():
    features, labels = clouds(3)
    first = LinearProbe.fit(features, labels, num_classes=3)
    scaled = LinearProbe.fit(features * 1000 + 7, labels, num_classes=3)
    torch.testing.assert_close(scaled.logits(features * 1000 + 7), first.logits(features), rtol=0, atol=0.02)
    repeated = LinearProbe.fit(features.repeat(4, 1), labels.repeat(4), num_classes=3)
    torch.testing.assert_close(repeated.logits(features), first.logits(features), rtol=0, atol=0.02)
    weak = LinearProbe.fit(features, labels, num_classes=3, regularisation=10.0)
    assert weak.weight.abs().sum() < 0.1 * first.weight.abs().sum()


def test_classes_that_training_did_not_show_are_never_predicted():
    features, labels = clouds(3)
    probe = LinearProbe.fit(features, labels * 2 + 1, num_classes=7)  # 1, 3 and 5
    plain = LinearProbe.fit(features, labels, num_classes=3)
    assert torch.equal(probe.weight[[1, 3, 5]], plain.weight) and torch.equal(probe.bias[[1, 3, 5]], plain.bias)
    absent = [0, 2, 4, 6]
    assert (probe.weight[absent] == 0).all() and (probe.bias[absent] == ABSENT_BIAS).all()
    assert torch.tensor(ABSENT_BIAS).half().isfinite()
    far = features * 100
    assert set(probe.predict(far).unique().tolist()) <= {1, 3, 5}
    assert probe.logits(features).softmax(-1)[:, absent].max() == 0


def test_a_single_class_is_always_predicted():
    features, _ = clouds(3)
    probe = LinearProbe.fit(features, torch.full((300,), 2), num_classes=4)
    assert (probe.predict(features * 1e3) == 2).all()


def test_constant_features_say_nothing():
    features, labels = clouds(3)
    constant = torch.cat([features, torch.full((300, 1), 4.2)], dim=1)
    probe = LinearProbe.fit(constant, labels, num_classes=3)
    assert (probe.weight[:, 6] == 0).all() and probe.weight.isfinite().all()
    torch.testing.assert_close(probe.weight[:, :6], LinearProbe.fit(features, labels, num_classes=3).weight)


def test_fits_that_stop_early_are_logged(monkeypatch):
    features, labels = clouds(5)
    messages = []
    monkeypatch.setattr(probes.logger, "warning", messages.append)
    LinearProbe.fit(features, labels, num_classes=5)
    assert not messages
    LinearProbe.fit(features, labels, num_classes=5, max_iter=2)
    assert "did not converge in 2 iterations" in messages[0]


@pytest.mark.parametrize("fit", [LinearProbe.fit, KNNProbe.fit])
def test_probes_say_what_they_expected(fit):
    features, labels = clouds(3)
    for arguments, message in (
        ((features, labels[:-1]), r"features \(N, F\) and labels \(N,\), got \(300, 6\) and \(299,\)"),
        ((features[0], labels[:6]), r"got \(6,\) and \(6,\)"),
        ((features[:0], labels[:0]), r"got \(0, 6\) and \(0,\)"),
        ((features, labels + 1), r"integers in \[0, 3\), got torch.int64 in \[1, 3\]"),
        ((features, labels - 1), r"in \[-1, 1\]"),
        ((features, labels.float()), r"got torch.float32"),
        ((features / 0, labels), "finite"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(*arguments, num_classes=3)


def test_settings_out_of_range_are_refused():
    features, labels = clouds(3)
    for options in ({"regularisation": 0.0}, {"max_iter": 0}):
        with pytest.raises(ValueError, match="expected regularisation > 0 and max_iter >= 1"):
            LinearProbe.fit(features, labels, num_classes=3, **options)
    for options in ({"k": 0}, {"temperature": 0.0}):
        with pytest.raises(ValueError, match="expected k >= 1 and temperature > 0"):
            KNNProbe.fit(features, labels, **options)


# ---- nearest neighbours


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (20, 0.5)])
def test_knn_votes_are_scikit_learns_with_the_same_weights(k, temperature):
    features, labels = clouds(4)
    held_out, _ = clouds(4, seed=1)
    probe = KNNProbe.fit(features, labels, k=k, temperature=temperature)
    reference = KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / temperature)
    ).fit(features.numpy(), labels.numpy())
    np.testing.assert_allclose(probe.votes(held_out), reference.predict_proba(held_out.numpy()), atol=1e-4)
    assert (probe.predict(held_out).numpy() == reference.predict(held_out.numpy())).mean() > 0.99


def test_knn_compares_so_many_at_a_time_and_answers_alike(monkeypatch):
    features, labels = clouds(4)
    queries = clouds(4, seed=1)[0].reshape(3, 100, 6)
    probe = KNNProbe.fit(features, labels)
    expected = probe.votes(queries, chunk_size=10**6)
    assert expected.shape == (3, 100, 4)
    sizes, normalize = [], torch.nn.functional.normalize
    monkeypatch.setattr(probes.F, "normalize", lambda x, dim: sizes.append(len(x)) or normalize(x, dim=dim))
    monkeypatch.setattr(probes, "CHUNK_ELEMENTS", 300 * 7)
    torch.testing.assert_close(probe.votes(queries), expected)
    assert max(sizes) == 7 and sum(sizes) == 300
    torch.testing.assert_close(probe.votes(queries, chunk_size=1), expected)


def test_knn_takes_all_neighbours_where_there_are_fewer():
    features, labels = clouds(3, num=5)
    probe = KNNProbe.fit(features, labels, num_classes=8, k=50, temperature=1e6)
    expected = torch.tensor([0.4, 0.4, 0.2, 0, 0, 0, 0, 0])  # near-equal weights: the classes' shares
    torch.testing.assert_close(probe.votes(features), expected.expand(5, 8), rtol=0, atol=1e-4)


# ---- where probes are trained


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def label_map():
    """`(20, 30)`: 0 nearly everywhere, 1 on 40 pixels, 2 on 4, no label on 20."""
    labels = np.zeros((20, 30), dtype=np.uint8)
    labels[3:7, 5:15], labels[10:12, 20:22], labels[0, :20] = 1, 2, 255
    return labels


@pytest.mark.parametrize("balanced", [False, True])
def test_locations_are_distinct_labelled_and_the_same_for_a_seed(label_map, balanced):
    picked = sample_locations(label_map, 100, drawn(), balanced=balanced)
    assert picked.dtype == torch.int64 and len(picked.unique()) == len(picked) == 100
    assert (picked.diff() > 0).all()
    assert (label_map.ravel()[picked] != 255).all()
    assert torch.equal(picked, sample_locations(label_map, 100, drawn(), balanced=balanced))
    assert not torch.equal(picked, sample_locations(label_map, 100, drawn(1), balanced=balanced))
    everything = sample_locations(label_map, 10**6, drawn(), balanced=balanced)
    assert torch.equal(everything, torch.from_numpy(np.flatnonzero(label_map.ravel() != 255)))


def test_locations_follow_the_pixels_or_the_classes(label_map):
    def shares(num_locations, **options):
        counts = np.zeros(3)
        for seed in range(200):
            picked = sample_locations(label_map, num_locations, drawn(seed), **options)
            counts += np.bincount(label_map.ravel()[picked.numpy()], minlength=3)
        return counts / counts.sum()

    np.testing.assert_allclose(shares(20), [536 / 580, 40 / 580, 4 / 580], atol=0.02)
    np.testing.assert_allclose(shares(1, balanced=True), [1 / 3] * 3, atol=0.1)
    used_up = shares(60, balanced=True) * 60
    assert used_up[2] > 3.9 and 20 < used_up[1] < 36, "a small class is drawn until it is used up"


def test_locations_without_labels_are_none(label_map):
    assert len(sample_locations(np.full((3, 4), 255), 5, drawn())) == 0
    assert len(sample_locations(np.full((3, 4), 255), 5, drawn(), ignore=None)) == 5
    for bad in (np.zeros(4, int), np.zeros((3, 4))):
        with pytest.raises(ValueError, match="label_map: expected integers"):
            sample_locations(bad, 5, drawn())


# ---- scores


def test_mean_iou_is_scikit_learns_over_all_images():
    generator = np.random.default_rng(0)
    truths = [generator.integers(4, size=size) for size in ((7, 9), (12, 5), (3, 3))]
    predictions = [np.where(generator.random(t.shape) < 0.6, t, generator.integers(5, size=t.shape)) for t in truths]
    score, reverse = MeanIoU(6), MeanIoU(6)
    for predicted, truth in zip(predictions, truths, strict=True):
        score.update(torch.from_numpy(predicted), truth)
    for predicted, truth in reversed(list(zip(predictions, truths, strict=True))):
        reverse.update(predicted, truth)
    truth, predicted = (np.concatenate([labels.ravel() for labels in maps]) for maps in (truths, predictions))
    expected = jaccard_score(truth, predicted, labels=range(4), average=None)
    np.testing.assert_allclose(score.per_class[:4], expected)
    assert np.isnan(score.per_class[4:]).all(), "predicted, but not in the truth; and in neither"
    assert score.mean_iou == pytest.approx(expected.mean()) and score.mean_iou == reverse.mean_iou
    assert score.pixel_accuracy == pytest.approx((truth == predicted).mean())


def test_pixels_without_label_do_not_count_and_unanswered_ones_are_wrong():
    truth = np.array([[0, 0, 1, 255], [0, 0, 1, 255]], dtype=np.uint8)
    score = MeanIoU(2)
    score.update(np.array([[0, 0, 1, 0], [0, 255, 255, 1]]), truth)
    assert score.per_class.tolist() == [3 / 4, 1 / 2]
    assert score.pixel_accuracy == 4 / 6
    assert np.isnan([MeanIoU(2).mean_iou, MeanIoU(2).pixel_accuracy]).all()


@pytest.mark.parametrize(
    ("predicted", "truth", "message"),
    [
        ([[0, 1]], [[0], [1]], r"one shape, got \(1, 2\) and \(2, 1\)"),
        ([[0, 2]], [[0, 1]], r"predicted: expected integers in \[0, 2\) or 255, got int64, \[2\]"),
        ([[0, 1]], [[0, -1]], r"truth: .*\[-1\]"),
        ([[0.0, 1.0]], [[0, 1]], "predicted: .*float64"),
    ],
)
def test_label_maps_that_do_not_fit_are_refused(predicted, truth, message):
    with pytest.raises(ValueError, match=message):
        MeanIoU(2).update(predicted, truth)


# ---- a model and its probe


def test_segmentation_model_is_the_model_and_the_probe(tmp_path):
    bare = student(initializer_range=0.3).eval()
    weights = {name: value.clone() for name, value in bare.state_dict().items()}
    features, labels = torch.randn(60, FEATURE_SIZE), torch.arange(60) % 3
    probe = LinearProbe.fit(features, labels, num_classes=4)
    state = torch.random.get_rng_state()
    model = segmentation_model(bare, probe, {0: "sky", 1: "sea", 2: "sand", 3: "gull"})
    assert torch.equal(torch.random.get_rng_state(), state), "no random numbers of the caller's are used up"
    pixel_values = torch.rand(2, 3, STUDENT_SIZE, STUDENT_SIZE)
    model.save_pretrained(tmp_path)
    for loaded in (model, APMForSemanticSegmentation.from_pretrained(tmp_path)):
        assert loaded.config.id2label == {0: "sky", 1: "sea", 2: "sand", 3: "gull"}
        assert loaded.config.label2id["gull"] == 3 and loaded.num_labels == loaded.config.num_labels == 4
        with torch.no_grad():
            logits = loaded(pixel_values, output_size=(4, 5)).logits  # (B, K, 4, 5)
            answers = bare(pixel_values, grid_coordinates(4, 5)).last_hidden_state  # (B, 20, F)
        torch.testing.assert_close(logits.flatten(2).transpose(1, 2), probe.logits(answers))
    with torch.no_grad():
        model.apm.decoder.feature_head.weight.zero_()
    assert all(torch.equal(value, weights[name]) for name, value in bare.state_dict().items())
    assert bare.config.num_labels == 2, "the default, as before"


def test_segmentation_model_says_what_it_expected():
    probe = LinearProbe.fit(torch.randn(60, FEATURE_SIZE), torch.arange(60) % 3, num_classes=3)
    with pytest.raises(ValueError, match=f"probe: expected features of width feature_size=20, got {FEATURE_SIZE}"):
        segmentation_model(student(feature_size=20), probe, dict(enumerate("abc")))
    with pytest.raises(ValueError, match="id2label: expected a name for each of 0 to 2"):
        segmentation_model(student(), probe, {0: "a", 1: "b"})


# ---- the example


@pytest.fixture
def example(monkeypatch, tmp_path):
    """Runs `examples/train_segmentation.py` with flags, in this process; returns its figures."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    spec = importlib.util.spec_from_file_location("train_segmentation_example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    level = logging.getLogger("apm_hf").level

    def run(**flags):
        flags = {"output_dir": tmp_path / "run", "num_locations": 96, "max_iter": 60, **flags}
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *words])
        module.main()
        return json.loads((flags["output_dir"] / "metrics.json").read_text())

    yield run
    del sys.modules[spec.name]
    logging.getLogger("apm_hf").setLevel(level)


def test_example_beats_its_control_on_scenes_and_saves_what_it_measured(example, tmp_path, capsys):
    figures = example(max_images=36, max_validation_images=6, num_locations=128, map_size=48)
    learnt, control = figures["APM"], figures["control: random weights"]
    assert learnt["mean_iou"] > 1.5 * control["mean_iou"]
    assert f"{learnt['mean_iou']:.4f}" in capsys.readouterr().out
    model = APMForSemanticSegmentation.from_pretrained(tmp_path / "run")
    assert model.config.id2label == dict(enumerate(PART_NAMES))
    assert (tmp_path / "run" / "preprocessor_config.json").exists()


def test_example_takes_any_data_set_with_masks_and_sees_the_whole_picture(example, tmp_path):
    scenes = SceneDataset(12, seed=7, image_size=40).to_hf_dataset()
    scenes.to_parquet(tmp_path / "scenes.parquet")
    bare = student(initializer_range=0.3)
    bare.save_pretrained(tmp_path / "apm")
    crop = {"do_center_crop": True, "crop_size": STUDENT_SIZE, "size": {"shortest_edge": STUDENT_SIZE}}
    processor = json.dumps({"image_processor_type": "APMImageProcessor", **crop})
    (tmp_path / "apm" / "preprocessor_config.json").write_text(processor)
    flags = {"model": tmp_path / "apm", "dataset": tmp_path / "scenes.parquet", "mask_column": "whole_mask"}
    figures = example(**flags)
    assert 0 < figures["APM"]["mean_iou"] <= 1
    model = AutoModel.from_pretrained(tmp_path / "run")
    saved = json.loads((tmp_path / "run" / "preprocessor_config.json").read_text())
    assert model.config.id2label == {0: "class 0", 1: "class 1"}
    assert not saved["do_center_crop"] and saved["size"] == {"height": STUDENT_SIZE, "width": STUDENT_SIZE}
    assert all(torch.equal(value, bare.state_dict()[name]) for name, value in model.state_dict().items())
    (tmp_path / "names.json").write_text('["ground", "thing"]')
    example(**flags, class_names=tmp_path / "names.json", ignore_index=0)
    assert AutoModel.from_pretrained(tmp_path / "run").config.id2label == {0: "ground", 1: "thing"}
    with pytest.raises(ValueError, match="--mask_column: expected one of .*got 'nothing'"):
        example(**{**flags, "mask_column": "nothing"})
