"""The page: three tabs of widgets around `islands_tab`, `labels_tab` and `blend_tab`.

Uploads, and what they gave, are kept for the visitor's session alone, and dropped after an hour. They come as paths,
and are decoded by `uploads`, so that every file that cannot be used gets a clear sentence.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from .. import __version__
from .blend_tab import Blend, blend, blend_pictures
from .islands_tab import HEIGHTS, PhotoFeatures, island_pictures, photo_features, point_of_pixel, similarity_picture
from .labels_tab import adaptation, curve_picture
from .models import AppModels, example_scenes
from .pictures import figures_html, scores_html
from .uploads import MAX_LABELS, read_labels, read_upload, shown_size, unknown_labels

_TITLE = "Asynchronous Perception Machine"
_SESSION_SECONDS, _SWEEP_SECONDS = 3600, 600  # how long what a visitor gave is kept; how often it is swept away
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
    """The page, to be launched with [`page_style`]. It opens with drawn scenes already looked at."""
    scenes = example_scenes()
    kept = (_SWEEP_SECONDS, _SESSION_SECONDS)
    with gr.Blocks(title=_TITLE, analytics_enabled=False, delete_cache=kept) as page:
        gr.Markdown(_introduction(models), elem_classes="apm-intro")
        with gr.Tab("Islands"):
            _islands_tab(models, scenes)
        with gr.Tab("Labels"):
            _labels_tab(models, scenes)
        with gr.Tab("Blends"):
            _blend_tab(models, scenes)
        gr.Markdown(f"apm_hf {__version__}. Photos are dropped after an hour, and used for nothing else.")
    page.queue(max_size=_WAITING, default_concurrency_limit=_AT_ONCE)
    return page


def _introduction(models: AppModels) -> str:
    size = f"{models.model.num_parameters() / 1e6:.1f} M parameters"
    if models.apm.is_embedded:
        names = ", ".join(models.apm.default_labels)
        known = (
            f"**What this one knows:** it is the demo model of the package ({size}). It and its teacher learnt twelve "
            f"kinds of *drawn scenes* ({names}) and have never seen a photograph. Scenes like the examples work as "
            "meant; in your own photos expect regions of colour and edges, not objects."
        )
    else:
        teacher = "" if models.teacher is None else f", compared with its teacher {models.teacher.name}"
        known = f"**Here:** an APM of {size}{teacher}."
    return (
        f"# {_TITLE}\nAn image is folded into one vector; a small network then answers, for any place asked about, "
        "with the feature a large vision model would give it. Neighbouring places that agree form *islands*: parts "
        f"and wholes. [Paper](https://arxiv.org/abs/2410.20535)\n\n{known}"
    )


def _islands_tab(models: AppModels, scenes: list[Image.Image]) -> None:
    def see(
        image: Image.Image, y: float | None, x: float | None, *numbers: int | None
    ) -> tuple[PhotoFeatures, str, str]:
        seen = photo_features(models, image)
        islands, made_of = island_pictures(models, seen, [number or 0 for number in numbers])
        html = figures_html(islands, "Islands of agreement") + figures_html(made_of, "What they are made of")
        return seen, html, like(seen, y or 0.0, x or 0.0)

    def like(seen: PhotoFeatures, y: float | None, x: float | None) -> str:
        if y is None or x is None:
            raise ValueError("Please write both y and x, numbers from -1 to 1.")
        return figures_html([similarity_picture(models, seen, (y, x))], columns=1)

    def see_upload(path: str | None, *settings: Any) -> Any:
        return see(read_upload(path), *settings)

    def like_place(seen: PhotoFeatures | None, path: str | None, y: float | None, x: float | None) -> str:
        return like(seen or photo_features(models, read_upload(path)), y, x)

    def like_click(seen: PhotoFeatures | None, path: str, event: gr.SelectData) -> Any:
        column, row = event.index
        y, x = point_of_pixel(column, row, shown_size(path))
        return like_place(seen, path, y, x), round(y, 3), round(x, 3)

    first_seen, first_islands, first_similar = see(scenes[0], 0.0, 0.0, *HEIGHTS)
    seen = gr.State(first_seen, time_to_live=_SESSION_SECONDS)
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            photo = _photo("Photo: click a point, × for another", "islands-photo", scenes[0])
            similar = gr.HTML(first_similar, elem_id="similar")
            with gr.Row():
                place = [
                    gr.Number(
                        0, label=label, minimum=-1, maximum=1, step=0.05, min_width=80, elem_id=f"point-{label[0]}"
                    )
                    for label in ("y: -1 top, 1 bottom", "x: -1 left, 1 right")
                ]
            compare = gr.Button("Show what is like this point", elem_id="point-show")
        with gr.Column(scale=5, min_width=300):
            _examples(scenes, photo)
            with gr.Row(equal_height=True):
                heights = [
                    gr.Number(number, label=name, precision=0, minimum=1, maximum=500, min_width=80)
                    for name, number in zip(("Wholes", "Parts", "Sub-parts"), HEIGHTS, strict=True)
                ]
                show = gr.Button("Show the islands", variant="primary", elem_id="islands-show", min_width=200)
            islands = gr.HTML(first_islands, elem_id="islands")

    inputs, outputs = [photo, *place, *heights], [seen, islands, similar]
    _on_change([photo], see_upload, inputs, outputs)
    show.click(_telling(see_upload, None, "", ""), inputs, outputs, api_visibility="private")
    photo.select(_telling(like_click, *[gr.skip()] * 3), [seen, photo], [similar, *place], api_visibility="private")
    compare.click(_telling(like_place, gr.skip()), [seen, photo, *place], similar, api_visibility="private")


def _labels_tab(models: AppModels, scenes: list[Image.Image]) -> None:
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            photo = _photo("Photo, × for another", "labels-photo", scenes[1])
            _examples(scenes, photo)
            labels = gr.Textbox(
                ", ".join(models.apm.default_labels), lines=3, elem_id="labels",
                label=f"Labels, 2 to {MAX_LABELS}, with commas between them",
            )  # fmt: skip
            starts = [("the distilled APM", "model"), ("an APM with random weights", "random")]
            start = gr.Radio(starts, value="random", label="Adaptation starts from")
            num_steps = gr.Slider(10, 200, value=60, step=10, label="Steps")
            adapt = gr.Button("Adapt to this photo", variant="primary", elem_id="adapt")
        with gr.Column(scale=5, min_width=300):
            gr.Markdown(_WHAT_ADAPTATION_IS)
            with gr.Row():
                with gr.Column(scale=5, min_width=320):
                    scores = gr.HTML(elem_id="scores")
                with gr.Column(scale=4, min_width=320):
                    curve = gr.HTML(elem_id="curve")

    def adapt_live(path: str | None, text: str, start: str, num_steps: int) -> Iterator[Any]:
        image, names = read_upload(path), read_labels(text)
        if models.teacher is not None and (unknown := unknown_labels(models.teacher, names)):
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


def _blend_tab(models: AppModels, scenes: list[Image.Image]) -> None:
    def take(first: Image.Image, second: Image.Image, patches: str, alpha: float) -> tuple[Blend, str]:
        taken = blend(models, first, second, patches=patches)
        return taken, pictures(taken, alpha)

    def pictures(taken: Blend, alpha: float) -> str:
        return figures_html(blend_pictures(taken, alpha), columns=2)

    def take_uploads(first: str | None, second: str | None, patches: str, alpha: float) -> tuple[Blend, str]:
        photos = []
        for name, path in (("A", first), ("B", second)):
            try:
                photos.append(read_upload(path))
            except ValueError as error:
                raise ValueError(f"Photo {name}: {error}") from error
        return take(photos[0], photos[1], patches, alpha)

    def move(taken: Blend | None, *settings: Any) -> str:
        return take_uploads(*settings)[1] if taken is None else pictures(taken, settings[-1])

    first_way, first_blend = take(scenes[2], scenes[3], "blend", 0.5)
    way = gr.State(first_way, time_to_live=_SESSION_SECONDS)
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            with gr.Row():
                photos = [
                    _photo(f"Photo {name}", f"blend-{name}", scene)
                    for name, scene in zip("AB", scenes[2:4], strict=True)
                ]
            for name, photo in zip("AB", photos, strict=True):
                _examples(scenes, photo, f"Drawn scenes for photo {name}")
        with gr.Column(scale=5, min_width=300):
            share = gr.Slider(
                0, 1, value=0.5, step=0.05, label="Share of photo B in the trigger column", elem_id="share"
            )
            patches = gr.Radio(
                [("both photos, cross-faded", "blend"), ("photo A", "a"), ("photo B", "b")],
                value="blend",
                label="Local patches in the queries are those of",
                visible=models.model.config.local_patch,
            )
            between = gr.HTML(first_blend, elem_id="between")
            gr.Markdown(_WHAT_A_BLEND_IS, visible=models.model.config.local_patch)

    inputs, outputs = [*photos, patches, share], [way, between]
    _on_change(photos, take_uploads, inputs, outputs)
    patches.change(_telling(take_uploads, None, ""), inputs, outputs, api_visibility="private")
    share.change(
        _telling(move, gr.skip()), [way, *inputs], between,
        trigger_mode="always_last", show_progress="hidden", api_visibility="private",
    )  # fmt: skip


def _photo(label: str, elem_id: str, scene: Image.Image) -> gr.Image:
    photo = gr.Image(
        scene, type="filepath", label=label, elem_id=elem_id, elem_classes="apm-photo", alt_text=label, min_width=120,
        format="png",  # what is shown and taken is what was drawn
        sources=["upload", "clipboard"], buttons=["fullscreen"], interactive=True,
    )  # fmt: skip
    # Gradio would decode it first, and say "Error" where it cannot.
    photo.preprocess = lambda payload: None if payload is None else payload.path
    return photo


def _examples(scenes: list[Image.Image], photo: gr.Image, label: str = "Drawn scenes to try") -> None:
    gr.Examples([[scene] for scene in scenes], photo, label=label, cache_examples=False, api_visibility="private")


def _on_change(photos: list[gr.Image], action: Callable[..., Any], inputs: list[Any], outputs: list[Any]) -> None:
    """Run an action whenever one of its photos is another; a photo that was taken away clears what is shown."""
    empty = [None, *[""] * (len(outputs) - 1)]
    told = _telling(action, *empty)

    def changed(*values: Any) -> Any:
        return empty if None in values[: len(photos)] else told(*values)

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
    const named = button => `Scene ${[...button.parentElement.children].indexOf(button) + 1}`;
    const name = () => document.querySelectorAll('.gallery-item:not([aria-label])')
        .forEach(button => button.setAttribute('aria-label', named(button)));
    new MutationObserver(name).observe(document.body, {childList: true, subtree: true});
    name();
}"""
_WHAT_ADAPTATION_IS = (
    "The teacher looks at the photo once. An APM is then fitted, on this photo alone, until its own pooled feature is "
    "the teacher's embedding: the curve. An APM that is fitted to the end repeats its teacher, mistakes included; "
    "what it said before stands beside."
)
_WHAT_A_BLEND_IS = (
    "The fold into the trigger column is linear, so the blend of two columns is the column of the cross-faded image. "
    "With the local patches of one photo alone, what changes is what the column carries."
)
