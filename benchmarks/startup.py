"""Start-up: what `import apm_hf`, the command and `from_pretrained` cost, beside what they cannot do without.

    python benchmarks/startup.py --quick
    python benchmarks/startup.py

Whole processes, and loads within one, are interleaved with their rivals, and the smallest time of each is taken. The
exit status is 1 where a figure misses its goal:

* `import apm_hf` takes at most a quarter longer than importing what every model of transformers is made of;
* `apm --help` takes at most one and a half times as long as `accelerate --help`;
* a model of 54 M parameters is loaded, and every page of it read, within twice the time that the same takes with
  `safetensors.torch.load_file`, and 0.1 s for what transformers does beside: from the disk and from the page cache.

`load_file` and `from_pretrained` map the file into memory and read nothing until a weight is used. Hence every page is
read; without that both would seem to be faster than any disk. What "disk" is, only the computer knows: a virtual
one may read from its host's memory.
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

IMPORT_FACTOR, HELP_FACTOR = 1.25, 1.5
LOAD_FACTOR, LOAD_CONSTANT = 2.0, 0.1
PAGE = 4096  # bytes

AUTO_MODEL = "import torch; from transformers import AutoModel"
BASE_MODEL = "import torch; from transformers import AutoModel, PreTrainedModel"


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
    """Measure everything: two minutes on an idle computer with five repeats.

    Args:
        repeats: of every process.
        load_repeats: of every way to load the weights.
        preset: of the model that is loaded.

    Returns:
        What `print` shows as a table, and whether each has `missed` its goal.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()  # it would be timed as well
    with tempfile.TemporaryDirectory() as folder:
        return process_figures(repeats, Path(folder)) + load_figures(load_repeats, preset, Path(folder))


def process_figures(repeats: int, folder: Path) -> list[Figure]:
    """Time whole processes."""
    from transformers import ViTConfig, ViTModel

    from apm_hf.assets import DEMO_MODEL

    native = folder / "vit"
    ViTModel(
        ViTConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    ).save_pretrained(native)
    load = "from transformers import AutoModel; AutoModel.from_pretrained({!r})"
    seconds = _processes(
        {
            "AutoModel": ["-c", AUTO_MODEL],
            "AutoModel, PreTrainedModel": ["-c", BASE_MODEL],
            "import apm_hf": ["-c", "import apm_hf"],
            "accelerate --help": ["-m", "accelerate.commands.accelerate_cli", "--help"],
            "apm --help": ["-m", "apm_hf.commands.main", "--help"],
            "apm classify --help": ["-m", "apm_hf.commands.main", "classify", "--help"],
            "load a tiny ViT": ["-c", load.format(str(native))],
            "load the demo's APM": ["-c", f"import apm_hf; {load.format(str(DEMO_MODEL))}"],
        },
        repeats,
    )

    def figure(name: str, rival: str, factor: float | None = None) -> Figure:
        limit = None if factor is None else factor * seconds[rival]
        return Figure(name, seconds[name], rival, seconds[rival], limit)

    return [
        figure("import apm_hf", "AutoModel"),
        figure("import apm_hf", "AutoModel, PreTrainedModel", IMPORT_FACTOR),
        figure("load the demo's APM", "load a tiny ViT"),
        figure("apm --help", "accelerate --help", HELP_FACTOR),
        figure("apm classify --help", "accelerate --help", HELP_FACTOR),
    ]


def load_figures(repeats: int, preset: str, folder: Path) -> list[Figure]:
    """Time loads of randomly drawn fp32 weights in this process."""
    import safetensors.torch
    import torch

    from apm_hf import APMConfig, APMModel

    saved = folder / preset
    APMModel(APMConfig.preset(preset)).save_pretrained(saved)
    (weights,) = saved.glob("*.safetensors")

    def read_pages(tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors:
            tensor.detach().view(-1)[:: PAGE // tensor.element_size()].sum()

    def read() -> None:
        buffer = bytearray(1 << 20)
        with open(weights, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass

    ways: dict[str, Callable[[], None]] = {
        "plain read": read,
        "load_file": lambda: read_pages(safetensors.torch.load_file(weights).values()),
        "from_pretrained": lambda: read_pages(APMModel.from_pretrained(saved).parameters()),
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
    """Drop a file from the page cache, so that the next reader goes to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # pages that are not written yet would stay
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _processes(programs: dict[str, list[str]], repeats: int) -> dict[str, float]:
    """Return the smallest time of each process."""
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    for _ in range(repeats + 1):  # the first is warm-up
        for name, arguments in programs.items():
            started = time.perf_counter()
            subprocess.run([sys.executable, *arguments], capture_output=True, env=environment, check=True)
            seconds[name].append(time.perf_counter() - started)
    return {name: min(values[1:]) for name, values in seconds.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one repeat of every process, three of every load")
    options = parser.parse_args()
    found = figures(repeats=1, load_repeats=3) if options.quick else figures()
    print("\n".join(map(str, found)))
    return int(any(figure.missed for figure in found))


if __name__ == "__main__":
    sys.exit(main())
