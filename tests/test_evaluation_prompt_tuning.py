"""Test-time prompt tuning against a plain loop that rebuilds the text towers from their parts.

Legend: B images, V views, K classes, L tokens of a prompt, W width of token embeddings, F width of the shared space.
"""

import math

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    BertConfig,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    ViTConfig,
    ViTModel,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from apm_hf import load_teacher
from apm_hf.assets import DEMO_TEACHER
from apm_hf.data.scenes import CLASS_NAMES
from apm_hf.evaluation.methods.prompt_tuning import TPT, Prompts
from apm_hf.evaluation.methods.registry import ZeroShot
from apm_hf.evaluation.methods.task import ImageBatch, ZeroShotTask
from apm_hf.evaluation.methods.views import view_encoder
from fixtures_tiny import (
    FEATURE_SIZE,
    TEACHER_SIZE,
    TOWER,
    VISION,
    WORDS,
    photo,
    randomise,
    save_classifier,
    save_clip,
    tokenizer,
)

NAMES = ["a_photo of dog", "cat", "owl", "cat dog", "dog", "owl"]  # lengths differ, and one comes twice
CONTEXT = slice(1, 5)  # "a photo of a" behind [CLS]


def save_dual_encoder(folder):
    """A ViT and a BERT."""
    bert = BertConfig(**TOWER, vocab_size=len(WORDS), max_position_embeddings=16)
    vision = ViTModel(ViTConfig(**VISION))
    config = VisionTextDualEncoderConfig.from_vision_text_configs(vision.config, bert, projection_dim=FEATURE_SIZE)
    randomise(VisionTextDualEncoderModel(config=config)).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": TEACHER_SIZE, "width": TEACHER_SIZE}).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[save_clip, save_dual_encoder], ids=["clip", "bert"])
def teacher(request, tmp_path_factory):
    return load_teacher(request.param(tmp_path_factory.mktemp("teacher")), device="cpu")


@pytest.fixture(scope="module")
def task(teacher):
    return ZeroShotTask.build(teacher, NAMES)


def photo_batch(teacher, seeds=range(3)):
    return ImageBatch([photo(seed) for seed in seeds], list(seeds), list(seeds), view_encoder(teacher))


def naive_text(teacher, context, name):
    """`(F,)`: one prompt through the parts of its tower, with the context put in by hand."""
    ids = teacher.tokenizer(f"a photo of a {name.replace('_', ' ')}.", return_tensors="pt")["input_ids"]
    tower = teacher.model.text_model
    embeds = tower.get_input_embeddings()(ids).clone()
    embeds[:, CONTEXT] = context
    if teacher.model.config.model_type != "clip":
        pooled = tower(inputs_embeds=embeds, attention_mask=torch.ones_like(ids)).pooler_output
    else:
        length = ids.shape[1]
        states = embeds + tower.embeddings.position_embedding.weight[:length]
        mask = torch.full((length, length), -math.inf).triu(1)[None, None]
        states = tower.encoder(inputs_embeds=states, attention_mask=mask).last_hidden_state
        pooled = tower.final_layer_norm(states)[:, ids[0].tolist().index(WORDS.index("[SEP]"))]
    return F.normalize(teacher.model.text_projection(pooled)[0], dim=0)


def naive_tpt(teacher, views, *, keep=0.1, num_steps=1, learning_rate=5e-3):
    """`(K,)` logits and the entropy before every step, for one image's embeddings `(V, F)`."""
    ids = teacher.tokenizer("a photo of a cat.")["input_ids"]
    context = teacher.model.text_model.get_input_embeddings()(torch.tensor(ids))[CONTEXT].detach().clone()
    context.requires_grad_()
    optimizer = torch.optim.AdamW([context], lr=learning_rate)
    views, scale, kept, entropies = F.normalize(views, dim=-1), teacher.logit_scale, None, []

    def logits(view):
        return scale * torch.stack([view @ naive_text(teacher, context, name) for name in NAMES])

    for _ in range(num_steps):
        probabilities = [logits(view).softmax(0) for view in views]
        if kept is None:
            certain = [float((p.detach() * p.detach().log()).sum()) for p in probabilities]
            order = sorted(range(len(views)), key=lambda row: -certain[row])
            kept = order[: max(1, int(keep * len(views)))]
        mean = sum(probabilities[row] for row in kept) / len(kept)
        entropy = -(mean * mean.log()).sum()
        entropies.append(entropy.item())
        optimizer.zero_grad()
        entropy.backward()
        optimizer.step()
    return logits(views[0]).detach(), entropies


@pytest.mark.parametrize(
    "options",
    [
        {"keep": 0.4},
        {"keep": 0.1, "learning_rate": 2e-2},
        {"keep": 0.6, "num_steps": 3},
        {"keep": 1.0, "num_steps": 2, "chunk_size": 2},
    ],
    ids=str,
)
def test_prompts_are_tuned_as_by_a_plain_loop(task, options):
    batch = photo_batch(task.teacher)
    output = TPT(num_views=5, **options)(task, batch)
    logits = output.logits
    assert output.steps.tolist() == [options.get("num_steps", 1)] * 3
    options = {name: value for name, value in options.items() if name != "chunk_size"}
    for row, views in zip(logits, batch.embeds(5), strict=True):
        expected, entropies = naive_tpt(task.teacher, views, **options)
        torch.testing.assert_close(row, expected, atol=3e-4, rtol=3e-4)
        assert entropies == sorted(entropies, reverse=True), "the entropy does not fall"
    assert (logits - ZeroShot()(task, batch).logits).abs().max() > 1e-2


