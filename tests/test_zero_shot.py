"""Class embeddings to logits, labels and predictions; all by hand-checkable numbers."""

import json
import math

import pytest
import torch

from apm_hf.teachers.zero_shot import (
    DEFAULT_TEMPLATES,
    ENSEMBLE_TEMPLATES,
    Prediction,
    classify,
    read_labels,
    same_words,
    topk,
)


def test_logits_are_scaled_cosines():
    image_embeds = torch.tensor([[3.0, 4.0], [-2.0, 0.0]])
    text_embeds = torch.tensor([[1.0, 0.0], [0.0, 7.0], [-5.0, 0.0]])
    expected = torch.tensor([[6.0, 8.0, -6.0], [-10.0, 0.0, 10.0]])
    torch.testing.assert_close(classify(image_embeds, text_embeds, logit_scale=10.0), expected)
    torch.testing.assert_close(classify(image_embeds, text_embeds), 10 * expected)


@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_only_directions_matter_however_long_the_rows(factor):
    embeds = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(classify(factor * embeds, embeds), classify(embeds, embeds / 7))


def test_classes_of_one_direction_are_grouped():
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [7.0, 0.0], [1.0, 0.01], [0.0, 2.0], [-1.0, 0.0]])
    assert same_words(rows, list("abcdef")) == [["a", "c"], ["b", "e"]]
    assert same_words(rows[[0, 3, 5]], list("adf")) == []


def test_half_precision_is_scored_in_float32():
    embeds = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).half()
    logits = classify(embeds, embeds.bfloat16())
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, classify(embeds.float(), embeds.bfloat16().float()))


def test_gradients_reach_the_image_embeds():
    image_embeds = torch.tensor([[3.0, 4.0]], requires_grad=True)
    classify(image_embeds, torch.tensor([[1.0, 0.0]]), logit_scale=1.0).sum().backward()
    # d cos / dx = (t - cos * x / |x|) / |x|
    torch.testing.assert_close(image_embeds.grad, torch.tensor([[(1 - 0.36) / 5, -0.48 / 5]]))


def test_width_mismatch_and_missing_batch_axis_are_refused():
    with pytest.raises(ValueError, match=r"same width F, got \(2, 3\) and \(5, 4\)"):
        classify(torch.ones(2, 3), torch.ones(5, 4))
    with pytest.raises(ValueError, match=r"got \(3,\) and \(5, 3\)"):
        classify(torch.ones(3), torch.ones(5, 3))


@pytest.mark.parametrize(
    ("value", "message"),
    [(0.0, "only zeros in row 1, 3"), (math.nan, "NaN or infinity in row 1, 3"), (-math.inf, "infinity in row 1, 3")],
)
def test_rows_without_a_direction_are_named(value, message):
    good, bad = torch.ones(4, 2), torch.ones(4, 2)
    bad[[1, 3]] = value
    with pytest.raises(ValueError, match=f"image_embeds.*{message}"):
        classify(bad, good)
    with pytest.raises(ValueError, match=f"text_embeds.*{message}"):
        classify(good, bad)


def test_many_bad_rows_are_counted_not_listed():
    with pytest.raises(ValueError, match="row 0, 1, 2, 3, 4 and 7 more"):
        classify(torch.zeros(12, 2), torch.ones(1, 2))


def test_topk_gives_probabilities_over_all_classes_best_first():
    logits = torch.log(torch.tensor([[0.2, 0.5, 0.3], [0.7, 0.1, 0.2]]))
    first, second = topk(logits, ["cat", "dog", "owl"], k=2)
    assert [prediction.label for prediction in first] == ["dog", "owl"]
    assert [prediction.label for prediction in second] == ["cat", "owl"]
    assert [prediction.score for prediction in first] == pytest.approx([0.5, 0.3])
    assert isinstance(first[0], Prediction)


def test_topk_gives_all_classes_when_asked_for_more():
    (predictions,) = topk(torch.zeros(1, 2), ["cat", "dog"], k=5)
    assert sorted(prediction.label for prediction in predictions) == ["cat", "dog"]


@pytest.mark.parametrize(
    ("logits", "names", "k", "message"),
    [
        (torch.zeros(1, 2), ["cat"], 1, r"logits \(B, 1\), one per class name, got \(1, 2\)"),
        (torch.zeros(2), ["cat", "dog"], 1, r"got \(2,\)"),
        (torch.zeros(1, 0), [], 1, r"got \(1, 0\)"),
        (torch.zeros(1, 2), ["cat", "dog"], 0, "at least 1, got 0"),
        (torch.tensor([[0.0, 1.0], [math.nan, 0.0]]), ["cat", "dog"], 1, "NaN or infinity in row 1"),
    ],
)
def test_topk_refuses(logits, names, k, message):
    with pytest.raises(ValueError, match=message):
        topk(logits, names, k=k)


def test_ensemble_is_different_prompts_with_one_place_each():
    assert DEFAULT_TEMPLATES == ("a photo of a {}.",)
    assert len(set(ENSEMBLE_TEMPLATES)) == len(ENSEMBLE_TEMPLATES) == 7
    assert all(template.count("{}") == 1 for template in ENSEMBLE_TEMPLATES)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_labels_are_lines_in_order_without_blanks(tmp_path, encoding):
    path = tmp_path / "labels.txt"
    path.write_bytes("cat\r\n\n  great white shark \n\t\nmüsli\u2028bar".encode(encoding))
    assert read_labels(path) == ["cat", "great white shark", "müsli\u2028bar"]
    assert read_labels(str(path)) == read_labels(path)


@pytest.mark.parametrize("name", ["labels.json", "labels.txt"])
def test_labels_are_a_json_list_whatever_the_suffix(tmp_path, name):
    path = tmp_path / name
    path.write_text(json.dumps(["cat", "café", "a\nb"], indent=1), encoding="utf-8")
    assert read_labels(path) == ["cat", "café", "a\nb"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("labels.txt", b"\n \n", "at least one label"),
        ("labels.txt", b"", "at least one label"),
        ("labels.json", b"[]", "at least one label"),
        ("labels.txt", b"cat\ndog\ncat \n", "more than once: cat"),
        ("labels.json", b'["cat", "cat"]', "more than once: cat"),
        ("labels.json", b'{"0": "cat"}', "JSON list of strings"),
        ("labels.json", b'["cat", 7]', "JSON list of strings"),
        ("labels.json", b'["cat", ""]', "none of them blank"),
        ("labels.json", b"cat\ndog", "JSON list of strings"),
        ("labels.txt", b"caf\xe9", "UTF-8"),
    ],
)
def test_bad_label_files_are_refused_by_name(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"(?s){message}") as raised:
        read_labels(path)
    assert name in str(raised.value)


def test_a_missing_label_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_labels(tmp_path / "nowhere.txt")
