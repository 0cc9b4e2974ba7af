"""Measure how students of pixels grow with the number of photos that they are distilled from.

    python benchmarks/students.py --teacher facebook/deit-tiny-patch16-224 --datasets CALTECH101 IMAGENET_SAMPLE \
        --output_dir students --write

Crops of every photo and the teacher's outputs for them are computed once. A student is then distilled for every
number of photos, with the library's own loop, and its result stored: an interrupted command goes on, and counts
core-hours from there. Photos are drawn from all data sets together. Held out are photos of every data set, and of the
first one also all photos of every tenth class, which no student sees.

R² is that of `apm distill`: in units of each feature's standard deviation, after the mean of every position is
removed, with its interval from the bootstrap over images. k-NN names held-out photos by pooled outputs alone (10
neighbours, cosine, among at most 20 training photos of each class). `--masks` adds the linear probe of `apm evaluate
--task islands`. `--write` puts tables and plot into docs/students.md.
"""

import argparse
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset
from tqdm import tqdm
from transformers import set_seed

from apm_hf import APMConfig, APMModel, Teacher, load_teacher
from apm_hf.data.augmentation import RandomCrops
from apm_hf.data.images import ImageCollator
from apm_hf.data.loading import ImageData, train_and_validation
from apm_hf.distillation import DistillationConfig, distill, matching_image_processor
from apm_hf.distillation.validation import comparison
from apm_hf.evaluation.masks import evaluate_islands
from apm_hf.evaluation.statistics import Interval, mean_interval
from apm_hf.evaluation.tables import interval_cell, markdown_table
from apm_hf.position_encoding import grid_coordinates
from apm_hf.runs.provenance import commit, computer, versions

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "students.md"
BEGIN, END = "<!-- law:begin -->", "<!-- law:end -->"
HELD_OUT = 256  # photos of each data set at most; the same that `apm distill` holds out
BATCH = 32  # crops a step
APART = 10  # every tenth class of the first data set
PAPER = {"use_rgb_head": False, "hidden_act": "gelu"}
# Name -> preset, other fields of it, learning rate.
STUDENTS: dict[str, tuple[str, dict[str, Any], float]] = {
    "local columns": ("student", {}, 2e-3),
    "local patches": ("paper", {**PAPER, "local_patch": True, "local_patch_scales": [1, 2, 4]}, 1e-3),
    "one column": ("paper", PAPER, 1e-3),
}


class Crops(Dataset):
    """Crops as 8-bit pixels `(3, S, S)` and the teacher's outputs for them, in files that are mapped into memory."""

    def __init__(self, folder: Path):
        facts = json.loads((folder / "facts.json").read_text())
        count, (side, rows_cols, width) = facts["count"], facts["sizes"]
        self.pixels = np.memmap(folder / "pixels.u8", np.uint8, "r", shape=(count, 3, side, side))
        self.features = np.memmap(folder / "features.f16", np.float16, "r", shape=(count, rows_cols, rows_cols, width))
        self.embeds = np.load(folder / "embeds.npy")
        self.labels = np.array(facts["labels"])
        self.mean, self.std = (torch.tensor(facts[name])[:, None, None] for name in ("mean", "std"))

    def __len__(self) -> int:
        return len(self.embeds)

    def __getitem__(self, row: int) -> dict[str, Any]:
        pixels = torch.from_numpy(self.pixels[row].astype(np.float32)) / 255
        features = torch.from_numpy(self.features[row].astype(np.float32))
        embeds = torch.from_numpy(self.embeds[row])
        return {"pixel_values": (pixels - self.mean) / self.std, "features": features, "image_embeds": embeds}

    @classmethod
    def of(cls, photos: Any, labels: list[int], column: str, teacher: Teacher, folder: Path, *, views: int) -> "Crops":
        """Compute what is not there yet: crop K * i + k is the k-th of photo i; one view is the whole photo."""
        if (folder / "facts.json").exists():
            return cls(folder)
        folder.mkdir(parents=True, exist_ok=True)
        processor = teacher.image_processor
        images = RandomCrops(photos, column, views=views) if views > 1 else photos
        collate = ImageCollator(None, column, teacher_image_processor=processor)
        mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
        embeds: list[np.ndarray] = []
        with open(folder / "pixels.u8", "wb") as pixels, open(folder / "features.f16", "wb") as features:
            for start in tqdm(range(0, len(images), 32), desc=folder.name):
                rows = range(start, min(start + 32, len(images)))
                values = collate([{"index": row, **images[row]} for row in rows])["teacher_pixel_values"]
                outputs = teacher.encode_images(pixel_values=values)
                pixels.write(((values * std + mean) * 255).round().clamp(0, 255).to(torch.uint8).numpy().tobytes())
                features.write(outputs.features.half().numpy().tobytes())
                embeds.append(outputs.image_embeds.float().numpy())
        np.save(folder / "embeds.npy", np.concatenate(embeds))
        sizes = [values.shape[-1], *outputs.features.shape[2:]]
        facts = {"count": len(images), "sizes": sizes, "mean": list(processor.image_mean)}
        facts |= {"std": list(processor.image_std), "labels": [label for label in labels for _ in range(views)]}
        (folder / "facts.json").write_text(json.dumps(facts))
        return cls(folder)