def test_without_a_step_the_prompt_is_what_it_was(task):
    batch, scale = photo_batch(task.teacher), task.teacher.logit_scale
    untouched = TPT(num_views=5, num_steps=0)(task, batch).logits
    torch.testing.assert_close(untouched / scale, ZeroShot()(task, batch).logits / scale, atol=1e-6, rtol=0)
    prompts = Prompts(task.teacher, NAMES, task.templates, chunk_size=2)
    torch.testing.assert_close(prompts.encode(prompts.context), task.text_embeds, atol=1e-6, rtol=0)


def test_gradients_in_chunks_are_those_of_all_classes_at_once(teacher):
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(len(NAMES), FEATURE_SIZE, generator=generator)
    prompts = Prompts(teacher, NAMES, ("a photo of a {}.",), chunk_size=2)
    assert len(prompts.chunks) == 3
    context = prompts.context.clone().requires_grad_()
    prompts.backward(context, weights)
    plain = prompts.context.clone().requires_grad_()
    (torch.stack([naive_text(teacher, plain, name) for name in NAMES]) * weights).sum().backward()
    torch.testing.assert_close(context.grad, plain.grad, atol=1e-4, rtol=1e-4)
    assert plain.grad.abs().max() > 0.1


def test_every_image_has_a_prompt_of_its_own(task):
    method = TPT(num_views=4, keep=0.5, learning_rate=0.05)
    together = method(task, photo_batch(task.teacher)).logits
    for row in (2, 0):
        alone = method(task, photo_batch(task.teacher, [row])).logits[0]
        torch.testing.assert_close(alone, together[row], atol=1e-3, rtol=1e-3)


def test_the_teacher_is_left_as_it_was(task):
    teacher, before = task.teacher, {name: weight.clone() for name, weight in task.teacher.model.state_dict().items()}
    TPT(num_views=4)(task, photo_batch(teacher))
    torch.testing.assert_close(dict(teacher.model.state_dict()), before, rtol=0, atol=0)
    assert not teacher.model.text_model.get_input_embeddings()._forward_hooks
    assert all(weight.grad is None and not weight.requires_grad for weight in teacher.model.parameters())
    torch.testing.assert_close(teacher.encode_text(["cat"]), task.text_embeds[1:2], atol=1e-6, rtol=0)


def test_the_hook_goes_even_where_the_tower_fails(teacher):
    prompts = Prompts(teacher, NAMES, ("a photo of a {}.",), chunk_size=8)
    with pytest.raises(RuntimeError):
        prompts.encode(torch.zeros(4, 3))
    assert not prompts.token_embedding._forward_hooks


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_it_works_where_gradients_are_switched_off(task, mode):
    method = TPT(num_views=3, keep=0.5)
    expected = method(task, photo_batch(task.teacher)).logits
    with mode():
        again = method(ZeroShotTask.build(task.teacher, NAMES), photo_batch(task.teacher)).logits
    torch.testing.assert_close(again, expected, atol=1e-4, rtol=1e-4)
    assert not again.requires_grad and not again.is_inference()


def test_the_teacher_in_the_package_can_be_tuned():
    teacher = load_teacher(DEMO_TEACHER, device="cpu")
    task = ZeroShotTask.build(teacher, CLASS_NAMES)
    batch = photo_batch(teacher, range(2))
    untouched, tuned = (TPT(num_views=4, num_steps=steps)(task, batch).logits for steps in (0, 1))
    torch.testing.assert_close(untouched, ZeroShot()(task, batch).logits, atol=2e-5, rtol=0)
    assert 1e-3 < (tuned - untouched).abs().max() < 20


def test_other_words_before_the_name_are_tuned_too(teacher):
    templates = {"a photo of {}": 3, "a {class} photo.": 1, "the photo of {}": 3, "photo of a photo of a {}.": 6}
    for template, words in templates.items():
        prompts = Prompts(teacher, ["cat", "dog"], (template,), chunk_size=8)
        assert len(prompts.context) == words
        expected = teacher.encode_text(["cat", "dog"], [template])
        torch.testing.assert_close(prompts.encode(prompts.context), expected, atol=1e-6, rtol=0)
        moved = prompts.encode(-2 * prompts.context)
        assert (moved - expected).abs().max() > 1e-2


def test_templates_that_cannot_be_tuned_are_refused(teacher):
    for templates, message in (
        (("a photo of a {}.", "a {}"), "templates: expected one prompt to tune, got 2"),
        (("{} photo",), "templates: expected words before the class name"),
    ):
        with pytest.raises(ValueError, match=message):
            Prompts(teacher, NAMES, templates, chunk_size=8)


def test_words_that_melt_into_the_name_are_refused(teacher):
    with pytest.raises(ValueError, match="templates: expected tokens of their own for 'a ca' in front of 'a cat'"):
        Prompts(teacher, ["t"], ("a ca{}",), chunk_size=8)


def test_a_teacher_without_a_text_tower_is_refused(tmp_path):
    teacher = load_teacher(save_classifier(tmp_path), device="cpu")
    task = ZeroShotTask.build(teacher, teacher.class_names)
    with pytest.raises(ValueError, match="tpt: expected a teacher with a text tower, whose prompts can be tuned, got"):
        TPT(num_views=2)(task, photo_batch(teacher))


@pytest.mark.parametrize("options", [{"num_steps": -1}, {"learning_rate": 0}, {"chunk_size": 0}, {"keep": 2}])
def test_options_outside_their_range_are_refused(options):
    with pytest.raises(ValueError, match="expected at least"):
        TPT(**options)
