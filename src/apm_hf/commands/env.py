"""`apm env`: what this runs on, to be put into an issue: no token, no user name, no home folder."""

import argparse
import getpass
import os
import platform
import re
from pathlib import Path
from typing import Any

HELP = "print versions, devices and defaults, for bug reports"
DESCRIPTION = """
Print what apm_hf runs on: versions, optional packages that are there or missing with the line that adds them, devices
with their memory, the device and the number formats that are chosen by default, the image backend, and where the
embedded models are. It can go into an issue as it is: tokens, the user's name and the home folder are left out.
"""
EXAMPLES = ("apm env", "apm env --json")
RESULT = {
    "versions": "package -> version, or null where it is missing",
    "extras": "extra -> packages (package -> version or null) and install, the line that adds it, or null",
    "system": "python, os, machine, cpus, torch_threads, memory_bytes",
    "devices": "a list: type, name, memory_bytes (null where unknown), bfloat16",
    "defaults": "device, teacher_dtype, mixed_precision of a distillation, image_backend",
    "hub": "offline, whether HF_HUB_OFFLINE is set; logged_in, whether there is a token; cache, its folder",
    "teachers": "what is asked for where no teacher is named -> name, and cached, whether it needs no network",
    "embedded": "teacher and model, their folders",
}
INTERRUPTED = "nothing was printed"
SMALLER = ""

CORE = ("torch", "torchvision", "transformers", "huggingface-hub", "safetensors", "numpy", "pillow")
BESIDE = ("accelerate", "datasets", "evaluate")


def add_options(parser: argparse.ArgumentParser) -> None:
    pass


def run(options: argparse.Namespace) -> dict[str, Any]:
    facts = environment()
    if not options.json:
        print(_text(facts))
    return facts


def environment() -> dict[str, Any]:
    """Return what `RESULT` describes."""
    import psutil
    import torch
    from huggingface_hub import constants, get_token

    from .. import __version__
    from ..assets import PHOTO_MODEL, PHOTO_TEACHER
    from ..teachers.defaults import HUB_TEACHERS, cached

    return {
        "versions": {"apm_hf": __version__, **{name: _version(name) for name in (*CORE, *BESIDE)}},
        "extras": _extras(),
        "system": {
            "python": platform.python_version(),
            "os": platform.platform(),
            "machine": platform.machine(),
            "cpus": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "memory_bytes": psutil.virtual_memory().total,
        },
        "devices": _devices(),
        "defaults": _defaults(),
        "hub": {
            "offline": bool(constants.HF_HUB_OFFLINE),
            "logged_in": get_token() is not None,
            "cache": _public(constants.HF_HUB_CACHE),
        },
        "teachers": {task: {"name": name, "cached": bool(cached(name))} for task, name in HUB_TEACHERS.items()},
        "embedded": {"teacher": _public(PHOTO_TEACHER), "model": _public(PHOTO_MODEL)},
    }


def _version(name: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _extras() -> dict[str, Any]:
    """List the extras of the installed distribution; none where the source is used without being installed."""
    from importlib import metadata

    from packaging.requirements import Requirement

    try:
        lines = metadata.requires("apm_hf") or []
    except metadata.PackageNotFoundError:
        return {}
    extras: dict[str, dict[str, str | None]] = {}
    for requirement in map(Requirement, lines):
        extra = re.search(r"extra == ['\"]([^'\"]+)", str(requirement.marker or ""))
        if extra and requirement.name.replace("-", "_") != "apm_hf":  # some extras name others
            extras.setdefault(extra[1], {})[requirement.name] = _version(requirement.name)
    return {
        extra: {
            "packages": packages,
            "install": None if all(packages.values()) else f'pip install "apm_hf[{extra}]"',
        }
        for extra, packages in sorted(extras.items())
        if extra != "dev"
    }


def _devices() -> list[dict[str, Any]]:
    import psutil
    import torch

    total = psutil.virtual_memory().total
    found = [{"type": "cpu", "name": _processor(), "memory_bytes": total, "bfloat16": _cpu_bfloat16()}]
    if not torch.accelerator.is_available():
        return found
    kind = torch.accelerator.current_accelerator().type  # type: ignore[union-attr]
    for index in range(torch.accelerator.device_count()):
        name, memory, bfloat16 = kind, None, None
        if kind in ("cuda", "xpu"):
            module = torch.get_device_module(kind)
            properties = module.get_device_properties(index)
            name, memory, bfloat16 = properties.name, properties.total_memory, bool(module.is_bf16_supported())
        elif kind == "mps":
            memory = torch.mps.recommended_max_memory()
        found.append({"type": f"{kind}:{index}", "name": name, "memory_bytes": memory, "bfloat16": bfloat16})
    return found


def _processor() -> str:
    """Linux keeps its name elsewhere than Python looks."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _cpu_bfloat16() -> bool | None:
    """Return whether torch finds instructions for bfloat16 products in the CPU; None where that is unknown."""
    import torch

    ask = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return None if ask is None else bool(ask())


def _defaults() -> dict[str, Any]:
    from transformers.utils import is_torchvision_available

    from ..runs.devices import default_device, default_precision

    device, precision = default_device(), None
    if _version("accelerate") is not None:
        precision = default_precision()
    return {
        "device": device,
        "teacher_dtype": "float32" if device == "cpu" else "the checkpoint's",
        "mixed_precision": precision,
        "image_backend": "torchvision" if is_torchvision_available() else "pil",
    }


def _public(path: str) -> str:
    """A path without home folder and user name."""
    path = os.path.abspath(path)
    home = os.path.expanduser("~")
    if home != os.sep and Path(path).is_relative_to(home):
        path = os.path.join("~", os.path.relpath(path, home))
    try:
        user = getpass.getuser()
    except (OSError, KeyError, ImportError):  # a container's user may have no name
        return path
    return os.sep.join("USER" if part == user else part for part in path.split(os.sep))


def _text(facts: dict[str, Any]) -> str:
    def size(count: int | None) -> str:
        return "unknown" if count is None else f"{count / 2**30:.1f} GiB"

    system, defaults, hub = facts["system"], facts["defaults"], facts["hub"]
    rows = [(name, version or "missing") for name, version in facts["versions"].items()]
    rows += [
        ("python", system["python"]),
        ("system", f"{system['os']}, {system['cpus']} CPUs, {system['torch_threads']} threads in torch"),
    ]
    says = {True: ", bfloat16", False: ", no bfloat16", None: ""}
    for device in facts["devices"]:
        rows.append((device["type"], f"{device['name']}, {size(device['memory_bytes'])}{says[device['bfloat16']]}"))
    rows += [
        ("default device", f"{defaults['device']}, teachers in {defaults['teacher_dtype']}"),
        ("mixed precision", defaults["mixed_precision"] or "unknown: accelerate is missing"),
        ("image backend", defaults["image_backend"]),
        ("hub", f"{'offline' if hub['offline'] else 'online'}, {'a' if hub['logged_in'] else 'no'} token"),
        ("hub cache", hub["cache"]),
        *(
            (f"for {task}", f"{teacher['name']}, {'cached' if teacher['cached'] else 'not in the cache'}")
            for task, teacher in facts["teachers"].items()
        ),
        ("embedded teacher", facts["embedded"]["teacher"]),
        ("embedded model", facts["embedded"]["model"]),
    ]
    for extra, entry in facts["extras"].items():
        lacking = ", ".join(name for name, version in entry["packages"].items() if version is None)
        rows.append((f"apm_hf[{extra}]", f"lacks {lacking}: {entry['install']}" if lacking else "complete"))
    return "\n".join(f"{name:<18} {value}" for name, value in rows)
