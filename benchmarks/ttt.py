"""What test-time training costs, against the release's algorithm, and what each cheaper way of doing it gives up.

    python benchmarks/ttt.py --release_steps 1
    python benchmarks/ttt.py --teacher ../shared/teachers/deit-tiny-lit --dataset ../shared/data/imagenet_sample1k

The first table: seconds, peak memory and GFLOPs per image of `clip-ttt` (768 wide), every row in a process of its own,
beside one forward pass of a randomly initialised CLIP ViT-B/16 vision tower. (a) is the release's algorithm as far as
its students go, written naively: 8 copies of the image, every query concatenated, 16 locations at a time, gradients
accumulated over the chunks; measured on few steps and scaled to 20. It leaves out that the release encodes the teacher
and all texts again at every step. Targets are random with the spread of a CLIP embedding.

The second table, with a teacher and photos: what is fitted, against the exact fit from the same start. "locations"
is the mean cosine between the features of the grid's locations and those of the exact fit at its plateau.
"""

import argparse
import json
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import CLIPVisionConfig, CLIPVisionModel

from apm_hf import APMConfig, APMModel, TTTConfig, adapt
from apm_hf.position_encoding import grid_coordinates, position_code
from apm_hf.ttt import redraw

STEPS = 20
COPIES, CHUNK = 8, 16  # the release's
VIT = "CLIP ViT-B/16 forward"
RELEASE = "(a) release's algorithm"


def release_step(model: APMModel, pixel_values: Tensor, target: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """One step on one image, as the release takes it; gradients are never zeroed."""
    config = model.config
    code = position_code(
        grid_coordinates(config.grid_size, config.grid_size, device=target.device),
        config.grid_size,
        config.grid_size,
        config.position_size,
    )
    features, query = [], model.decoder.query
    weight = torch.cat([query.trigger.weight, query.column.weight, query.row.weight], dim=1)
    trigger = model.fold(pixel_values.expand(COPIES, -1, -1, -1))
    for chunk in code.split(CHUNK):
        columns = trigger[:, None].expand(-1, len(chunk), -1)
        hidden = torch.cat([columns, chunk.expand(COPIES, -1, -1)], dim=-1)  # (8, 16, D + P)
        hidden = F.linear(hidden, weight, query.trigger.bias).relu()
        for layer in model.decoder.layers:
            hidden = layer(hidden).relu()
        features.append(model.decoder.feature_head(hidden))
    index = torch.arange(config.grid_size, dtype=torch.float32, device=target.device)
    pooled, _ = model.pooler(torch.cat(features, dim=1), index[None, :, None], index[None, None])
    F.mse_loss(pooled, target.expand(COPIES, -1)).backward()
    optimizer.step()


def problem(batch_size: int, device: torch.device) -> tuple[APMModel, Tensor, Tensor]:
    torch.manual_seed(0)
    model = APMModel(APMConfig.preset("clip-ttt")).to(device)
    size = model.config.image_size
    images = torch.randn(batch_size, 3, size, size, device=device)
    return model, images, 0.7 * torch.randn(batch_size, model.config.feature_size, device=device)


def rows(release_steps: int) -> dict[str, dict[str, Any]]:
    sampled = {"steps": STEPS, "num_locations": 16}
    return {
        RELEASE: {"release_steps": release_steps},
        "(b) exact, float32": {"steps": STEPS},
        "    exact, bfloat16": {"steps": STEPS, "dtype": "bfloat16"},
        "(c) 16 locations a step": sampled,
        "(d) 16 locations, 8 images": {**sampled, "batch_size": 8},
        "(e) fast": {"preset": "fast"},
        "    fast, 16 images": {"preset": "fast", "batch_size": 16},
        "    fast, 64 images": {"preset": "fast", "batch_size": 64},
        VIT: {"vit": True},
        f"{VIT}, 16 images": {"vit": True, "batch_size": 16},
    }


def measure(row: dict[str, Any], repeats: int, pipe: Any) -> None:
    """Seconds, peak bytes and FLOPs per image of one row, sent through the pipe."""
    row = dict(row)
    batch_size, preset = row.pop("batch_size", 1), row.pop("preset", "paper")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    scale, cosine = 1.0, None
    call: Callable[[], Any]
    if row.pop("vit", False):
        torch.manual_seed(0)
        vit = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, patch_size=16
            )
        )
        vit, pixels = vit.to(device).eval(), torch.randn(batch_size, 3, 224, 224, device=device)

        def call() -> None:
            with torch.no_grad():
                vit(pixels)
    elif "release_steps" in row:
        num_steps = row["release_steps"]
        model, images, targets = problem(1, device)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
        scale, repeats = STEPS / num_steps, 0

        def call() -> None:
            for _ in range(num_steps):
                release_step(model, images, targets, optimizer)
    else:
        model, images, targets = problem(batch_size, device)
        model, config = redraw(model, 0), TTTConfig.preset(preset, **row, start="model")  # drawn once

        def call() -> Any:
            return adapt(model, images, targets, config=config, keep_models=False)

    before = peak(device)
    with FlopCounterMode(display=False) as counter:
        seconds = [timed(call, device)]  # warm-up, and the only one of the release
    seconds += [timed(call, device) for _ in range(repeats)]
    best = min(seconds[1:] or seconds)
    if preset == "fast" or "steps" in row:
        result = call()
        cosine = F.cosine_similarity(result.image_embeds, targets).mean().item()
    memory = (peak(device) - before) / batch_size
    pipe.send((best * scale / batch_size, memory, counter.get_total_flops() * scale / batch_size, cosine))


