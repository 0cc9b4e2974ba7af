"""The search for an adaptation that beats its teacher: docs/findings.md is made of what this prints.

    torchrun --nproc_per_node 2 benchmarks/findings.py embed --teacher ../shared/teachers/deit-tiny-lit \\
        --data ../shared/data/cifar10 --num_images 1000 --train_data ../shared/data/cifar10 --train_split train \\
        --num_train 10000 --folder runs/cifar
    python benchmarks/findings.py search --teacher ../shared/teachers/deit-tiny-lit --data ../shared/data/cifar10 \\
        --num_images 1000 --folder runs/cifar

`embed` keeps the teacher's answers to every image under every corruption, so that `search` can compare what is done
with them in minutes. Images and corruptions are halved: settings are chosen on one half of each, and the other halves
are looked at once, at the end. Restoring models (an APM whose trigger column is the teacher's embedding, T_vit) are
distilled from corrupted images towards the embeddings of the same images when clean: images and corruptions that
neither choose nor report anything. No label is seen by anything but the score.

Legend: N images, F width of the teacher's embeddings, K classes.
"""

import argparse
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from apm_hf import APMConfig, APMModel, TTTConfig, adapt, load_teacher
from apm_hf.data.corruptions import CORRUPTION_NAMES, EXTRA_CORRUPTION_NAMES, corrupt_image, imagenet_crop
from apm_hf.evaluation.labels.benchmarks import LabelledImages, load_benchmark
from apm_hf.evaluation.methods.task import ZeroShotTask
from apm_hf.evaluation.plan import CLEAN, Cell
from apm_hf.evaluation.statistics import paired_interval
from apm_hf.position_encoding import grid_coordinates
from apm_hf.runs.processes import process_state
from apm_hf.teachers import Teacher

SEVERITIES = (1, 3, 5)
BATCH_SIZE = 25
# Every other one of ImageNet-C's list, so that noise, blur, weather and digital ones are on both sides.
TUNE_CORRUPTIONS, REPORT_CORRUPTIONS = CORRUPTION_NAMES[::2], CORRUPTION_NAMES[1::2]
# Models learn from the one, settings are chosen on the other.
TRAIN_CORRUPTIONS, CHOICE_CORRUPTIONS = (*EXTRA_CORRUPTION_NAMES, *TUNE_CORRUPTIONS[::2]), TUNE_CORRUPTIONS[1::2]
TRAIN, TUNE, REPORT = "train", "tune", "report"


@dataclass(frozen=True)
class Condition:
    """A corruption at a severity, 0 for clean images."""

    corruption: str
    severity: int

    def file(self, folder: Path, half: str) -> Path:
        return folder / half / f"{self.corruption}-{self.severity}.safetensors"


CLEAN_CONDITION = Condition(CLEAN, 0)


def conditions(names: tuple[str, ...]) -> list[Condition]:
    return [Condition(name, severity) for name in names for severity in SEVERITIES]


def halves(num_images: int) -> dict[str, list[int]]:
    order = np.random.default_rng(0).permutation(num_images)
    middle = num_images // 2
    return {TUNE: sorted(order[:middle].tolist()), REPORT: sorted(order[middle:].tolist())}