def split(data: ImageData, apart: bool) -> tuple[list[int], list[int], list[int]]:
    """Return the labels of all rows, the rows that are trained on, and those of classes that are held apart."""
    rows = range(len(data.dataset))
    column = data.label_column
    labels = [int(label) for label in data.dataset[column]] if column else [0] * len(rows)
    other = [row for row in rows if apart and labels[row] % APART == 0]
    return labels, [row for row in rows if not (apart and labels[row] % APART == 0)], other


def prepare(options: argparse.Namespace, teacher: Teacher) -> tuple[list[Crops], dict[str, Crops]]:
    """Return the crops to train on of every data set, and the held-out ones by name."""
    training, held_out = [], {}
    for number, name in enumerate(options.datasets):
        data, validation = train_and_validation(name, max_validation_images=HELD_OUT, seed=0)
        folder = options.output_dir / "crops" / f"{number}"

        def crops(part: ImageData, rows: list[int], labels: list[int], kind: str, views: int, to: Path) -> Crops:
            photos = part.dataset.select(rows)
            return Crops.of(photos, [labels[row] for row in rows], part.image_column, teacher, to / kind, views=views)

        labels, known, other = split(data, number == 0)
        training.append(crops(data, known, labels, "training", options.views, folder))
        labels, rows, _ = split(validation, number == 0)
        held_out[f"photos of {Path(name).name}"] = crops(validation, rows, labels, "held_out", 1, folder)
        if other:
            labels, _, _ = split(data, False)
            drawn = np.random.default_rng(0).permutation(other)[:HELD_OUT].tolist()
            held_out["classes held apart"] = crops(data, drawn, labels, "apart", 1, folder)
            shown = [row for label in set(labels) for row in [i for i in known if labels[i] == label][:20]]
            held_out["neighbours"] = crops(data, sorted(shown), labels, "neighbours", 1, folder)
    return training, held_out


def known_features(training: list[Crops]) -> Tensor:
    """Return the teacher's features `(B, L, F)` of crops of the first data set: units of R², and controls."""
    return torch.from_numpy(training[0].features[:512].astype(np.float32)).flatten(1, 2)


@torch.no_grad()
def outputs_of(model: APMModel, crops: Crops) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield features, the teacher's, and pooled outputs, batch by batch."""
    places = grid_coordinates(*crops.features.shape[1:3])
    for start in range(0, len(crops), 32):
        rows = [crops[row] for row in range(start, min(start + 32, len(crops)))]
        batch = {name: torch.stack([row[name] for row in rows]) for name in ("pixel_values", "features")}
        outputs = model(batch["pixel_values"], places)
        yield outputs.last_hidden_state, batch["features"].flatten(1, 2), outputs.pooler_output


