"""The notebooks run from the first cell to the last, on small parameters and without a network."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SMALL = {
    "first_look": "",
    "distil_and_judge": "NUM_IMAGES, NUM_STEPS = 12, 6",
    "adapt_and_compare": "NUM_SCENES = 4",
}


def test_notebooks_run_from_the_first_cell_to_the_last():
    """In one process for all: importing torch and transformers takes longer than what they do."""
    printed = {}
    everything = nbformat.v4.new_notebook()
    for path in NOTEBOOKS:
        notebook = nbformat.read(path, as_version=4)
        cells = [cell for cell in notebook.cells if "install" not in cell.metadata.get("tags", ())]
        for cell in cells:
            if "parameters" in cell.metadata.get("tags", ()):
                cell.source = SMALL[path.stem]
        everything.cells += [nbformat.v4.new_code_cell("%reset -f"), *cells]
        printed[path.stem] = cells
    NotebookClient(everything, timeout=300, kernel_name="python3").execute(cwd=ROOT)
    for name, cells in printed.items():
        text = "".join(output.get("text", "") for cell in cells for output in cell.get("outputs", ()))
        assert re.search(r"\d\.\d\d|\d+%", text), name


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_small_and_install_from_the_repository(path):
    assert path.stat().st_size < 100_000
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    repository = re.search(r"^  repository: (\S+)", (ROOT / "mkdocs.yml").read_text(), re.M)[1]
    install = [cell.source for cell in notebook.cells if "install" in cell.metadata.get("tags", ())]
    assert len(install) == 1 and f"@ git+{repository}" in install[0]
    address = repository.removeprefix("https://github.com")
    assert (
        f"https://colab.research.google.com/github{address}/blob/main/notebooks/{path.name}"
        in notebook.cells[0].source
    )
    ran = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source not in install]
    assert [cell.execution_count for cell in ran] == list(range(1, len(ran) + 1))  # once, in order
    assert not any(output.output_type == "error" for cell in ran for output in cell.outputs)


def test_every_notebook_has_small_parameters():
    assert {path.stem for path in NOTEBOOKS} == set(SMALL)
