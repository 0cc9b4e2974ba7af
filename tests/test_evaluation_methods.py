"""Every method against a naive one, written image by image from the papers' formulas in float64.

Legend: B images, V views, K classes, F width of the embeddings.
"""

import math
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from apm_hf import APMImageProcessor, load_teacher
from apm_hf.distillation import matching_image_processor
from apm_hf.evaluation.methods import adapted as apm_methods
from apm_hf.evaluation.methods.adapted import APMAdapted, APMForward, load_student
from apm_hf.evaluation.methods.prompt_tuning import TPT
from apm_hf.evaluation.methods.registry import METHODS, MeanViews, Recentred, ZeroShot, make_methods
from apm_hf.evaluation.methods.task import ImageBatch, ZeroShotTask
from apm_hf.evaluation.methods.views import view_encoder
from apm_hf.evaluation.methods.votes import MTA, Zero, count_votes, num_kept
from apm_hf.ttt import adapt
from fixtures_tiny import FEATURE_SIZE, LABELS, STUDENT_SIZE, photo, save_classifier, save_clip, student

SCALE = 20.0


def random_task(num_classes=5, width=7, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    texts, ensemble = F.normalize(torch.randn(2, num_classes, width, generator=generator), dim=-1)
    names = [f"class {row}" for row in range(num_classes)]
    return ZeroShotTask(
        SimpleNamespace(logit_scale=SCALE, has_text=True, name="random"), names, (), (), texts, ensemble
    )


def random_views(num_images=6, num_views=9, width=7, *, seed=0, spread=0.8):
    """`(B, V, F)`: views scattered around their image's own embedding, of different lengths."""
    generator = torch.Generator().manual_seed(100 + seed)
    centres = torch.randn(num_images, 1, width, generator=generator)
    views = centres + spread * torch.randn(num_images, num_views, width, generator=generator)
    return views * (0.5 + torch.rand(num_images, num_views, 1, generator=generator))


def batch_of(views, **options):
    return ImageBatch(
        [None] * len(views),
        list(range(len(views))),
        list(range(len(views))),
        lambda batch, view: views[:, view],
        **options,
    )


def predict(method, task, views, **options):
    return method(task, batch_of(views, **options)).logits


# The naive ones: lists of float64 vectors in, plain loops.


def unit(vector):
    return np.asarray(vector, dtype=np.float64) / math.sqrt(sum(float(x) ** 2 for x in vector))


def naive_logits(vector, texts):
    return np.array([SCALE * float(unit(vector) @ unit(text)) for text in texts])


def softmax(logits):
    exponentials = [math.exp(x - max(logits)) for x in logits]
    return np.array([x / sum(exponentials) for x in exponentials])


def entropy(probabilities):
    return -sum(p * math.log(p) for p in probabilities if p > 0)


def naive_order(views, texts):
    return sorted(range(len(views)), key=lambda row: entropy(softmax(naive_logits(views[row], texts))))


def naive_zero(views, texts, keep):
    """The class, the share of votes and whether a tie had to be broken."""
    order = naive_order(views, texts)
    classes = [int(naive_logits(views[row], texts).argmax()) for row in order]
    voters = max(1, int(keep * len(views) + 1e-9))
    votes = [classes[:voters].count(name) for name in range(len(texts))]
    tied = [name for name in range(len(texts)) if votes[name] == max(votes)]
    if len(tied) == 1:
        return tied[0], max(votes) / voters, False
    winner = next(name for name in classes[voters:] + classes[:voters] if name in tied)
    return winner, (max(votes) + 1) / (voters + 1), True


def naive_mta(views, texts, *, affinity=4.0, temperature=0.2, share=0.3, iterations=5):
    views = [unit(view) for view in views]
    probabilities = [softmax(naive_logits(view, texts)) for view in views]
    count = len(views)
    bandwidths = []
    for p in range(count):
        distances = sorted(float(((views[p] - views[q]) ** 2).sum()) for q in range(count) if q != p)
        nearest = distances[: max(1, int(share * (count - 1) + 1e-9))]
        bandwidths.append(sum(nearest) / len(nearest))
    weights = [[float(probabilities[p] @ probabilities[q]) for q in range(count)] for p in range(count)]

    def kernel(p, mode):
        return math.exp(-float(((views[p] - mode) ** 2).sum()) / bandwidths[p])

    mode, inlierness = views[0], [1 / count] * count
    for _ in range(iterations):
        for _ in range(iterations):
            scores = [
                kernel(p, mode) + affinity * sum(weights[p][q] * inlierness[q] for q in range(count))
                for p in range(count)
            ]
            inlierness = softmax([score / temperature for score in scores])
        for _ in range(iterations):
            mode = unit(sum(inlierness[p] * kernel(p, mode) * views[p] for p in range(count)))
    return mode, inlierness


def test_zero_shot_and_ensemble_are_scaled_cosines_with_their_own_prompts():
    task, views = random_task(), random_views()
    for method, texts in (
        (ZeroShot(), task.text_embeds),
        (ZeroShot(ensemble=True), task.ensemble_text_embeds),
    ):
        expected = np.stack([naive_logits(image[0], texts) for image in views])
        np.testing.assert_allclose(predict(method, task, views), expected, atol=1e-4)


@pytest.mark.parametrize("keep", [1.0, 0.34])
def test_mean_of_views_is_the_mean_of_their_directions(keep):
    task, views = random_task(), random_views()
    expected = []
    for image in views:
        kept = naive_order(image, task.text_embeds)[:3] if keep < 1 else range(9)
        expected.append(naive_logits(sum(unit(image[row]) for row in kept), task.text_embeds))
    logits = predict(MeanViews(num_views=9, keep=keep), task, views)
    np.testing.assert_allclose(logits, np.stack(expected), atol=1e-4)
    assert (logits - predict(ZeroShot(), task, views)).abs().max() > 1


def test_recentring_subtracts_the_mean_of_the_batch():
    task, views = random_task(), random_views()
    mean = views[:, 0].double().mean(0)
    expected = np.stack([naive_logits(image[0].double() - mean, task.text_embeds) for image in views])
    np.testing.assert_allclose(predict(Recentred(), task, views), expected, atol=1e-4)


def test_recentring_the_stream_counts_every_image_so_far_once():
    task, views = random_task(), random_views(9)
    method = Recentred(name="recentred_stream", sequential=True)
    earlier, logits = torch.empty(0, 7), []
    for size in (3, 1, 4, 1):
        done = len(earlier)
        logits.append(predict(method, task, views[done : done + size], earlier=earlier))
        earlier = views[: done + size, 0]
    expected = []
    for row, last in enumerate([3, 3, 3, 4, 8, 8, 8, 8, 9]):
        mean = views[:last, 0].double().mean(0)
        expected.append(naive_logits(views[row, 0].double() - mean, task.text_embeds))
    np.testing.assert_allclose(torch.cat(logits), np.stack(expected), atol=1e-4)


def test_recentring_the_stream_needs_the_images_before():
    with pytest.raises(ValueError, match="recentred_stream: expected the embeddings of the images before"):
        predict(METHODS["recentred_stream"](), random_task(), random_views())


def test_recentring_views_subtracts_the_mean_of_their_mean_directions():
    task, views = random_task(), random_views()
    means = [sum(unit(view) for view in image) / 9 for image in views]
    expected = np.stack([naive_logits(mean - sum(means) / len(means), task.text_embeds) for mean in means])
    np.testing.assert_allclose(predict(Recentred(num_views=9), task, views), expected, atol=1e-4)


def test_an_image_alone_has_no_shift_and_is_classified_as_it_is():
    task, views = random_task(), random_views(1)
    alone = predict(ZeroShot(), task, views)
    torch.testing.assert_close(predict(Recentred(), task, views), alone)
    first = predict(Recentred(sequential=True), task, views, earlier=torch.empty(0, 7))
    torch.testing.assert_close(first, alone)


def test_recentring_undoes_a_shift_of_all_embeddings():
    task, views = random_task(), random_views()
    shifted = views + 3 * torch.arange(7.0)
    torch.testing.assert_close(
        predict(Recentred(), task, shifted), predict(Recentred(), task, views), atol=1e-3, rtol=1e-3
    )
    assert (predict(ZeroShot(), task, shifted) - predict(ZeroShot(), task, views)).abs().max() > 5


@pytest.mark.parametrize("keep", [0.1, 0.25, 0.5, 1.0])
def test_zero_lets_the_most_confident_views_vote_and_breaks_ties_by_the_next(keep):
    ties = 0
    for seed in range(8):
        task, views = random_task(seed=seed), random_views(num_views=12, seed=seed, spread=1.5)
        logits = predict(Zero(num_views=12, keep=keep), task, views)
        for image, row in zip(views, logits, strict=True):
            winner, share, tied = naive_zero(image, task.text_embeds, keep)
            ties += tied
            assert row.argmax() == winner
            assert abs(row.softmax(0).max() - share) < 2e-3, "confidence is the share of votes"
            assert row.isfinite().all()
    assert ties > 3 or keep == 0.1, "no tie was tried"


@pytest.mark.parametrize(
    ("classes", "voters", "winner", "votes"),
    [
        ([2, 2, 0, 1], 3, 2, 2),  # no tie
        ([0, 1, 2, 1], 2, 1, 2),  # the third view's class is not tied, the fourth's is
        ([1, 0, 2, 2], 2, 1, 2),  # none of the views left out helps: the most confident one decides
        ([2, 0], 2, 2, 2),  # none is left out
        ([1], 1, 1, 1),
        ([0, 0, 1, 1, 2, 1], 4, 1, 3),
    ],
)
def test_ties_are_broken_by_views_in_order_of_confidence(classes, voters, winner, votes):
    counted = count_votes(torch.tensor([classes]), voters, num_classes=3)[0]
    assert counted.argmax() == winner and counted.max() == votes
    assert (counted == counted.max()).sum() == 1


def test_classes_without_a_vote_are_ranked_by_their_mean_probability():
    task, views = random_task(), random_views(num_views=10)
    logits = predict(Zero(num_views=10, keep=0.3), task, views)
    for image, row in zip(views, logits, strict=True):
        kept = naive_order(image, task.text_embeds)[:3]
        voted = {int(naive_logits(image[view], task.text_embeds).argmax()) for view in kept}
        mean = sum(softmax(naive_logits(image[view], task.text_embeds)) for view in kept)
        others = [name for name in np.argsort(-mean) if name not in voted]
        assert [name for name in row.argsort(descending=True).tolist() if name not in voted] == others


@pytest.mark.parametrize("options", [{}, {"affinity": 1.0, "entropy": 0.5, "neighbours": 0.6, "num_iterations": 3}])
def test_mta_finds_the_mode_of_the_papers_objective(options):
    names = {"affinity": "affinity", "entropy": "temperature", "neighbours": "share", "num_iterations": "iterations"}
    for seed, spread in enumerate((0.3, 0.8, 1.5)):
        task, views = random_task(seed=seed), random_views(num_views=11, seed=seed, spread=spread)
        logits = predict(MTA(num_views=11, **options), task, views)
        modes = [naive_mta(image, task.text_embeds, **{names[k]: x for k, x in options.items()})[0] for image in views]
        expected = np.stack([naive_logits(mode, task.text_embeds) for mode in modes])
        np.testing.assert_allclose(logits, expected, atol=5e-4)
        assert (logits - predict(MeanViews(num_views=11), task, views)).abs().max() > 0.05


def test_mta_does_not_listen_to_a_view_far_from_the_others():
    task, views = random_task(), random_views(num_views=10, spread=0.1)
    strange = views.clone()
    strange[:, -1] = -strange[:, 0]
    without = predict(MTA(num_views=9), task, views[:, :9])
    moved = (predict(MTA(num_views=10), task, strange) - without).abs().max()
    mean_moved = predict(MeanViews(num_views=10), task, strange) - predict(MeanViews(num_views=9), task, views[:, :9])
    assert moved < 0.5
    assert moved < mean_moved.abs().max() or mean_moved.abs().max() < 0.5
    naive = naive_mta(strange[0], task.text_embeds)[1]
    assert naive[-1] < 0.05


VIEW_METHODS = [
    MeanViews(num_views=9),
    MeanViews(num_views=9, keep=0.4),
    Zero(num_views=9, keep=0.4),
    MTA(num_views=9),
]
ALL = [ZeroShot(), ZeroShot(ensemble=True), *VIEW_METHODS]


@pytest.mark.parametrize("method", ALL, ids=lambda method: f"{method.name} {getattr(method, 'keep', '')}")
def test_predictions_depend_neither_on_the_other_images_nor_on_the_order_of_views(method):
    task, views = random_task(), random_views()
    together = predict(method, task, views)
    order = [4, 0, 5, 2, 1, 3]
    torch.testing.assert_close(predict(method, task, views[order]), together[order], atol=1e-4, rtol=1e-4)
    alone = torch.cat([predict(method, task, views[row : row + 1]) for row in range(6)])
    torch.testing.assert_close(alone, together, atol=1e-4, rtol=1e-4)
    crops = torch.cat([views[:, :1], views[:, 1:].flip(1)], dim=1)
    torch.testing.assert_close(predict(method, task, crops), together, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("num_views", [1, 2, 9])
@pytest.mark.parametrize("kind", [MeanViews, Zero, MTA], ids=lambda kind: kind.__name__)
def test_views_that_are_all_the_same_predict_as_the_image_does(kind, num_views):
    task, views = random_task(), random_views()[:, :1].expand(-1, num_views, -1)
    logits, expected = predict(kind(num_views=num_views), task, views), predict(ZeroShot(), task, views)
    assert logits.argmax(1).tolist() == expected.argmax(1).tolist()
    if kind is Zero:
        assert logits.softmax(1).max(1).values.min() > 0.99
    else:
        torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-3)


def test_a_share_of_views_is_rounded_down_to_one_at_least():
    assert [num_kept(count, 0.1) for count in (1, 9, 10, 19, 20, 64)] == [1, 1, 1, 1, 2, 6]
    assert num_kept(100, 0.29) == 29 and num_kept(10, 0.3) == 3 and num_kept(7, 1.0) == 7


def test_methods_ask_for_no_more_views_than_they_say():
    task, views = random_task(), random_views()
    for method in ALL:
        batch = batch_of(views)
        output, _ = batch.timed(method, task)
        assert batch.num_used_views == method.num_views
        assert output.logits.dtype == torch.float32 and output.logits.shape == (6, 5)
        assert output.steps is None and output.by_step is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MeanViews(num_views=0), "num_views, keep"),
        (lambda: Zero(keep=0), "num_views, keep"),
        (lambda: Zero(keep=1.2), "num_views, keep"),
        (lambda: MTA(entropy=0), "affinity, entropy, num_iterations"),
        (lambda: ZeroShot(num_views=2), "num_views: expected 1"),
        (lambda: Recentred(num_views=2, sequential=True), "num_views: expected 1 with sequential"),
        (lambda: APMAdapted(target="none"), "target: expected one of"),
        (lambda: APMAdapted(start="none"), "start: expected one of"),
        (lambda: APMAdapted(consensus="none"), "consensus: expected one of"),
        (lambda: APMAdapted(preset="none"), "preset: expected one of"),
        (lambda: APMAdapted(preset="reference"), "preset: expected one of"),
        (lambda: APMAdapted(overrides={"steps": 0}), "steps: expected a positive number"),
        (lambda: APMForward(num_views=2), "num_views: expected 1"),
        (lambda: APMForward(start="none"), "start: expected one of"),
    ],
)
def test_options_outside_their_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Models.

