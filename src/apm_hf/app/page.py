"""The page: three tabs of widgets around `islands_tab`, `labels_tab` and `blend_tab`, and the endpoints of `api`.

Uploads are dropped after an hour. They come as paths, and are read by `uploads` alone, so that every file that cannot
be used gets a clear sentence. What they gave is found again by these paths in `recent`: sessions hold nothing.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import gradio as gr
from PIL import Image, ImageOps

from .. import __version__
from .api import add_endpoints
from .blend_tab import Blend, blend, blend_pictures
from .islands_tab import (
    HEIGHTS,
    PhotoFeatures,
    island_pictures,
    made_of_pictures,
    photo_features,
    point_of_pixel,
    similarity_picture,
)
from .labels_tab import adaptation, curve_picture
from .models import AppModels
from .pictures import figures_html, scores_html
from .recent import Recent
from .uploads import GONE, MAX_LABELS, Uploads, read_labels

_TITLE = "Asynchronous Perception Machine"
_UPLOAD_SECONDS, _SWEEP_SECONDS = 3600, 600  # how long what a visitor gave is kept; how often it is swept away
# What photos gave, on each tab that needs it again.
_RECENT = {"max_entries": 64, "max_bytes": 128 * 2**20, "max_seconds": _UPLOAD_SECONDS // 2}
_THUMBNAIL = (192, 192)  # pixels of an example that is chosen from, at most
_WAITING, _AT_ONCE = 32, 2  # visitors in the queue; actions computed at a time


def page_style() -> dict[str, Any]:
    """Options of `gradio.Blocks.launch` for how the page looks: fonts of the visitor's system, so none is fetched."""
    theme = gr.themes.Default(
        primary_hue="blue",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    return {"theme": theme, "css_paths": Path(__file__).parent / "style.css", "js": _NAME_EXAMPLES}


def build_page(models: AppModels) -> gr.Blocks:
    """The page, to be launched with [`page_style`]. It opens with examples already looked at."""
    examples = models.examples()
    kept = (_SWEEP_SECONDS, _UPLOAD_SECONDS)
    with gr.Blocks(title=_TITLE, analytics_enabled=False, delete_cache=kept) as page:
        uploads = Uploads(page.GRADIO_CACHE)
        gr.Markdown(_introduction(models), elem_classes="apm-intro")
        with gr.Tab("Islands"):
            _islands_tab(models, examples, uploads)
        with gr.Tab("Labels"):
            _labels_tab(models, examples, uploads)
        with gr.Tab("Blends"):
            _blend_tab(models, examples, uploads)
        gr.Markdown(f"apm_hf {__version__}. Photos are dropped after an hour, and used for nothing else.")
        add_endpoints(models, uploads)
    for block in page.blocks.values():
        _fetch_nothing(block)
    # Closed: no request passes the queue by.
    page.queue(max_size=_WAITING, default_concurrency_limit=_AT_ONCE, api_open=False)
    return page


def _introduction(models: AppModels) -> str:
    size = f"{models.model.num_parameters(only_trainable=True) / 1e6:.1f} M parameters"
    teacher = "" if models.teacher is None else f", compared with its teacher {models.teacher.name}"
    known = f"**Here:** an APM of {size}{teacher}."
    if models.apm.is_embedded:
        known = (
            f"**What this one knows:** it is the small pair in the package ({size}, and its teacher). Both learnt "
            f"photos of {len(models.apm.default_labels)} kinds of things, from accordions to yin-yang signs. The "
            "teacher is often wrong about others, and knows a few hundred words."
        )
    elif models.knows_scenes:
        names = ", ".join(models.apm.default_labels)
        known = (
            f"**What this one knows:** it is the demo's ({size}). It and its teacher learnt twelve kinds of *drawn "
            f"scenes* ({names}) and have never seen a photograph. Scenes like the examples work as meant; in your own "
            "photos expect regions of colour and edges, not objects."
        )
    how = _HOW_A_DENSE_ONE_WORKS if models.apm.is_dense else _HOW_IT_WORKS
    return f"# {_TITLE}\n{how} [Paper](https://arxiv.org/abs/2410.20535)\n\n{known}"


def _islands_tab(models: AppModels, examples: list[Image.Image], uploads: Uploads) -> None:
    recent: Recent[PhotoFeatures] = Recent(**_RECENT)

    def features(path: str | None) -> PhotoFeatures:
        return recent.get(path, lambda: photo_features(models, uploads.read(path)))

    def show_photo(path: str | None, y: float | None, x: float | None, *numbers: int | None) -> tuple[str, str, str]:
        seen = features(path)
        return islands_html(seen, *numbers), made_of_html(seen), similar_html(seen, y or 0.0, x or 0.0)

    def show_islands(path: str | None, *numbers: int | None) -> str:
        return islands_html(features(path), *numbers)

    def islands_html(seen: PhotoFeatures, *numbers: int | None) -> str:
        return figures_html(island_pictures(seen, [number or 0 for number in numbers]), "Islands of agreement")

    def made_of_html(seen: PhotoFeatures) -> str:
        return figures_html(made_of_pictures(models, seen), "What they are made of")

    def like_place(path: str | None, y: float | None, x: float | None) -> str:
        if y is None or x is None:
            raise ValueError("Please write both y and x, numbers from -1 to 1.")
        return similar_html(features(path), y, x)

    def similar_html(seen: PhotoFeatures, y: float, x: float) -> str:
        return figures_html([similarity_picture(models, seen, (y, x))], columns=1)

    def like_click(path: str | None, event: gr.SelectData) -> tuple[str, float, float]:
        column, row = event.index
        y, x = point_of_pixel(column, row, uploads.shown_size(path))
        return like_place(path, y, x), round(y, 3), round(x, 3)

    first = photo_features(models, examples[0])
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            photo = _photo("Photo: click a point, × for another", "islands-photo", examples[0])
            similar = gr.HTML(similar_html(first, 0.0, 0.0), elem_id="similar")
            with gr.Row():
                place = [
                    gr.Number(
                        0, label=label, minimum=-1, maximum=1, step=0.05, min_width=80, elem_id=f"point-{label[0]}"
                    )
                    for label in ("y: -1 top, 1 bottom", "x: -1 left, 1 right")
                ]
            compare = gr.Button("Show what is like this point", elem_id="point-show")
        with gr.Column(scale=5, min_width=300, elem_classes="apm-results"):
            _examples(examples, photo)
            with gr.Row(equal_height=True):
                heights = [
                    gr.Number(
                        number, label=name, precision=0, minimum=1, maximum=500, min_width=80, elem_id=f"num-{name}"
                    )
                    for name, number in zip(("Wholes", "Parts", "Sub-parts"), HEIGHTS, strict=True)
                ]
            islands = gr.HTML(islands_html(first, *HEIGHTS), elem_id="islands")
            made_of = gr.HTML(made_of_html(first), elem_id="made-of")

    _on_change([photo], show_photo, [photo, *place, *heights], [islands, made_of, similar])
    for height in heights:
        height.change(
            _telling(show_islands, gr.skip()), [photo, *heights], islands,
            trigger_mode="always_last", show_progress="hidden", api_visibility="private",
        )  # fmt: skip
    photo.select(_telling(like_click, *[gr.skip()] * 3), photo, [similar, *place], api_visibility="private")
    compare.click(_telling(like_place, gr.skip()), [photo, *place], similar, api_visibility="private")


def _labels_tab(models: AppModels, examples: list[Image.Image], uploads: Uploads) -> None:
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            photo = _photo("Photo, × for another", "labels-photo", examples[1])
            _examples(examples, photo)
            labels = gr.Textbox(
                ", ".join(models.example_labels()), lines=3, elem_id="labels",
                label=f"Labels, 2 to {MAX_LABELS}, with commas between them",
            )  # fmt: skip
            starts = [("the distilled APM", "model"), ("an APM with random weights", "random")]
            can_choose = models.adaptable.is_fitted
            start = gr.Radio(starts, value="random", label="Adaptation starts from", visible=can_choose)
            num_steps = gr.Slider(10, 200, value=60, step=10, label="Steps")
            adapt = gr.Button("Adapt to this photo", variant="primary", elem_id="adapt")
        with gr.Column(scale=5, min_width=300):
            gr.Markdown(_WHAT_ADAPTATION_IS + ("" if can_choose else _OF_A_FRESH_ONE))
            with gr.Row():
                with gr.Column(scale=5, min_width=320):
                    scores = gr.HTML(elem_id="scores")
                with gr.Column(scale=4, min_width=320):
                    curve = gr.HTML(elem_id="curve")

    def adapt_live(path: str | None, text: str, start: str, num_steps: int) -> Iterator[Any]:
        image, names = uploads.read(path), read_labels(text)
        if models.teacher is not None and (unknown := models.teacher.unknown_labels(names)):
            gr.Warning(f"This teacher has no words for: {', '.join(unknown)}. It cannot tell such labels apart.")
        for progress in adaptation(models, image, names, start=start, num_steps=num_steps):
            columns = [
                ("teacher", progress.teacher),
                ("APM before", progress.before),
                (f"APM, step {progress.step}", progress.now),
            ]
            yield (
                figures_html([curve_picture(progress, num_steps)], columns=1),
                scores_html(names, columns, "Probability of each label; the best of each column is bold"),
            )

    adapt.click(
        _telling(adapt_live, "", ""), [photo, labels, start, num_steps], [curve, scores], api_visibility="private"
    )


def _blend_tab(models: AppModels, examples: list[Image.Image], uploads: Uploads) -> None:
    recent: Recent[Blend] = Recent(**_RECENT)

    def between_uploads(first: str | None, second: str | None, patches: str, alpha: float) -> str:
        def blend_uploads() -> Blend:
            return blend(models, read("A", first), read("B", second), patches=patches)

        return pictures(recent.get((first, second, patches), blend_uploads), alpha)

    def read(name: str, path: str | None) -> Image.Image:
        try:
            return uploads.read(path)
        except ValueError as error:
            raise ValueError(f"Photo {name}: {error}") from error

    def pictures(taken: Blend, alpha: float) -> str:
        return figures_html(blend_pictures(taken, alpha), columns=2)

    first = pictures(blend(models, examples[2], examples[3]), 0.5)
    is_dense, local_patch = models.apm.is_dense, models.model.config.local_patch
    what = "teacher's tokens" if is_dense else "trigger column"
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            with gr.Row():
                photos = [
                    _photo(f"Photo {name}", f"blend-{name}", example)
                    for name, example in zip("AB", examples[2:4], strict=True)
                ]
            for name, photo in zip("AB", photos, strict=True):
                _examples(examples, photo, f"Examples for photo {name}")
        with gr.Column(scale=5, min_width=300, elem_classes="apm-results"):
            share = gr.Slider(0, 1, value=0.5, step=0.05, label=f"Share of photo B in the {what}", elem_id="share")
            patches = gr.Radio(
                [("both photos, cross-faded", "blend"), ("photo A", "a"), ("photo B", "b")],
                value="blend",
                label="Local patches in the queries are those of",
                visible=local_patch,
            )
            between = gr.HTML(first, elem_id="between")
            gr.Markdown(_WHAT_A_BLEND_OF_TOKENS_IS if is_dense else _WHAT_A_BLEND_IS, visible=local_patch)

    inputs = [*photos, patches, share]
    _on_change(photos, between_uploads, inputs, [between])
    patches.change(_telling(between_uploads, ""), inputs, between, api_visibility="private")
    share.change(
        _telling(between_uploads, gr.skip()), inputs, between,
        trigger_mode="always_last", show_progress="hidden", api_visibility="private",
    )  # fmt: skip


def _photo(label: str, elem_id: str, example: Image.Image) -> gr.Image:
    photo = gr.Image(
        example, type="filepath", label=label, elem_id=elem_id, elem_classes="apm-photo", alt_text=label,
        min_width=120, format="png",  # what is shown and taken is what was drawn
        sources=["upload", "clipboard"], buttons=["fullscreen"], interactive=True,
    )  # fmt: skip
    # Gradio would open any file that a request names, and say "Error" where it cannot decode it.
    photo.preprocess = lambda payload: None if payload is None else payload.path
    return photo


def _examples(examples: list[Image.Image], photo: gr.Image, label: str = "Examples to try") -> None:
    # `gr.Examples` would put a new `gr.Image` into the session, which opens any file.
    samples = [[ImageOps.contain(example, _THUMBNAIL)] for example in examples]
    shown = gr.Dataset(components=[photo], samples=samples, type="index", label=label)
    shown.click(
        lambda index: examples[index], shown, photo, show_progress="hidden", queue=False, api_visibility="private"
    )


def _fetch_nothing(block: Any) -> None:
    """Let no address that a request names be fetched, which could be slow or endless, by this block.

    Addresses of uploads to this server, which MCP clients send, become the paths of the uploads.
    """
    move = block.async_move_resource_to_block_cache

    async def move_file(path: str | Path | None) -> str | None:
        if not str(path).startswith(("http://", "https://")):
            return await move(path)
        _, found, upload = str(path).partition("/gradio_api/file=")
        if not found:
            raise gr.Error(GONE, print_exception=False)
        return unquote(upload)

    block.async_move_resource_to_block_cache = move_file


def _on_change(photos: list[gr.Image], action: Callable[..., Any], inputs: list[Any], outputs: list[Any]) -> None:
    """Run an action whenever one of its photos is another; a photo that was taken away clears what is shown."""
    empty = [""] * len(outputs)
    told = _telling(action, *empty)

    def changed(*values: Any) -> Any:
        if None not in values[: len(photos)]:
            return told(*values)
        return empty if len(empty) > 1 else empty[0]

    for photo in photos:
        photo.change(changed, inputs, outputs, trigger_mode="always_last", api_visibility="private")


def _telling(action: Callable[..., Any], *instead: Any) -> Callable[..., Any]:
    """An action whose ValueErrors the visitor reads; the page then shows `instead`, and goes on working."""
    shown = instead[0] if len(instead) == 1 else instead

    if inspect.isgeneratorfunction(action):

        @functools.wraps(action)
        def telling(*values: Any) -> Iterator[Any]:
            try:
                yield from action(*values)
            except ValueError as error:
                gr.Warning(str(error), duration=15)
                yield shown

        return telling

    @functools.wraps(action)
    def told(*values: Any) -> Any:
        try:
            return action(*values)
        except ValueError as error:
            gr.Warning(str(error), duration=15)
            return shown

    return told


# Gradio's thumbnails of examples are buttons without a name, for those who hear a page or speak to it.
_NAME_EXAMPLES = """() => {
    const named = button => `Example ${[...button.parentElement.children].indexOf(button) + 1}`;
    const name = () => document.querySelectorAll('.gallery-item:not([aria-label])')
        .forEach(button => button.setAttribute('aria-label', named(button)));
    new MutationObserver(name).observe(document.body, {childList: true, subtree: true});
    name();
}"""
_HOW_IT_WORKS = (
    "An image is folded into one vector; a small network then answers, for any place asked about, with the feature a "
    "large vision model would give it. Neighbouring places that agree form *islands*: parts and wholes."
)
_HOW_A_DENSE_ONE_WORKS = (
    "A vision model reads an image once, as a grid of patches; a small network then answers, for any place asked "
    "about, with the feature that the model would give it, finer than its patches. Neighbouring places that agree are "
    "*islands*: parts and wholes."
)
_WHAT_ADAPTATION_IS = (
    "The teacher looks at the photo once. An APM is then fitted, on this photo alone, until its own pooled feature is "
    "the teacher's embedding: the curve. An APM that is fitted to the end repeats its teacher, mistakes included; "
    "what it said before stands beside."
)
_OF_A_FRESH_ONE = " It begins with random weights here, since the APM of the other tabs reads its teacher's tokens."
_WHAT_A_BLEND_IS = (
    "The fold into the trigger column is linear, so the blend of two columns is the column of the cross-faded image. "
    "With the local patches of one photo alone, what changes is what the column carries."
)
_WHAT_A_BLEND_OF_TOKENS_IS = (
    "The teacher's tokens of the two photos are blended place by place. That is not what the teacher would see in the "
    "cross-faded photo. With the local patches of one photo alone, what changes is what the tokens carry."
)
