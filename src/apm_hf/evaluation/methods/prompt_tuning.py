"""Implement TPT: tune the prompt to one image, classify it, reset (Shu et al. 2022, arXiv:2209.07511).

The embeddings of the words before the class name ("a photo of a") are learnt: one AdamW step per image lowers the
entropy of the mean prediction over the image's most confident views. The image itself is then classified with the
tuned prompt.

Legend: B images, V views, K classes, L tokens of a prompt, n tokens of the context, W width of token embeddings, F
width of the shared space.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...teachers import Teacher
from ...teachers.text import parse_template, tokenizer_options, trained_case
from ...teachers.zero_shot import classify
from .task import ImageBatch, MethodOutput, ZeroShotTask
from .votes import NUM_VIEWS, by_confidence, check_views, num_kept, view_logits


@dataclass(frozen=True, kw_only=True)
class TPT:
    """Tune prompts at test time (TPT).

    Args:
        keep: share of the views whose mean prediction is made more certain, by entropy before tuning.
        num_steps: steps of AdamW with PyTorch's defaults; with 0 the prompt is unchanged.
        learning_rate: learning rate of AdamW.
        chunk_size: prompts per gradient computation; bounds the memory, does not change the result.
    """

    name: str = "tpt"
    title: str = "TPT"
    num_views: int = NUM_VIEWS
    baseline: str | None = "mean_views"
    sequential: bool = False
    keep: float = 0.1
    num_steps: int = 1
    learning_rate: float = 5e-3
    chunk_size: int = 128

    def __post_init__(self) -> None:
        check_views(self.num_views, self.keep)
        if self.num_steps < 0 or not self.learning_rate > 0 or self.chunk_size < 1:
            raise ValueError(
                "num_steps, learning_rate, chunk_size: expected at least 0, above 0 and at least 1, "
                f"got {self.num_steps}, {self.learning_rate} and {self.chunk_size}"
            )

    def check(self, teacher: Teacher) -> None:
        """Raise a ValueError for a teacher without a transformers text tower."""
        if teacher.tokenizer is None:
            raise ValueError(
                f"{self.name}: expected a teacher with a text tower, whose prompts can be tuned, got '{teacher.name}'"
            )

    @torch.inference_mode(False)  # tuning takes gradients even when called in inference mode
    @torch.enable_grad()
    def __call__(self, task: ZeroShotTask, batch: ImageBatch) -> MethodOutput:
        """
        Raises:
            ValueError: for a teacher without a text tower, or templates that `Prompts` refuses.
        """
        self.check(task.teacher)
        prompts = Prompts(task.teacher, task.class_names, task.templates, chunk_size=self.chunk_size)
        views, texts = batch.embeds(self.num_views).clone(), task.text_embeds.clone()  # no inference tensors
        kept = by_confidence(view_logits(task, views))[:, : num_kept(self.num_views, self.keep)]  # (B, n)
        confident = views.take_along_dim(kept[:, :, None], dim=1)  # (B, V, F) -> (B, n, F)
        scale = task.teacher.logit_scale
        rows = []
        for image, some in zip(views[:, 0], confident, strict=True):
            context = self._tune(prompts, texts, some, scale)
            rows.append(classify(image[None], prompts.encode(context), logit_scale=scale))
        return MethodOutput(logits=torch.cat(rows).cpu(), steps=torch.full((len(rows),), self.num_steps))

    def _tune(self, prompts: "Prompts", texts: Tensor, views: Tensor, scale: float) -> Tensor:
        """Return the context `(n, W)` tuned from the prompts' initial one, whose class embeddings are `texts`."""
        context = prompts.context.clone().requires_grad_()
        optimizer = torch.optim.AdamW([context], lr=self.learning_rate)
        for step in range(self.num_steps):
            # The gradient is taken at the class embeddings first, so that prompts can go through the tower in chunks.
            leaf = (prompts.encode(context) if step else texts.clone()).requires_grad_()
            marginal = classify(views, leaf, logit_scale=scale).log_softmax(dim=1).logsumexp(dim=0).log_softmax(dim=0)
            (-(marginal.exp() * marginal).sum()).backward()
            assert leaf.grad is not None
            prompts.backward(context, leaf.grad)
            optimizer.step()
            optimizer.zero_grad()
        return context.detach()