QUICK = {"num_locations": None, "steps": 6, "learning_rate": 1e-2, "fit": "all", "alpha": 1.0, "stop": None}


@pytest.fixture(autouse=True)
def small_models(monkeypatch):
    """A fresh `clip-ttt` of the tests' size."""
    preset = apm_methods.APMConfig.preset

    def small(name, **overrides):
        if name != "clip-ttt":
            return preset(name, **overrides)
        sizes = {"image_size": 28, "hidden_sizes": [32, 16], "position_size": 8, "pooling_num_heads": 2}
        return preset(name, **overrides, **sizes, initializer_range=0.2)

    monkeypatch.setattr(apm_methods.APMConfig, "preset", small)
    apm_methods._STUDENTS.clear()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return load_teacher(save_clip(tmp_path_factory.mktemp("clip")), device="cpu")


@pytest.fixture(scope="module")
def task(teacher):
    return ZeroShotTask.build(teacher, LABELS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that was saved with an image processor of its own."""
    path = tmp_path_factory.mktemp("model")
    student(initializer_range=0.3).save_pretrained(path)
    size = {"height": STUDENT_SIZE, "width": STUDENT_SIZE}
    APMImageProcessor(size=size, do_min_max=True).save_pretrained(path)
    return str(path)


def photo_batch(teacher, seeds=range(4)):
    images = [photo(seed) for seed in seeds]
    return ImageBatch(images, [10 + seed for seed in seeds], list(seeds), view_encoder(teacher))


def cosines(task, embeds):
    return task.teacher.logit_scale * F.normalize(embeds, dim=1) @ task.text_embeds.T


def model_and_pixels(task, batch, *, seed=0):
    model = load_student(task.teacher, "random", None, seed=seed).bare_model
    processor = matching_image_processor(task.teacher, model.config.image_size)
    return model, processor(batch.images, return_tensors="pt")["pixel_values"]


def test_a_model_is_fitted_to_the_teachers_embedding_and_classified(task):
    batch, method = photo_batch(task.teacher), APMAdapted(overrides=QUICK)
    model, pixels = model_and_pixels(task, batch)
    targets = task.teacher.encode_images(batch.images).image_embeds
    embeds = adapt(model, pixels, targets, config=replace(method.config, start="model")).image_embeds
    output = method(task, batch)
    torch.testing.assert_close(output.logits, cosines(task, embeds), atol=1e-3, rtol=1e-3)
    assert output.steps.tolist() == [6] * 4 and output.by_step is None
    assert (output.logits - cosines(task, targets)).abs().max() > 0.5, "the model only repeats its teacher"


def test_a_model_fitted_to_the_end_repeats_its_target(task):
    method = APMAdapted(overrides={**QUICK, "steps": 300})
    batch = photo_batch(task.teacher)
    expected = cosines(task, batch.embeds()[:, 0])
    torch.testing.assert_close(method(task, batch).logits, expected, atol=0.5, rtol=0)


def test_predictions_by_step_are_those_of_shorter_fits(task):
    batch = photo_batch(task.teacher, range(8))
    output = APMAdapted(overrides=QUICK, record_steps=True)(task, batch)
    assert list(output.by_step) == [1, 2, 3, 5, 6]
    for steps, classes in output.by_step.items():
        shorter = APMAdapted(overrides={**QUICK, "steps": steps})(task, batch)
        assert classes.tolist() == shorter.logits.argmax(1).tolist()
    assert len({tuple(classes.tolist()) for classes in output.by_step.values()}) > 1, "nothing changed on the way"


def test_an_image_that_stopped_keeps_its_prediction(task):
    overrides = {**QUICK, "steps": 40, "stop": "stable", "stop_patience": 4, "learning_rate": 3e-2}
    output = APMAdapted(overrides=overrides, record_steps=True)(task, photo_batch(task.teacher, range(8)))
    assert output.steps.max() < 40 and len(set(output.steps.tolist())) > 1
    assert list(output.by_step) == [1, 2, 3, 5, 8, 10, 15, 20, 30, 40]
    last = output.logits.argmax(1)
    for step, classes in output.by_step.items():
        done = output.steps <= step
        assert classes[done].tolist() == last[done].tolist() and (classes >= 0).all()


def test_adapted_predictions_do_not_depend_on_the_other_images(task):
    method = APMAdapted(overrides={"steps": 5}, record_steps=True)
    together = method(task, photo_batch(task.teacher))
    alone = method(task, photo_batch(task.teacher, [2]))
    torch.testing.assert_close(alone.logits, together.logits[2:3], atol=1e-3, rtol=1e-3)
    assert all(alone.by_step[step] == classes[2] for step, classes in together.by_step.items())


def test_models_start_from_their_seed_and_from_the_same_weights(task):
    batch = photo_batch(task.teacher)
    first, again, other = (APMAdapted(overrides={**QUICK, "seed": seed})(task, batch).logits for seed in (0, 0, 1))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert (first - other).abs().max() > 0.1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"num_views": 4}, lambda images, views, order: [sum(map(unit, views[i])) for i in range(4)]),
        (
            {"num_views": 4, "keep": 0.5},
            lambda images, views, order: [unit(views[i][order[i][0]]) + unit(views[i][order[i][1]]) for i in range(4)],
        ),
        (
            {"target": "recentred"},
            lambda images, views, order: [images[i] - sum(images) / 4 for i in range(4)],
        ),
        (
            {"num_views": 4, "target": "recentred"},
            lambda images, views, order: [
                sum(map(unit, views[i])) / 4 - sum(unit(view) for image in views for view in image) / 16
                for i in range(4)
            ],
        ),
    ],
    ids=["views", "confident views", "recentred", "recentred views"],
)
def test_targets_have_the_direction_asked_for_and_the_images_length(task, options, expected):
    views = photo_batch(task.teacher).embeds(4)[:, : options.get("num_views", 1)].double()
    scale = task.teacher.logit_scale

    def naive_entropy(view):
        return entropy(softmax(scale * task.text_embeds.double().numpy() @ unit(view)))

    order = [sorted(range(views.shape[1]), key=lambda v: naive_entropy(image[v])) for image in views]  # noqa: B023
    directions = expected([image[0].numpy() for image in views], [list(image.numpy()) for image in views], order)
    targets = APMAdapted(**options).targets(task, views.float())
    for target, direction, image in zip(targets, directions, views[:, 0], strict=True):
        np.testing.assert_allclose(target, unit(direction) * float(image.norm()), atol=1e-4)


def test_targets_of_one_view_are_the_teachers_embeddings_bit_by_bit(task):
    views = photo_batch(task.teacher).embeds()
    assert APMAdapted().targets(task, views).equal(views[:, 0])


def test_fits_that_diverge_are_an_error_that_names_the_images(task):
    method = APMAdapted(overrides={**QUICK, "learning_rate": 1e30}, record_steps=True)
    with pytest.raises(ValueError, match="apm_fast: expected fits that converge, .* for the images 10, 11, 12"):
        method(task, photo_batch(task.teacher, range(3)))


def test_consensus_is_the_mean_of_both_answers(task):
    batch = photo_batch(task.teacher)
    plain = APMAdapted(overrides=QUICK)(task, batch).logits.double()
    targets = batch.embeds()[:, 0]
    probabilities = APMAdapted(overrides=QUICK, consensus="probabilities", record_steps=True)(task, batch)
    expected = (plain.softmax(1) + cosines(task, targets).double().softmax(1)) / 2
    torch.testing.assert_close(probabilities.logits.double().softmax(1), expected, atol=1e-4, rtol=1e-3)
    assert probabilities.by_step[6].tolist() == expected.argmax(1).tolist()

    model, pixels = model_and_pixels(task, batch)
    config = replace(APMAdapted(overrides=QUICK).config, start="model")
    embeds = adapt(model, pixels, targets, config=config).image_embeds
    both = F.normalize(embeds, dim=1) + F.normalize(targets, dim=1)
    logits = APMAdapted(overrides=QUICK, consensus="embeddings")(task, batch).logits
    torch.testing.assert_close(logits, cosines(task, both), atol=1e-3, rtol=1e-3)


def test_a_distilled_model_is_shown_what_its_own_image_processor_makes(task, folder):
    batch = photo_batch(task.teacher)
    pixels = APMImageProcessor.from_pretrained(folder)(batch.images, return_tensors="pt")["pixel_values"]
    model = student(initializer_range=0.3)
    output = APMForward(model=folder)(task, batch)
    with torch.no_grad():
        expected = cosines(task, model(pixels).pooler_output)
    torch.testing.assert_close(output.logits, expected, atol=1e-3, rtol=1e-3)
    assert batch.num_used_views == 0, "it does without its teacher"

    method = APMAdapted(start="model", model=folder, overrides=QUICK)
    targets = task.teacher.encode_images(batch.images).image_embeds
    expected = cosines(task, adapt(model, pixels, targets, config=method.config).image_embeds)
    torch.testing.assert_close(method(task, batch).logits, expected, atol=1e-3, rtol=1e-3)
    after = APMForward(model=folder)(task, batch).logits
    torch.testing.assert_close(after, output.logits, rtol=0, atol=0, msg="adapting changed the model")


def test_a_distilled_model_may_agree_with_its_teacher(task, folder):
    batch = photo_batch(task.teacher)
    model = APMForward(model=folder)(task, batch).logits.double().softmax(1)
    teacher = cosines(task, batch.embeds()[:, 0]).double().softmax(1)
    both = APMForward(model=folder, consensus="probabilities")(task, batch).logits.double().softmax(1)
    torch.testing.assert_close(both, (model + teacher) / 2, atol=1e-4, rtol=1e-3)


def test_the_trigger_may_come_from_the_teacher(task, tmp_path):
    model = student(trigger_source="embedding", initializer_range=0.3)
    model.save_pretrained(tmp_path)
    APMImageProcessor(size={"height": STUDENT_SIZE, "width": STUDENT_SIZE}).save_pretrained(tmp_path)
    batch = photo_batch(task.teacher)
    trigger = batch.embeds()[:, 0]
    with torch.no_grad():
        expected = cosines(task, model(trigger_column=trigger).pooler_output)
    torch.testing.assert_close(APMForward(model=str(tmp_path))(task, batch).logits, expected, atol=1e-3, rtol=1e-3)
    method = APMAdapted(start="model", model=str(tmp_path), overrides=QUICK, num_views=3)
    adapted = adapt(model, None, method.targets(task, batch.embeds(3)), config=method.config, trigger_column=trigger)
    expected = cosines(task, adapted.image_embeds)
    torch.testing.assert_close(method(task, batch).logits, expected, atol=1e-3, rtol=1e-3)


def test_the_random_control_understands_nothing_but_is_the_same_in_every_run(task):
    method = APMForward(start="random", name="apm_random")
    state = torch.get_rng_state()
    first = method(task, photo_batch(task.teacher)).logits
    assert torch.get_rng_state().equal(state), "it drew from everybody's random numbers"
    apm_methods._STUDENTS.clear()
    torch.manual_seed(99)
    torch.testing.assert_close(method(task, photo_batch(task.teacher)).logits, first, rtol=0, atol=0)
    other = replace(method, seed=1)(task, photo_batch(task.teacher)).logits
    assert (other - first).abs().max() > 0.1


def test_a_model_is_made_once_for_all_methods_and_goes_with_its_teacher(tmp_path):
    teacher = load_teacher(save_clip(tmp_path), device="cpu")
    first = load_student(teacher, "random", None, seed=0)
    assert load_student(teacher, "random", None, seed=0) is first
    assert load_student(teacher, "random", None, seed=1) is not first
    assert len(apm_methods._STUDENTS) == 1
    del teacher
    assert len(apm_methods._STUDENTS) == 0


def test_models_that_do_not_fit_the_teacher_are_refused(task, tmp_path):
    student(feature_size=20).save_pretrained(tmp_path / "wide")
    with pytest.raises(ValueError, match=f"as wide as the teacher's, {FEATURE_SIZE}, got 20"):
        APMForward(model=str(tmp_path / "wide"))(task, photo_batch(task.teacher))
    save_classifier(tmp_path / "vit")
    with pytest.raises(ValueError, match="model: expected an APM"):
        APMForward(model=str(tmp_path / "vit"))(task, photo_batch(task.teacher))
    with pytest.raises(ValueError, match="model: expected the folder or name of a distilled APM, got none"):
        APMForward()(task, photo_batch(task.teacher))


# By name.


def test_every_method_by_name_gives_finite_logits_for_a_real_teacher(task, folder):
    methods = make_methods(list(METHODS), num_views=3, model=folder, teacher=task.teacher)
    batch = photo_batch(task.teacher, range(3))
    batch.earlier = torch.zeros(0, FEATURE_SIZE)
    for method in methods:
        if isinstance(method, APMAdapted) and method.preset == "paper":
            method = replace(method, overrides={**method.overrides, "steps": 2})
        output = method(task, batch)
        assert output.logits.shape == (3, len(LABELS)) and output.logits.isfinite().all(), method.name
        assert output.logits.device.type == "cpu" and not output.logits.requires_grad
        if isinstance(method, APMAdapted):
            assert output.steps.shape == (3,) and max(output.by_step) == method.config.steps


def test_names_baselines_and_views_are_consistent():
    for name, factory in METHODS.items():
        method = factory()
        assert method.name == name and re.fullmatch("[a-z0-9_]+", name)
        assert method.title and method.title not in [other().title for key, other in METHODS.items() if key != name]
        if method.baseline is None:
            assert name in ("zero_shot", "mean_views")
        else:
            baseline = METHODS[method.baseline]()
            assert baseline.baseline is None
            assert (baseline.num_views > 1) == (method.num_views > 1)
    assert [name for name in METHODS if METHODS[name]().sequential] == ["recentred_stream"]


def test_options_reach_the_methods_that_have_them():
    names = ["zero_shot", "zero", "tpt", "apm_fast_stable", "apm_fast_views", "apm_distilled_fast", "apm_random"]
    methods = make_methods(names, num_views=5, model="folder", seed=7, record_steps=False)
    assert [method.name for method in methods] == names
    zero_shot, zero, tpt, stable, views, distilled, random = methods
    assert zero_shot.num_views == 1 and zero.num_views == tpt.num_views == views.num_views == 5
    assert stable.num_views == 1 and stable.config.stop == "stable" and stable.config.seed == 7
    assert distilled.model == "folder" and distilled.config.start == "model" and random.seed == 7
    assert random.model is None and not stable.record_steps
    assert make_methods(["apm_fast"])[0].record_steps
    assert make_methods(["apm_output_bias"])[0].config.fit == "output_bias"


def test_names_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(ValueError, match="methods: expected some of zero_shot, .*, got 'none', 'nothing'"):
        make_methods(["none", "zero", "nothing"])
    with pytest.raises(ValueError, match="methods: expected each once"):
        make_methods(["zero", "zero"])
    with pytest.raises(ValueError, match="apm_distilled: expected a distilled APM"):
        make_methods(["zero_shot", "apm_distilled"])
    with pytest.raises(ValueError, match="apm_distilled_fast: expected a distilled APM"):
        make_methods(["apm_distilled_fast"])
    with pytest.raises(ValueError, match="num_views, keep: expected"):
        make_methods(["zero"], num_views=0)
    classifier = load_teacher(save_classifier(tmp_path), device="cpu")
    with pytest.raises(ValueError, match="tpt: expected a teacher with a text tower"):
        make_methods(["tpt"], teacher=classifier)
    assert isinstance(make_methods(["tpt"])[0], TPT)
