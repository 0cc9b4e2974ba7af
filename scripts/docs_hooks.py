"""Change two things while mkdocs makes the site.

* Pages may link to files beside docs/, as `../examples/train.py`: in the site these links lead to the repository.
* Docstrings name other things as [`APM.load`], for editors that follow such names: in the site the brackets go.
"""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(\]\()((?:\.\./)+[^)#\s]+)")
NAME = re.compile(r"\[(<code>[^<]+</code>)\]")


def on_page_markdown(markdown, page, config, files):
    """Return a page with links to files outside of docs/ replaced by links to the repository."""
    folder = Path(page.file.abs_src_path).parent

    def replaced(found):
        target = (folder / found[2]).resolve()
        if target.is_relative_to(config.docs_dir) or not target.exists():
            return found[0]  # mkdocs says what is missing
        return f"{found[1]}{config.extra['repository']}/blob/main/{target.relative_to(ROOT).as_posix()}"

    return LINK.sub(replaced, markdown)


def on_page_content(html, page, config, files):
    """Return a page of the API without brackets around names."""
    return NAME.sub(r"\1", html) if page.file.src_uri.startswith("api/") else html