def judge(model: APMModel, held_out: Mapping[str, Crops], known: Tensor) -> dict[str, Any]:
    """Return R² on all held-out photos, with interval and controls, and k-NN accuracy beside the teacher's."""
    std = known.flatten(0, 1).std(dim=0)
    controls = {"mean feature": known.mean(dim=(0, 1)), "position alone": known.mean(dim=0)}
    figures: dict[str, Any] = {}
    pooled: dict[str, np.ndarray] = {}
    for name, crops in held_out.items():
        found = [torch.cat(parts) for parts in zip(*outputs_of(model, crops), strict=True)]
        pooled[name] = found[2].numpy()
        if name == "neighbours":
            continue
        whole = ((found[1] - found[1].mean(dim=0)) / std).square().sum(dim=(1, 2))
        rows = {name: found[0]} | {f"{name}, {one}": control for one, control in controls.items()}
        for row, features in rows.items():
            error = ((features - found[1]) / std).square().sum(dim=(1, 2))
            figures[row] = vars(mean_interval((1 - error / whole.mean()).numpy(), seed=0))
    name = next(iter(held_out))
    bank, asked = held_out["neighbours"], held_out[name]
    for row, near, queries in (
        ("k-NN", pooled["neighbours"], pooled[name]), ("k-NN, teacher", bank.embeds, asked.embeds)
    ):  # fmt: skip
        nearest = KNeighborsClassifier(10, metric="cosine", weights="distance").fit(near, bank.labels)
        figures[row] = vars(mean_interval((nearest.predict(queries) == asked.labels).astype(float), seed=0))
    return figures


def point(name: str, photos: int, seed: int, options: argparse.Namespace, data: Any, teacher: Teacher) -> None:
    """Distil one student and store what it reaches."""
    training, held_out = data
    number = sum(len(part) for part in training) // options.views
    photos = min(photos, number)
    schedule = f"{options.steps:,} steps" if options.passes is None else f"{options.passes:g} passes"
    steps = options.steps if options.passes is None else round(options.passes * photos / BATCH)
    folder = options.output_dir / f"{name.replace(' ', '_')}-{photos}-{schedule.replace(' ', '_')}-{seed}"
    if (folder / "result.json").exists():
        return
    preset, fields, rate = STUDENTS[name]
    set_seed(seed)
    student = APMModel(APMConfig.preset(preset, feature_size=teacher.feature_size, **fields))
    drawn = np.random.default_rng(seed).permutation(number)[:photos].tolist()
    crops = [options.views * photo + view for photo in drawn for view in range(options.views)]
    resume = (folder / "checkpoints").is_dir()
    config = DistillationConfig.preset(
        "student", output_dir=str(folder), max_steps=steps, learning_rate=rate, mixed_precision="bf16",
        batch_size=BATCH, validation_steps=steps, keep_checkpoints=1, num_pictures=0, report_to="none",
        seed=seed, resume=resume, overwrite=not resume,
    )  # fmt: skip
    start = time.process_time()
    result = distill(
        student,
        Subset(ConcatDataset(training), crops),
        config=config,
        image_processor=matching_image_processor(teacher, student.config.image_size),
        validation_data=next(iter(held_out.values())),
    )
    seconds = time.process_time() - start
    figures = judge(result.student, held_out, known_features(training))
    controls = {key: value for key, value in result.metrics[-1].items() if key.endswith("_r2")}
    stored = {"student": name, "photos": photos, "schedule": schedule, "steps": steps, "seed": seed}
    stored |= {"core_seconds": seconds, "parameters": student.num_parameters()}
    stored |= {"figures": figures, "controls": controls}
    (folder / "result.json").write_text(json.dumps(stored, indent=2) + "\n")


