"""`apm` in transformers' Auto classes and pipelines, without loading either before somebody asks for them.

`import apm_hf` promises that `AutoModel.from_pretrained` knows `apm`, whichever of the two was imported first. Calling
`AutoModel.register` there and then would load torch and all that models need, seconds that many programs never use.
transformers itself enters its own models by *name* into tables, and imports a class when it is looked up. So does this
module: where a module with such tables is loaded, now or later (a finder on `sys.meta_path` sees it), `apm` is written
into them. Nothing is imported at that moment: no import lock is held that another thread might wait for, and no
half-loaded module is met, which is what calling `register` from such a hook would risk.

The tables are not documented, hence two nets: every entry is looked up again, and where it does not show, or where the
modules are not where they used to be, the classes are loaded and registered through the public functions at once.
"""

import importlib
import sys
from collections.abc import Callable, Mapping
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

PACKAGE = "apm_hf"
MODEL_TYPE, CONFIG = "apm", "APMConfig"
# What transformers' tables take for a model's own package; there it looks up the names.
ALIAS = f"transformers.models.{MODEL_TYPE}"

# Auto class -> its mapping in `modeling_auto`, and our class.
MODELS = {
    "AutoModel": ("MODEL_MAPPING", "APMModel"),
    "AutoModelForImageClassification": ("MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING", "APMForImageClassification"),
    "AutoModelForSemanticSegmentation": ("MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING", "APMForSemanticSegmentation"),
    "AutoModelForZeroShotImageClassification": (
        "MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING",
        "APMForZeroShotImageClassification",
    ),
}
IMAGE_PROCESSORS = {"torchvision": "APMImageProcessor", "pil": "APMImageProcessorPil"}


def register() -> None:
    """Enter `apm` wherever transformers is loaded, and wherever it is going to be."""
    sys.modules[ALIAS] = sys.modules[PACKAGE]
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    if not _modules_are_there():
        transformers = importlib.import_module("transformers")
        _config_class(transformers)
        for auto_class, (_, name) in MODELS.items():
            _model_class(transformers, auto_class, name)
        _image_processor_classes(transformers)
        return _pipelines(transformers)
    for module_name, enter in ENTER.items():
        if module_name in sys.modules:
            enter(importlib.import_module(module_name))  # waits for another thread that may be loading it


# --- by name, in the modules that hold the tables ---


def _configuration(module: Any) -> None:
    """`transformers.models.auto.configuration_auto`."""
    names, mapping = getattr(module, "CONFIG_MAPPING_NAMES", {}), getattr(module, "CONFIG_MAPPING", ())
    if MODEL_TYPE not in mapping:  # else somebody else's, or ours from an earlier call
        names[MODEL_TYPE] = CONFIG
    if names.get(MODEL_TYPE) != CONFIG or MODEL_TYPE not in mapping:
        _config_class(module)


def _models(module: Any) -> None:
    """`transformers.models.auto.modeling_auto`."""
    for auto_class, (mapping, name) in MODELS.items():
        if not _entered(module, mapping, name):
            _model_class(module, auto_class, name)


def _image_processors(module: Any) -> None:
    """`transformers.models.auto.image_processing_auto`."""
    if not _entered(module, "IMAGE_PROCESSOR_MAPPING", dict(IMAGE_PROCESSORS)):
        _image_processor_classes(module)


def _pipelines(module: Any) -> None:
    """`transformers.pipelines`; ours registers itself, also where it was imported first."""
    importlib.import_module(f"{PACKAGE}.pipelines")


def _entered(module: Any, mapping_name: str, name: str | dict[str, str]) -> bool:
    """Write the name into a mapping's table; whether the mapping then answers for our configuration's class."""
    try:
        mapping = getattr(module, mapping_name)
        getattr(module, f"{mapping_name}_NAMES")[MODEL_TYPE] = name  # some pipelines look at nothing else
        mapping._reverse_config_mapping[CONFIG] = MODEL_TYPE  # made before, where the module was loaded before us
    except (AttributeError, TypeError):
        return False
    return type(CONFIG, (), {}) in mapping  # it compares names, so that no class is loaded to look


# --- by class, through the public functions; `auto` is whatever module has the Auto classes ---


def _config_class(auto: Any) -> None:
    auto.AutoConfig.register(MODEL_TYPE, _ours(CONFIG), exist_ok=True)


def _model_class(auto: Any, auto_class: str, name: str) -> None:
    getattr(auto, auto_class).register(_ours(CONFIG), _ours(name), exist_ok=True)


def _image_processor_classes(auto: Any) -> None:
    classes = {backend: _ours(name) for backend, name in IMAGE_PROCESSORS.items()}
    auto.AutoImageProcessor.register(_ours(CONFIG), image_processor_classes=classes, exist_ok=True)


def _ours(name: str) -> Any:
    return getattr(sys.modules[PACKAGE], name)


# --- the moment a module is loaded ---

ENTER: Mapping[str, Callable[[Any], None]] = {
    "transformers.models.auto.configuration_auto": _configuration,
    "transformers.models.auto.modeling_auto": _models,
    "transformers.models.auto.image_processing_auto": _image_processors,
    "transformers.pipelines": _pipelines,
}


def _modules_are_there() -> bool:
    """Whether transformers has the modules that the finder waits for; a stat each, nothing is imported."""
    spec = find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        return False
    root = Path(spec.submodule_search_locations[0])
    paths = [root.joinpath(*name.split(".")[1:]) for name in ENTER]
    return all(path.with_suffix(".py").is_file() or (path / "__init__.py").is_file() for path in paths)


class _Finder:
    """Leaves finding to the others; what it is waiting for gets a loader that registers when it has loaded."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in ENTER:
            return None
        for finder in sys.meta_path:
            if finder is not self and (find := getattr(finder, "find_spec", None)) is not None:
                spec = find(name, path, target)
                if spec is not None:
                    if spec.loader is not None:
                        spec.loader = _Registering(spec.loader, ENTER[name])
                    return spec
        return None


class _Registering:
    """Loads a module as its own loader does, then gives way to it; what inspects modules meets only that one."""

    def __init__(self, loader: Any, enter: Callable[[Any], None]) -> None:
        self.loader, self.enter = loader, enter

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        self.enter(module)