def embed(options: argparse.Namespace) -> None:
    """Teacher's embeddings and mean patch features of every image under every condition; what is there is kept."""
    state = process_state()
    teacher, data = load_teacher(options.teacher), load_benchmark(options.data, max_images=options.num_images)
    tested = {half: (data, indices) for half, indices in halves(len(data)).items()}
    own = options.train_data is None
    if own:  # images that models learn from choose nothing
        tested[TUNE] = data, tested[TUNE][1][1::2]
    wanted = {
        TRAIN: conditions(TRAIN_CORRUPTIONS),
        TUNE: [CLEAN_CONDITION, *conditions(CHOICE_CORRUPTIONS)],
        REPORT: [CLEAN_CONDITION, *conditions(REPORT_CORRUPTIONS)],
    }
    sources = {TRAIN: train_images(options), **tested}
    jobs = [(part, condition) for part in wanted for condition in wanted[part]]
    todo = [job for job in jobs if not job[1].file(options.folder, job[0]).exists()]
    state.wait_for_everyone()
    for half, condition in tqdm(todo[state.process_index :: state.num_processes], disable=not state.is_main_process):
        data, indices = sources[half]
        if half == TRAIN and not own:  # many images: each is seen clean and under one condition
            indices = indices[wanted[TRAIN].index(condition) :: len(wanted[TRAIN])]
        tensors = answers(teacher, data, indices, condition)
        if half == TRAIN:
            tensors["clean_embeds"] = answers(teacher, data, indices, CLEAN_CONDITION)["image_embeds"]
        path = condition.file(options.folder, half)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, f"{path}.partial")
        Path(f"{path}.partial").rename(path)


def train_images(options: argparse.Namespace) -> tuple[LabelledImages, list[int]]:
    """Images to learn from, labels unseen: other data, or of the tuning half those that choose nothing."""
    if options.train_data is not None:
        data = load_benchmark(options.train_data, split=options.train_split, max_images=options.num_train)
        return data, list(range(len(data)))
    data = load_benchmark(options.data, max_images=options.num_images)
    return data, halves(len(data))[TUNE][::2]


def answers(teacher: Teacher, data: LabelledImages, indices: list[int], condition: Condition) -> dict[str, Tensor]:
    embeds, patches = [], []
    for start in range(0, len(indices), BATCH_SIZE):
        answer = teacher.encode_images(
            [image_of(data, index, condition) for index in indices[start : start + BATCH_SIZE]]
        )
        embeds.append(answer.image_embeds.cpu())
        patches.append(answer.features.mean(dim=(1, 2)).cpu())
    labels = torch.tensor([data.label(index) for index in indices])
    return {"image_embeds": torch.cat(embeds), "patch_means": torch.cat(patches), "labels": labels}


def image_of(data: LabelledImages, index: int, condition: Condition):
    """The image as an evaluation's cell of that condition shows it, seed 0."""
    cell = Cell(data.name, condition.corruption, condition.severity, "", 0, None, 0, ())
    image = data.image(index)
    image = imagenet_crop(image) if data.constants == "imagenet" else image
    if cell.clean:
        return image
    return corrupt_image(
        image,
        condition.corruption,
        severity=condition.severity,
        seed=cell.image_seed(index, f"{condition.corruption}-{condition.severity}"),
        constants=data.constants,
    )


# What is done with the embeddings


@dataclass(frozen=True)
class Split:
    """Embeddings of N images under several conditions.

    Args:
        embeds: condition -> `(N, F)`.
        patches: condition -> `(N, F)`, mean patch features.
        labels: `(N,)`.
    """

    embeds: dict[Condition, Tensor]
    patches: dict[Condition, Tensor]
    labels: Tensor

    @classmethod
    def load(cls, folder: Path, half: str, names: tuple[str, ...]) -> "Split":
        wanted = [CLEAN_CONDITION, *conditions(names)]
        files = {condition: load_file(condition.file(folder, half)) for condition in wanted}
        return cls(
            {condition: tensors["image_embeds"] for condition, tensors in files.items()},
            {condition: tensors["patch_means"] for condition, tensors in files.items()},
            files[CLEAN_CONDITION]["labels"],
        )


def unit(embeds: Tensor) -> Tensor:
    return F.normalize(embeds, dim=-1)


def recentred(embeds: Tensor, batch_size: int = 64) -> Tensor:
    """Less their batch's mean (NEO, arXiv:2510.05635)."""
    return torch.cat([batch - batch.mean(dim=0) for batch in embeds.split(batch_size)])


Method = Callable[[Split, Condition], Tensor]  # -> (N, F), whose cosines to the class embeddings decide


