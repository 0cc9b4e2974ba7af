"""Start-up: what `import apm_hf`, the command and `from_pretrained` cost, beside what they cannot do without.

    python benchmarks/startup.py --quick
    python benchmarks/startup.py

Whole processes, and loads within one, are interleaved with their rivals, and the smallest time of each is taken. The
exit status is 1 where a figure misses its goal:

* `import apm_hf` adds less than 0.3 s to `import transformers`, and as little to Auto classes that are there already;
* `apm --help` takes less than 0.3 s more than a Python that does nothing;
* a model of 54 M parameters is loaded, and every page of it looked at, within twice the time that the same takes with
  `safetensors.torch.load_file`, and 0.1 s for what transformers does beside: from the disk and from the page cache.

`load_file` and `from_pretrained` map the file into memory and read nothing until a weight is looked at. Hence the look
at every page; without one both would seem to be faster than any disk. What "disk" is, only the machine knows: a
virtual one may answer from its host's memory.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

IMPORT_GOAL = 0.3  # seconds
LOAD_FACTOR, LOAD_CONSTANT = 2.0, 0.1
PAGE = 4096  # bytes

# Each prints how long its `import apm_hf` took, where it has one.
CLOCK = "import time; t = time.perf_counter(); import apm_hf; print(time.perf_counter() - t)"
AUTO = "from transformers import AutoModel"
FIRST, TRANSFORMERS, AUTO_MODEL = f"{CLOCK}; {AUTO}", "import transformers", AUTO
AFTER_TRANSFORMERS, AFTER_AUTO = f"{TRANSFORMERS}; {CLOCK}", f"{AUTO}; {CLOCK}"


@dataclass(frozen=True)
class Figure:
    """One comparison; all times are the smallest of interleaved repeats, in seconds.

    Args:
        name: what was measured.
        seconds: what it took.
        rival: what it is compared with.
        rival_seconds: what that took.
        limit: what `seconds` may be at most; None where there is no goal.
    """

    name: str
    seconds: float
    rival: str
    rival_seconds: float
    limit: float | None = None

    @property
    def ratio(self) -> float:
        return self.seconds / self.rival_seconds

    @property
    def missed(self) -> bool:
        return self.limit is not None and self.seconds > self.limit

    def __str__(self) -> str:
        goal = "" if self.limit is None else f"  goal <= {self.limit:.3f} s: {'MISSED' if self.missed else 'met'}"
        return (
            f"{self.name:<48} {self.seconds:8.3f} s  {self.ratio:7.2f} x {self.rival} {self.rival_seconds:.3f} s{goal}"
        )


def figures(*, repeats: int = 5, load_repeats: int = 9, preset: str = "dinov2-large") -> list[Figure]:
    """All of them; a minute or two on an idle machine with five repeats.

    Args:
        repeats: of every process.
        load_repeats: of every way to load the weights.
        preset: of the model that is loaded.

    Returns:
        What `print` shows as a table, and whether each has `missed` its goal.
    """
    with tempfile.TemporaryDirectory() as folder:
        return process_figures(repeats, Path(folder)) + load_figures(load_repeats, preset, Path(folder))


def process_figures(repeats: int, folder: Path) -> list[Figure]:
    """Of whole processes."""
    from transformers import ViTConfig, ViTModel

    from apm_hf.demo_assets import DEMO_MODEL

    native = folder / "vit"
    ViTModel(
        ViTConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    ).save_pretrained(native)
    load = "AutoModel.from_pretrained({!r})"
    programs = {
        "python -c pass": ["-c", "pass"],
        **{program: ["-c", program] for program in (TRANSFORMERS, AFTER_TRANSFORMERS, AUTO_MODEL, FIRST, AFTER_AUTO)},
        "apm --help": ["-m", "apm_hf.cli", "--help"],
        "apm classify --help": ["-m", "apm_hf.cli", "classify", "--help"],
        "transformers --help": ["-m", "transformers.cli.transformers", "--help"],
        "a tiny ViT": ["-c", f"{AUTO}; {load.format(str(native))}"],
        "the demo's APM": ["-c", f"import apm_hf; {AUTO}; {load.format(DEMO_MODEL)}"],
    }
    seconds, printed = _processes(programs, repeats)
    nothing = seconds["python -c pass"]

    def whole(name: str, program: str, rival: str, limit: float | None = None) -> Figure:
        return Figure(name, seconds[program], rival, seconds[rival], limit)

    def imported(when: str, program: str, rival: str) -> Figure:
        return Figure(f"import apm_hf, {when}", printed[program], rival, seconds[rival], IMPORT_GOAL)

    return [
        imported("after transformers", AFTER_TRANSFORMERS, TRANSFORMERS),
        whole("import transformers, apm_hf: the process", AFTER_TRANSFORMERS, TRANSFORMERS),
        imported("before AutoModel", FIRST, AUTO_MODEL),
        whole("import apm_hf, AutoModel: the process", FIRST, AUTO_MODEL),
        imported("after AutoModel", AFTER_AUTO, AUTO_MODEL),
        whole("import AutoModel, apm_hf: the process", AFTER_AUTO, AUTO_MODEL),
        whole("AutoModel.from_pretrained: the process", "the demo's APM", "a tiny ViT"),
        whole("apm --help", "apm --help", "python -c pass", nothing + IMPORT_GOAL),
        whole("apm --help", "apm --help", "transformers --help"),
        whole("apm classify --help", "apm classify --help", "python -c pass", nothing + IMPORT_GOAL),
    ]


def load_figures(repeats: int, preset: str, folder: Path) -> list[Figure]:
    """Of weights that were saved at random, fp32, in this process."""
    import safetensors.torch
    import torch
    from transformers.utils import logging

    from apm_hf import APMConfig, APMModel

    was_active = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    saved = folder / preset
    APMModel(APMConfig.preset(preset)).save_pretrained(saved)
    (weights,) = saved.glob("*.safetensors")

    def look(tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors:
            tensor.detach().view(-1)[:: PAGE // tensor.element_size()].sum()

    def read() -> None:
        buffer = bytearray(1 << 20)
        with open(weights, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass

    ways: dict[str, Callable[[], None]] = {
        "plain read": read,
        "load_file": lambda: look(safetensors.torch.load_file(weights).values()),
        "from_pretrained": lambda: look(APMModel.from_pretrained(saved).parameters()),
    }
    places = {"page cache": lambda: None, "disk": lambda: _forget(weights)}
    if not hasattr(os, "posix_fadvise"):
        del places["disk"]
    times: dict[tuple[str, str], list[float]] = {(way, place): [] for place in places for way in ways}
    for _ in range(repeats + 1):  # the first is warm-up
        for place, prepare in places.items():
            for way, load in ways.items():
                prepare()
                started = time.perf_counter()
                load()
                times[way, place].append(time.perf_counter() - started)
    if was_active:
        logging.enable_progress_bar()
    best = {key: min(values[1:]) for key, values in times.items()}
    size = f"{weights.stat().st_size / 1e6:.0f} MB"
    found = []
    for place in places:
        name, limit = (
            f"from_pretrained {preset}, {size}, {place}",
            LOAD_FACTOR * best["load_file", place] + LOAD_CONSTANT,
        )
        for rival, goal in (("load_file", limit), ("plain read", None)):
            found.append(Figure(name, best["from_pretrained", place], rival, best[rival, place], goal))
    return found


def _forget(path: Path) -> None:
    """Have the next reader go to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # pages that are not written yet would stay
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _processes(programs: dict[str, list[str]], repeats: int) -> tuple[dict[str, float], dict[str, float]]:
    """The smallest time of each process, and of what each printed, where that is a time."""
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    printed: dict[str, list[float]] = {name: [] for name in programs}
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    for _ in range(repeats + 1):  # the first is warm-up
        for name, arguments in programs.items():
            started = time.perf_counter()
            done = subprocess.run(
                [sys.executable, *arguments], capture_output=True, text=True, env=environment, check=True
            )
            seconds[name].append(time.perf_counter() - started)
            if CLOCK in name:
                printed[name].append(float(done.stdout))
    return (
        {name: min(values[1:]) for name, values in seconds.items()},
        {name: min(values[1:]) for name, values in printed.items() if values},
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one repeat of every process, three of every load")
    options = parser.parse_args()
    found = figures(repeats=1, load_repeats=3) if options.quick else figures()
    print("\n".join(map(str, found)))
    return int(any(figure.missed for figure in found))


if __name__ == "__main__":
    sys.exit(main())