def timed(call: Callable[[], Any], device: torch.device) -> float:
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def peak(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def cost(release_steps: int, repeats: int) -> dict[str, dict[str, float | None]]:
    context, results = multiprocessing.get_context("spawn"), {}
    for name, row in (progress := tqdm(rows(release_steps).items())):
        progress.set_description(name.strip())
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(target=measure, args=(row, repeats, sender))
        child.start()
        sender.close()
        try:
            seconds, memory, flops, cosine = receiver.recv()
        except EOFError:
            raise RuntimeError(f"{name.strip()}: the process that measured it ended early") from None
        child.join()
        results[name] = {"seconds": seconds, "mib": memory / 2**20, "gflops": flops / 1e9, "cosine": cosine}
    return results


def print_cost(results: dict[str, dict[str, float | None]]) -> None:
    release, vit = results[RELEASE]["seconds"], results[f"{VIT}, 16 images"]["seconds"]
    print("| per image | seconds | x (a) | / ViT-B/16 | MiB above start | GFLOPs | cosine to target |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, row in results.items():
        cosine = "" if row["cosine"] is None else f"{row['cosine']:.4f}"
        print(
            f"| {name.strip()} | {row['seconds']:.4g} | {release / row['seconds']:.0f} | {row['seconds'] / vit:.2f} "
            f"| {row['mib']:.0f} | {row['gflops']:.1f} | {cosine} |"
        )


def quality(options: argparse.Namespace) -> list[dict[str, Any]]:
    from apm_hf import load_teacher
    from apm_hf.data.images import decode_image
    from apm_hf.data.loading import load_images
    from apm_hf.ttt.classification import TTTClassifier

    teacher = load_teacher(options.teacher)
    data = load_images(options.dataset, max_images=options.num_photos, seed=0)
    classifier = TTTClassifier(teacher, data.class_names, config=TTTConfig())
    model, texts = classifier.model, F.normalize(classifier.text_embeds, dim=-1)
    images, targets = [], []
    for start in range(0, len(data.dataset), 16):
        batch = [decode_image(image) for image in data.dataset[start : start + 16][data.image_column]]
        targets.append(teacher.encode_images(batch).image_embeds)
        images.append(classifier.image_processor(batch, return_tensors="pt")["pixel_values"])
    pixel_values, embeds = torch.cat(images), torch.cat(targets)
    predicted = (F.normalize(embeds, dim=-1) @ texts.T).argmax(dim=-1)
    few = slice(options.num_exact)

    def features(config: TTTConfig) -> Tensor:
        fits = [
            adapt(model, pixel_values[i : i + 1], embeds[i : i + 1], config=config) for i in range(len(embeds[few]))
        ]
        return torch.cat([fit.query().last_hidden_state for fit in fits])  # (B, L, F)

    exact = features(TTTConfig(steps=options.exact_steps))
    still = features(TTTConfig(steps=1, learning_rate=1e-30))
    table = []

    def add(name: str, config: TTTConfig | None, *, num_images: int | None = None) -> None:
        chosen = slice(num_images)
        started = time.perf_counter()
        if config is None:  # the bias that makes the pooled feature its target
            pooled, local, seconds = embeds[chosen], still, 0.0
        else:
            fits = [
                adapt(model, pixel_values[chosen][i : i + 16], embeds[chosen][i : i + 16], config=config,
                      keep_models=False)
                for i in range(0, len(embeds[chosen]), 16)
            ]  # fmt: skip
            seconds = (time.perf_counter() - started) / len(embeds[chosen])
            pooled, local = torch.cat([fit.image_embeds for fit in fits]), features(config)
        classes = (F.normalize(pooled, dim=-1) @ texts.T).argmax(dim=-1)
        row = {
            "what is fitted": name,
            "learning rate": "" if config is None else f"{config.learning_rate:g}",
            "locations": "" if config is None else config.num_locations or "all",
            "steps": "" if config is None else config.steps,
            "s / image": f"{seconds:.3f}",
            "images": len(pooled),
            "cosine to target": f"{F.cosine_similarity(pooled, embeds[chosen]).mean():.4f}",
            "agreement": f"{(classes == predicted[chosen]).double().mean():.3f}",
            "locations' cosine to exact": f"{F.cosine_similarity(local, exact, dim=-1).mean():.3f}",
        }
        table.append(row)
        print(" | ".join(str(value) for value in row.values()), file=sys.stderr, flush=True)

    slow = options.num_slow
    plain = {"steps": 30, "num_locations": 4, "stop": None}
    add("nothing (control)", TTTConfig(steps=1, learning_rate=1e-30))
    add("output bias, closed form (control)", None)
    add("output bias (control)", TTTConfig.preset("fast", fit="output_bias", learning_rate=0.2, **plain))
    add("trigger", TTTConfig.preset("fast", fit="trigger", learning_rate=1e-2, **plain), num_images=slow)
    add("heads", TTTConfig.preset("fast", fit="heads", learning_rate=5e-4, **plain))
    add("last layers", TTTConfig.preset("fast", fit="last_layers", learning_rate=2e-4, **plain), num_images=slow)
    for rank in (1, 64):
        add(f"low rank, {rank}", TTTConfig.preset("fast", rank=rank))
    for num_locations in (1, 4, 64):
        add("low rank, 8", TTTConfig.preset("fast", num_locations=num_locations), num_images=slow)
    add("low rank, 8: fast", TTTConfig.preset("fast"))
    add("low rank, 8: fast, bfloat16", TTTConfig.preset("fast", dtype="bfloat16"))
    add("low rank, 8: fast", TTTConfig.preset("fast", stop=None, steps=60))
    for num_locations, steps in ((4, 20), (16, 20), (16, 40), (64, 20)):
        add("all", TTTConfig(num_locations=num_locations, steps=steps), num_images=slow)
    add("all: paper", TTTConfig(), num_images=options.num_exact)
    add("all: paper, longer", TTTConfig(steps=options.exact_steps), num_images=options.num_exact)
    return table


def print_quality(table: list[dict[str, Any]]) -> None:
    print("| " + " | ".join(table[0]) + " |")
    print("| --- |" + " ---: |" * (len(table[0]) - 1))
    for row in table:
        print("| " + " | ".join(str(value) for value in row.values()) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--release_steps", type=int, default=1, help="steps of (a) to measure (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=2, help="of every other row (default: %(default)s)")
    parser.add_argument("--teacher", help="with a text tower, for the second table")
    parser.add_argument("--dataset", help="labelled photos, for the second table")
    parser.add_argument("--num_photos", type=int, default=200)
    parser.add_argument("--num_slow", type=int, default=32, help="photos for fits that take long")
    parser.add_argument("--num_exact", type=int, default=4, help="photos for the exact fit")
    parser.add_argument("--exact_steps", type=int, default=100, help="of the exact fit at its plateau")
    parser.add_argument("--skip_cost", action="store_true", help="the second table alone")
    parser.add_argument("--output_file", help="also write both as JSON")
    options = parser.parse_args()
    if (options.teacher is None) != (options.dataset is None):
        parser.error("--teacher, --dataset: expected both or neither")
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {where}\n")
    results: dict[str, Any] = {}
    if not options.skip_cost:
        results["cost"] = cost(options.release_steps, options.repeats)
        print_cost(results["cost"])
    if options.teacher is not None:
        results["quality"] = quality(options)
        print()
        print_quality(results["quality"])
    if options.output_file is not None:
        with open(options.output_file, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