class Prompts:
    """Encode K prompts that share their first words, whose token embeddings can be replaced.

    Args:
        teacher: with a text tower.
        class_names: K names; equal ones share a prompt.
        templates: one template, with words before the class name.
        chunk_size: prompts in the text tower at a time.

    Raises:
        ValueError: for another number of templates, for one without words before the name, or if the tokenizer
            merges the words and the name into one token, or pads on the left.
    """

    def __init__(self, teacher: Teacher, class_names: list[str], templates: tuple[str, ...], *, chunk_size: int):
        if len(templates) != 1:
            raise ValueError(f"templates: expected one prompt to tune, got {len(templates)}")
        first, *rest = parse_template(templates[0])
        words = (first or "").strip()
        if not words:
            raise ValueError(f"templates: expected words before the class name, to be tuned, got {templates[0]!r}")
        self.model: Any = teacher.model
        self.token_embedding: nn.Module = self.model.text_model.get_input_embeddings()

        unique = list(dict.fromkeys(class_names))
        self.rows = torch.tensor([unique.index(name) for name in class_names], device=teacher.device)
        names = [name.replace("_", " ") for name in unique]  # as `Teacher.encode_text`
        texts = ["".join(name if part is None else part for part in (first, *rest)) for name in names]
        words, *texts = trained_case(self.model, [words, *texts])
        if teacher.tokenizer.padding_side != "right":
            raise ValueError(f"teacher: expected a tokenizer that pads on the right, got '{teacher.name}'")
        options = tokenizer_options(self.model, teacher.tokenizer)
        unpadded = {name: options[name] for name in ("truncation", "max_length")}
        tokens = teacher.tokenizer(texts, **unpadded)["input_ids"]
        context = teacher.tokenizer(words, add_special_tokens=False)["input_ids"]
        framed = teacher.tokenizer(words)["input_ids"]  # between the tokens that begin and end a text
        start = next(place for place in range(len(framed)) if framed[place : place + len(context)] == context)
        self.place = slice(start, start + len(context))
        for text, one in zip(texts, tokens, strict=True):
            if one[self.place] != context:
                raise ValueError(f"templates: expected tokens of their own for {words!r} in front of {text!r}")
        with torch.no_grad():
            self.context = self.token_embedding(torch.tensor(context, device=teacher.device)).float()  # (n, W)

        # Prompts are sorted by length to compute less padding.
        order = sorted(range(len(texts)), key=lambda row: len(tokens[row]))
        self.chunks = []
        for first_of_chunk in range(0, len(order), chunk_size):
            places = order[first_of_chunk : first_of_chunk + chunk_size]
            inputs = teacher.tokenizer([texts[row] for row in places], return_tensors="pt", **options)
            self.chunks.append((torch.tensor(places, device=teacher.device), inputs.to(teacher.device)))

    @torch.no_grad()
    def encode(self, context: Tensor) -> Tensor:
        """Return `(K, F)` float32 unit rows, with the context `(n, W)` in place of the prompts' initial one."""
        parts = [self._encode(inputs, context) for _, inputs in self.chunks]
        texts = torch.cat(parts)[torch.cat([places for places, _ in self.chunks]).argsort()]
        return texts[self.rows]

    def backward(self, context: Tensor, gradient: Tensor) -> None:
        """Backpropagate a gradient `(K, F)` at the result of `encode` into `context.grad`."""
        num_unique = sum(len(places) for places, _ in self.chunks)
        shared = gradient.new_zeros(num_unique, gradient.shape[1]).index_add(0, self.rows, gradient)
        for places, inputs in self.chunks:
            self._encode(inputs, context).backward(shared[places])

    def _encode(self, inputs: Any, context: Tensor) -> Tensor:
        with self._replaced(context):
            embeds = self.model.get_text_features(**inputs).pooler_output
        return F.normalize(embeds.float(), dim=-1)

    @contextmanager
    def _replaced(self, context: Tensor) -> Iterator[None]:
        """Insert the context into the token embeddings: CLIP's text tower takes no embeddings as input."""

        def replace(module: nn.Module, inputs: Any, embeds: Tensor) -> Tensor:
            new = context.to(embeds.dtype).expand(len(embeds), -1, -1)  # (n, W) -> (K', n, W)
            return torch.cat([embeds[:, : self.place.start], new, embeds[:, self.place.stop :]], dim=1)

        handle = self.token_embedding.register_forward_hook(replace)
        try:
            yield
        finally:
            handle.remove()