def probe(folder: Path, options: argparse.Namespace, row: str = "apm") -> dict[str, float]:
    """Return the mIoU of a linear probe on the features of a student, or of the teacher beside it; kept once found."""
    found = evaluate_islands(
        output_dir=options.output_dir / "masks" / f"{folder.name}-{row}",
        data=options.masks,
        teacher=options.teacher,
        model=str(folder),
        methods=[row],
        command="python benchmarks/students.py",
    )
    (data,) = json.loads((found / "results.json").read_text())["data"].values()
    return data["rows"][row]["linear"]


def law(rows: list[dict[str, Any]], name: str) -> tuple[np.ndarray, float, np.ndarray] | None:
    """Fit log(1 - R²) = a + b log(photos) by least squares; returns (a, b), the residuals' deviation, and x."""
    if len({row["photos"] for row in rows}) < 4:  # fewer bound nothing
        return None
    x = np.log([row["photos"] for row in rows])
    y = np.log([1 - row["figures"][name]["mean"] for row in rows])
    design = np.stack([np.ones_like(x), x], axis=1)
    fit = np.linalg.lstsq(design, y, rcond=None)[0]
    return fit, float(np.sqrt(((y - design @ fit) ** 2).sum() / max(1, len(x) - 2))), x


def foretold(rows: list[dict[str, Any]], name: str, photos: int) -> Interval | None:
    """Return R² that the law gives for a number of photos, with its 95 % prediction interval."""
    from scipy.stats import t

    if (found := law(rows, name)) is None:
        return None
    (a, b), deviation, x = found
    here = np.log(photos)
    spread = deviation * np.sqrt(1 + 1 / len(x) + (here - x.mean()) ** 2 / ((x - x.mean()) ** 2).sum())
    reach = t.ppf(0.975, max(1, len(x) - 2)) * spread
    middle = a + b * here
    return Interval(*(1 - np.exp([middle, middle + reach, middle - reach])))


def report(options: argparse.Namespace, held_out: list[str]) -> str:
    """Return the tables in Markdown, and draw the plot beside the document."""
    found = sorted(options.output_dir.glob("*/result.json"))
    results = [json.loads(path.read_text()) | {"folder": path.parent} for path in found]
    results.sort(key=lambda one: (list(STUDENTS).index(one["student"]), one["schedule"], one["photos"], one["seed"]))
    sets = [name for name in held_out if name != "neighbours"]
    if options.masks:
        for one in results:
            one["probe"] = probe(one["folder"], options)
        teacher = probe(results[0]["folder"], options, "teacher")
    header = [
        "student",
        "photos",
        "steps",
        "seed",
        *(f"R², {name}" for name in sets),
        "k-NN, % of teacher's",
        *(["probe mIoU"] if options.masks else []),
        "core-h",
    ]
    table = [
        [
            one["student"], f"{one['photos']:,}", f"{one['steps']:,}", str(one["seed"]),
            *(interval_cell(one["figures"][name]) for name in sets),
            f"{100 * one['figures']['k-NN']['mean'] / one['figures']['k-NN, teacher']['mean']:.0f}",
            *([interval_cell(one["probe"])] if options.masks else []),
            f"{one['core_seconds'] / 3600:.2f}",
        ]
        for one in results
    ]  # fmt: skip
    lines = [markdown_table(header, table), ""]
    last = max(results, key=lambda one: (one["photos"], one["steps"]))
    others = ", ".join(f"{title} {value:.3f}" for title, value in comparison(last["controls"])[1:])
    lines += [f"Controls fitted to the same {last['photos']:,} photos, R² on {sets[0]}: {others}.", ""]
    if options.masks:
        lines += [f"The probe on the teacher's own grid, interpolated: {interval_cell(teacher)}.", ""]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for one in results:
        groups.setdefault((one["student"], one["schedule"]), []).append(one)
    for (name, schedule), rows in groups.items():
        for where in sets:
            if (found := law(rows, where)) is None:
                continue
            told = ", ".join(
                f"{label} ({count:,} photos) {interval_cell(vars(interval))}"
                for label, count in (("COCO", 118_287), ("ImageNet-1k", 1_281_167))
                if (interval := foretold(rows, where, count)) is not None
            )
            lines.append(
                f"* {name}, {schedule}, {where}: 1 - R² falls as photos to the power {found[0][1]:.4f}; this "
                f"foretells {told} with 95 % prediction intervals, if the law holds so far beyond the data."
            )
    lines += ["", f"![R² and number of photos]({DOCUMENT.stem}/law.png)", ""]
    named_versions = ", ".join(f"{key} {value}" for key, value in versions().items())
    lines.append(f"Computer: {computer()}; commit {commit()}; {named_versions}.")
    draw(groups, sets, options.output_dir / "law.png")
    return "\n".join(lines)


