"""The app: an APM tried in the browser. Photos in, islands, similarity, adaptation and blends out.

`apm app` and the Space in `examples/space` call [`launch`]:

    launch(model=None, teacher=None, port=None, share=False, *, host=None, open_browser=False, block=True)

What it computes stands apart from the page: `islands_tab`, `labels_tab` and `blend_tab` are plain functions from
pictures and settings to pictures and numbers, and need no gradio; `page` holds the widgets.
"""

from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import gradio

# Bytes of one upload; larger photos say little more to models that see a few hundred pixels.
MAX_UPLOAD = "30mb"
# Sessions that Gradio remembers, some 300 kB each; the one that was not used for the longest time leaves first.
MAX_SESSIONS = 100


def launch(
    model: str | None = None,
    teacher: str | None = None,
    port: int | None = None,
    share: bool = False,
    *,
    host: str | None = None,
    open_browser: bool = False,
    block: bool = True,
) -> "gradio.Blocks":
    """Serve the app until it is interrupted; prints its address.

    Nothing is asked from the network: no analytics, no fonts or scripts from elsewhere. Programs call `/islands`,
    `/classify` and `/encode`, also over MCP where the package `mcp` is installed.

    Args:
        model: a distilled APM, name or folder; without model and teacher the embedded ones, of photos.
        teacher: whose features the model was distilled to, name or folder; without one nothing is compared with a
            teacher, and labels cannot be used. Without a model, its dense student in the package.
        port: on which to listen; None is `GRADIO_SERVER_PORT` or the first free one from 7860.
        share: also behind a public address, through Gradio's tunnel.
        host: None is `GRADIO_SERVER_NAME`, which Spaces set, or 127.0.0.1.
        open_browser: show the page in the user's browser.
        block: False returns while the server goes on; its `local_url` says where, its `close()` ends it.

    Returns:
        The `gradio.Blocks` served.

    Raises:
        ImportError: without gradio; says what to install.
        OSError: for a port that is taken.
        ValueError: for a model that is no APM or is as wide as no teacher here, or a teacher alone
            of which the package has no dense student.
    """
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise ImportError('the app needs gradio: pip install "apm_hf[app]"') from error
    from .models import load_models
    from .page import build_page, page_style

    page = build_page(load_models(model, teacher))
    page.launch(
        server_port=port,
        server_name=host,
        share=share,
        inbrowser=open_browser,
        prevent_thread_lock=not block,
        max_file_size=MAX_UPLOAD,
        state_session_capacity=MAX_SESSIONS,
        mcp_server=find_spec("mcp") is not None,
        ssr_mode=False,  # needs Node
        run_history=False,
        enable_monitoring=False,
        footer_links=["api", "settings"],
        **page_style(),
    )
    return page
