"""Run transformers' own common tests of models, configurations and image processors on APM.

Other options than those below are pytest's.

    python scripts/run_transformers_tests.py --work_dir /tmp/transformers_tests

They are no part of its wheel: the source of the installed version is fetched from the package index, once.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import transformers

OURS = Path(__file__).resolve().parents[1] / "tests" / "transformers_common"

# Its source comes without these, which its common tests import: mixins of other tests, and a fetcher of test data.
STAND_INS = {
    "tests/exporters/test_export.py": "class ExportTesterMixin: pass\n",
    "tests/generation/test_utils.py": "class GenerationTesterMixin: pass\n",
    "tests/utils/test_configuration_utils.py": 'config_common_kwargs = {"return_dict": False}\n',
    "fetch_hub_objects_for_ci.py": "def url_to_local_path(url): return url\n",
}


def fetched_tests(work_dir: Path) -> Path:
    """Return the folder with the source of the installed transformers, its tests of other models left out."""
    name = f"transformers-{transformers.__version__}"
    if not (work_dir / name).exists():
        index = ["--no-deps", "--no-build-isolation", "--no-binary", "transformers", name.replace("-", "==")]
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--dest", work_dir, *index], check=True)
        with tarfile.open(work_dir / f"{name}.tar.gz") as source:
            source.extractall(work_dir, filter="data")
        shutil.rmtree(work_dir / name / "src")  # the installed one is tested
    return work_dir / name


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work_dir", type=Path, required=True, help="folder for the source and what the tests need")
    options, pytest_options = parser.parse_known_args()
    options.work_dir.mkdir(parents=True, exist_ok=True)
    root, beside = fetched_tests(options.work_dir.resolve()), options.work_dir.resolve() / "packages"
    if not beside.exists():
        subprocess.run(
            [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", beside, "parameterized"],
            check=True,
        )
    target = root / "tests" / "models" / "apm"
    target.mkdir(parents=True, exist_ok=True)
    for ours in OURS.glob("*.py"):
        shutil.copyfile(ours, target / f"test_{ours.name}")
    for name, content in STAND_INS.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(content)
    for folder in (target, *(path for path in (root / "tests").iterdir() if path.is_dir()), root / "tests"):
        (folder / "__init__.py").touch()
    command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", "-p", "no:cacheprovider", "tests/models/apm"]
    path = os.pathsep.join(map(str, (beside, root)))
    return subprocess.run([*command, *pytest_options], cwd=root, env={**os.environ, "PYTHONPATH": path}).returncode


if __name__ == "__main__":
    sys.exit(main())