def draw(groups: Mapping[tuple[str, str], list[dict[str, Any]]], sets: list[str], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * len(sets), 3.2), layout="constrained", dpi=110)
    panels = figure.subplots(1, len(sets), sharey=True, squeeze=False)[0]
    for panel, where in zip(panels, sets, strict=True):
        for (name, schedule), rows in groups.items():
            x = [row["photos"] for row in rows]
            found = [row["figures"][where] for row in rows]
            y = [one["mean"] for one in found]
            bars = [[one["mean"] - one["low"] for one in found], [one["high"] - one["mean"] for one in found]]
            panel.errorbar(x, y, yerr=bars, marker="o", markersize=4, label=f"{name}, {schedule}")
        panel.axhline(0, color="grey", linewidth=0.8)
        counts = sorted({row["photos"] for rows in groups.values() for row in rows})
        panel.set_xscale("log")
        panel.set_xticks(counts, [f"{count:,}" for count in counts], fontsize=7)
        panel.minorticks_off()
        panel.set(title=where, xlabel="photos", ylabel="R²" if panel is panels[0] else "")
    panels[0].legend(fontsize=7)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", required=True)
    parser.add_argument(
        "--datasets", nargs="+", required=True, help="with labels; classes of the first are held apart"
    )
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--students", nargs="+", default=list(STUDENTS), choices=list(STUDENTS))
    parser.add_argument("--photos", nargs="*", type=int, default=[250, 500, 1000, 2000, 4000, 10**9])
    parser.add_argument("--steps", type=int, default=1000, help="of 32 crops")
    parser.add_argument("--passes", type=float, help="over the photos, instead of --steps: one crop of each a pass")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--views", type=int, default=3, help="crops of each photo")
    parser.add_argument("--masks", help="masks for a linear probe, as `apm evaluate --task islands` takes them")
    parser.add_argument("--model", help="judge this student of the same teacher, and distil none")
    parser.add_argument("--write", action="store_true", help="put tables and plot into docs/students.md")
    options = parser.parse_args()
    teacher = load_teacher(options.teacher, dtype="bfloat16")
    data = prepare(options, teacher)
    if options.model:
        # What it has learnt from is not known here: classes may be held apart from others alone.
        held_out = {name: crops for name, crops in data[1].items() if name != "classes held apart"}
        found = judge(APMModel.from_pretrained(options.model), held_out, known_features(data[0]))
        print("\n".join(f"{name}: {interval_cell(figure)}" for name, figure in found.items()))
        return
    for name in options.students:
        for photos in options.photos:
            for seed in options.seeds:
                point(name, photos, seed, options, data, teacher)
    text = report(options, list(data[1]))
    print(text)
    if options.write:
        before = DOCUMENT.read_text()
        DOCUMENT.write_text(f"{before.split(BEGIN)[0]}{BEGIN}\n{text}\n{END}{before.split(END)[1]}")
        picture = DOCUMENT.with_suffix("") / "law.png"
        picture.parent.mkdir(exist_ok=True)
        picture.write_bytes((options.output_dir / "law.png").read_bytes())


if __name__ == "__main__":
    main()