def scores(split: Split, method: Method, texts: Tensor) -> dict[Condition, Tensor]:
    """Condition -> `(N,)`, whether each image is right."""
    return {
        condition: ((unit(method(split, condition)) @ texts.T).argmax(dim=1) == split.labels).double()
        for condition in split.embeds
    }


def mean_corrupted(table: dict[Condition, Tensor]) -> float:
    """Mean top-1 in percent over corruptions and severities."""
    return 100 * torch.stack([row.mean() for condition, row in table.items() if condition.severity]).mean().item()


@dataclass(frozen=True)
class Pairs:
    """Training images under corruptions, `(N, F)` each: embeddings, mean patch features, and embeddings when clean.

    `condition` `(N,)` numbers the conditions, whose means `centred` takes off.
    """

    embeds: Tensor
    patches: Tensor
    clean: Tensor
    condition: Tensor

    @classmethod
    def load(cls, folder: Path) -> "Pairs":
        files = [load_file(condition.file(folder, TRAIN)) for condition in conditions(TRAIN_CORRUPTIONS)]
        numbers = torch.cat([torch.full((len(tensors["labels"]),), number) for number, tensors in enumerate(files)])
        names = ("image_embeds", "patch_means", "clean_embeds")
        return cls(*(torch.cat([tensors[name] for tensors in files]) for name in names), numbers)

    def centred(self, values: Tensor) -> Tensor:
        means = torch.zeros(int(self.condition.max()) + 1, values.shape[1]).index_reduce(
            0, self.condition, values, "mean", include_self=False
        )
        return values - means[self.condition]


