"""Photos in, two predictions out: the teacher's own and the adapted models', for the same class embeddings.

Legend: B images, K classes, F feature width.
"""

import pytest
import torch
from torch.nn import functional as F

from apm_hf import load_teacher
from apm_hf.distillation import matching_image_processor
from apm_hf.ttt import TTTConfig, adapt
from apm_hf.ttt import classification as ttt_classification
from apm_hf.ttt.classification import TTTClassifier
from fixtures_tiny import FEATURE_SIZE, LABELS, STUDENT_SIZE, photo, save_classifier, save_clip, student

CONFIG = TTTConfig.preset("fast", num_locations=4, steps=10, stop=None)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return load_teacher(save_clip(tmp_path_factory.mktemp("clip")), device="cpu")


@pytest.fixture(scope="module")
def photos():
    return [photo(seed, size=(44, 36)) for seed in range(3)]


def classifier(teacher, model=None, **options):
    return TTTClassifier(teacher, LABELS, **{"config": CONFIG, "model": model or student(), **options})


def test_logits_are_scaled_cosines_of_the_teachers_and_the_models_embeddings(teacher, photos):
    result = classifier(teacher)(photos)
    targets, texts = teacher.encode_images(photos).image_embeds, teacher.encode_text(LABELS)
    pixels = matching_image_processor(teacher, STUDENT_SIZE)(photos, return_tensors="pt")["pixel_values"]
    embeds = adapt(student(), pixels, targets, config=CONFIG).image_embeds
    for logits, image_embeds in ((result.teacher_logits, targets), (result.logits, embeds)):
        expected = teacher.logit_scale * F.normalize(image_embeds, dim=1) @ F.normalize(texts, dim=1).T
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(result.target_cosine, F.cosine_similarity(embeds, targets))
    assert (result.logits - result.teacher_logits).abs().max() > 0.1, "the two answers are the same"
    assert result.agreement.tolist() == (result.logits.argmax(1) == result.teacher_logits.argmax(1)).tolist()
    assert result.adapted.losses.shape == (3, 10)


def test_a_model_fitted_to_the_end_repeats_its_teacher(teacher, photos):
    config = TTTConfig(num_locations=4, steps=200, learning_rate=1e-2)
    result = classifier(teacher, student(initializer_range=0.3), config=config)(photos)
    assert result.target_cosine.min() > 0.99
    # Not the same label in every case: of two that the teacher finds equally likely, either may come first.
    assert ((result.logits - result.teacher_logits).abs() < 0.1 * teacher.logit_scale).all()


def test_texts_are_encoded_once(teacher, photos, monkeypatch):
    ready = classifier(teacher, templates=["a photo of a {}.", "a {}"])
    expected = teacher.encode_text(LABELS, ["a photo of a {}.", "a {}"])
    torch.testing.assert_close(ready.text_embeds, expected)
    monkeypatch.setattr(teacher, "encode_text", lambda *args: pytest.fail("encoded again"))
    ready(photos[:1])
    ready(photos[:1])


def test_predictions_do_not_depend_on_the_other_photos(teacher, photos):
    ready = classifier(teacher)
    together, alone = ready(photos), ready(photos[2:])
    torch.testing.assert_close(together.logits[2:], alone.logits, atol=1e-4, rtol=1e-4)
    by_seed = ready(photos, seeds=[4, 5, 4])
    torch.testing.assert_close(by_seed.logits[2:], ready(photos[2:], seeds=[4]).logits, atol=1e-4, rtol=1e-4)
    assert (by_seed.logits[2] - ready(photos[2:], seeds=[5]).logits[0]).abs().max() > 1e-3


def test_a_classifier_teaches_with_its_own_class_weights(tmp_path, photos):
    teacher = load_teacher(save_classifier(tmp_path), device="cpu")
    result = TTTClassifier(teacher, teacher.class_names, config=CONFIG, model=student())(photos)
    assert result.logits.shape == (3, len(LABELS))


def test_the_trigger_may_come_from_the_teacher(teacher, photos):
    config = TTTConfig(num_locations=4, steps=100, learning_rate=1e-2)
    model = student(trigger_source="embedding", initializer_range=0.3)
    result = classifier(teacher, model, config=config)(photos)
    assert result.target_cosine.min() > 0.95


def test_without_a_model_a_fresh_one_is_as_wide_as_the_teacher(teacher, monkeypatch):
    asked = []
    preset = ttt_classification.APMConfig.preset

    def small(name, **overrides):
        asked.append(name)
        return preset(name, **overrides, image_size=28, hidden_sizes=[16], position_size=8)

    monkeypatch.setattr(ttt_classification.APMConfig, "preset", small)
    ready = TTTClassifier(teacher, LABELS, config=CONFIG)
    assert asked == ["clip-ttt"] and ready.model.config.feature_size == FEATURE_SIZE
    assert ready([photo(0)]).logits.shape == (1, 3)


def test_a_model_of_another_width_is_refused(teacher):
    with pytest.raises(ValueError, match=f"model: expected features as wide as the teacher's, {FEATURE_SIZE}, got 20"):
        classifier(teacher, student(feature_size=20))


def test_a_model_that_is_no_apm_is_refused(teacher):
    with pytest.raises(ValueError, match="model: expected an APM"):
        classifier(teacher, teacher.model)


def test_no_photo_is_an_error(teacher):
    with pytest.raises(ValueError, match="at least one image"):
        classifier(teacher)([])


def test_it_works_where_gradients_are_switched_off(teacher, photos):
    ready = classifier(teacher)
    expected = ready(photos[:1])
    with torch.no_grad():
        torch.testing.assert_close(ready(photos[:1]).logits, expected.logits)


def test_a_photo_whose_fit_diverges_leaves_the_others_predictions(teacher, photos, monkeypatch):
    ready = classifier(teacher)
    expected = ready(photos)

    def spoilt(*args, **options):
        adapted = adapt(*args, **options)
        adapted.image_embeds[1] = torch.nan  # what is left of an image that diverged
        adapted.losses[1, 3:] = torch.nan
        adapted.diverged[1] = True
        return adapted

    monkeypatch.setattr(ttt_classification, "adapt", spoilt)
    result = ready(photos)
    torch.testing.assert_close(result.teacher_logits, expected.teacher_logits)
    torch.testing.assert_close(result.logits[[0, 2]], expected.logits[[0, 2]])
    assert result.adapted.diverged.tolist() == [False, True, False]