@dataclass(frozen=True)
class Restorer:
    """How an APM is distilled from corrupted towards clean: T_vit, the trigger column is the teacher's answer.

    Args:
        centre: take the batch's mean off the trigger column first, and off the target.
        patches: put the mean patch feature beside the embedding.
        width, depth: of the MLP.
    """

    centre: bool = False
    patches: bool = False
    width: int = 1024
    depth: int = 2
    steps: int = 1000
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2

    def trigger(self, embeds: Tensor, patches: Tensor, centre: Callable[[Tensor], Tensor]) -> Tensor:
        columns = [embeds, *([patches] if self.patches else [])]
        columns = [unit(centre(column) if self.centre else column) for column in columns]
        return torch.cat(columns, dim=1) * embeds.shape[1] ** 0.5  # entries of order 1

    def fit(self, pairs: Pairs, seed: int) -> APMModel:
        torch.manual_seed(seed)
        width = pairs.embeds.shape[1]
        corrupted = self.trigger(pairs.embeds, pairs.patches, pairs.centred)
        target = unit(pairs.centred(pairs.clean) if self.centre else pairs.clean) * width**0.5
        model = APMModel(
            APMConfig(
                image_size=4,
                patch_size=2,
                trigger_source="embedding",
                trigger_size=corrupted.shape[1],
                position_size=16,
                hidden_sizes=[self.width] * self.depth,
                feature_size=width,
                use_rgb_head=False,
            )
        )
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay, fused=True
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.learning_rate, total_steps=self.steps)
        places = grid_coordinates(2, 2)
        for _ in range(self.steps):
            rows = torch.randint(len(corrupted), (256,))
            place = places[torch.randint(4, (1,))]  # one location a step
            answer = model(trigger_column=corrupted[rows], coordinates=place).pooler_output
            loss = F.mse_loss(answer, target[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        return model.eval()

    def method(self, model: APMModel, share: float) -> Method:
        """The consensus of model and teacher: `share` of the model's direction, the rest the teacher's."""

        def answer(split: Split, condition: Condition) -> Tensor:
            trigger = self.trigger(split.embeds[condition], split.patches[condition], recentred)
            with torch.no_grad():
                restored = model(trigger_column=trigger).pooler_output
            theirs = recentred(split.embeds[condition]) if self.centre else split.embeds[condition]
            return share * unit(restored) + (1 - share) * unit(theirs)

        return answer

    def adapted(self, model: APMModel, steps: int) -> Method:
        """A copy of the model for each image takes so many steps towards the teacher's answer to it."""
        config = TTTConfig(start="model", steps=steps)

        def answer(split: Split, condition: Condition) -> Tensor:
            trigger = self.trigger(split.embeds[condition], split.patches[condition], recentred)
            theirs = recentred(split.embeds[condition]) if self.centre else split.embeds[condition]
            targets = unit(theirs) * theirs.shape[1] ** 0.5
            return adapt(model, None, targets, config=config, trigger_column=trigger, keep_models=False).image_embeds

        return answer


BASELINES: dict[str, Method] = {
    "teacher": lambda split, condition: split.embeds[condition],
    "teacher, re-centred by batches of 64": lambda split, condition: recentred(split.embeds[condition]),
    "teacher, re-centred by all": lambda split, condition: recentred(split.embeds[condition], 10**9),
}


def search(options: argparse.Namespace) -> None:
    teacher, data = load_teacher(options.teacher), load_benchmark(options.data, max_images=options.num_images)
    texts = ZeroShotTask.build(teacher, data.class_names, templates=data.templates).text_embeds.cpu()
    pairs = Pairs.load(options.folder)
    validation = Split.load(options.folder, TUNE, CHOICE_CORRUPTIONS)
    held_out = Split.load(options.folder, REPORT, REPORT_CORRUPTIONS)
    baselines = {**BASELINES, **ridge(pairs)}

    print("## Chosen on the tuning half\n")
    print("| method | share | top-1, clean | top-1, corrupted |\n| --- | ---: | ---: | ---: |")
    for name, method in baselines.items():
        table = scores(validation, method, texts)
        print(f"| {name} | | {100 * table[CLEAN_CONDITION].mean():.1f} | {mean_corrupted(table):.1f} |", flush=True)
    best: tuple[float, Restorer, float] | None = None
    for restorer in RESTORERS:
        model = restorer.fit(pairs, seed=0)
        for share in (0.25, 0.5, 0.75, 1.0):
            table = scores(validation, restorer.method(model, share), texts)
            clean, corrupted = 100 * table[CLEAN_CONDITION].mean(), mean_corrupted(table)
            print(f"| {restorer} | {share} | {clean:.1f} | {corrupted:.1f} |", flush=True)
            if best is None or corrupted > best[0]:
                best = corrupted, restorer, share
                kept = model
    assert best is not None
    _, restorer, share = best
    for steps in (1, 3, 10, 30):
        table = scores(validation, restorer.adapted(kept, steps), texts)
        clean, corrupted = 100 * table[CLEAN_CONDITION].mean(), mean_corrupted(table)
        name = f"the best, then {steps} steps to the teacher's answer"
        print(f"| {name} | 1.0 | {clean:.1f} | {corrupted:.1f} |", flush=True)

    print(f"\n## Looked at once: the other images, under the other corruptions\n\nchosen: {restorer}, share {share}\n")
    models = [restorer.fit(pairs, seed) for seed in range(options.num_seeds)]
    restored = {f"restored by an APM, seed {seed}": restorer.method(model, share) for seed, model in enumerate(models)}
    rivals = {"without pairs": list(BASELINES), "with pairs": [name for name in baselines if name not in BASELINES]}
    report(held_out, {**baselines, **restored}, rivals, texts)
    print_cost(teacher, data, restorer, models[0])


def print_cost(teacher: Teacher, data: LabelledImages, restorer: Restorer, model: APMModel) -> None:
    """Milliseconds an image, the best of five, of the teacher and of what the model adds."""
    images = [data.image(index) for index in range(BATCH_SIZE)]
    answer = teacher.encode_images(images)
    embeds, patches = answer.image_embeds.cpu(), answer.features.mean(dim=(1, 2)).cpu()

    def restore() -> None:
        with torch.no_grad():
            model(trigger_column=restorer.trigger(embeds, patches, recentred))

    seconds = {}
    for name, call in {"teacher": lambda: teacher.encode_images(images), "model": restore}.items():
        times = []
        for _ in range(5):
            started = time.perf_counter()
            call()
            times.append(time.perf_counter() - started)
        seconds[name] = 1000 * min(times) / len(images)
    print(f"\nteacher {seconds['teacher']:.2f} ms an image, model {seconds['model']:.3f} ms")


def ridge(pairs: Pairs) -> dict[str, Method]:
    """What a linear map learns from the same pairs: is it the model or is it the data?"""
    found: dict[str, Method] = {}
    for strength in (0.01, 0.1, 1.0):
        inputs = unit(pairs.centred(pairs.embeds)).double()
        targets = unit(pairs.centred(pairs.clean)).double()
        gram = inputs.T @ inputs
        shift = strength * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
        # Pulled towards the identity: strong regularisation gives the re-centred teacher back.
        matrix = torch.linalg.solve(gram + shift, inputs.T @ targets + shift).float()

        def method(split: Split, condition: Condition, matrix: Tensor = matrix) -> Tensor:
            return unit(recentred(split.embeds[condition])) @ matrix

        found[f"teacher, re-centred by batches of 64, ridge regression {strength:g}"] = method
    return found


RESTORERS = [
    Restorer(centre=centre, patches=patches, width=width, weight_decay=weight_decay)
    for centre in (False, True)
    for patches in (False, True)
    for width, weight_decay in ((512, 1e-2), (1024, 1e-1))
]


def report(split: Split, methods: dict[str, Method], rivals: dict[str, list[str]], texts: Tensor) -> None:
    """Every method on every corruption, and its paired difference to the best of each group of rivals."""
    tables = {name: scores(split, method, texts) for name, method in methods.items()}
    names = list(dict.fromkeys(condition.corruption for condition in split.embeds if condition.severity))
    best = {group: max(members, key=lambda name: mean_corrupted(tables[name])) for group, members in rivals.items()}
    heads = [*names, "mean", *(f"to the best baseline {group}, 95 %" for group in rivals)]
    print("| method | clean | " + " | ".join(heads) + " |")
    print("| --- |" + " ---: |" * (len(heads) + 1))
    wanted = [condition for condition in split.embeds if condition.severity]
    groups = np.tile(np.arange(len(split.labels)), len(wanted))

    def stacked(name: str) -> np.ndarray:
        return torch.cat([tables[name][condition] for condition in wanted]).numpy()

    def difference(name: str, rival: str) -> str:
        found = paired_interval(stacked(name), stacked(rival), groups=groups)
        return f"{100 * found.mean:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"

    for name, table in tables.items():
        cells = [f"{100 * table[CLEAN_CONDITION].mean():.1f}"]
        for corruption in names:
            rows = [row for condition, row in table.items() if condition.corruption == corruption]
            cells.append(f"{100 * torch.stack(rows).mean():.1f}")
        cells += [f"{mean_corrupted(table):.1f}", *(difference(name, rival) for rival in best.values())]
        print(f"| {name} | " + " | ".join(cells) + " |")


def main() -> None:
    logging.basicConfig(format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=("embed", "search"))
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--data", required=True, help="labelled images")
    parser.add_argument("--folder", required=True, type=Path, help="where the embeddings are kept")
    parser.add_argument("--num_images", type=int, help="of the data, both halves together; by default all")
    parser.add_argument("--train_data", help="images to learn from; by default half of the tuning images")
    parser.add_argument("--train_split")
    parser.add_argument("--num_train", type=int)
    parser.add_argument("--num_seeds", type=int, default=3)
    options = parser.parse_args()
    {"embed": embed, "search": search}[options.stage](options)


if __name__ == "__main__":
    main()
