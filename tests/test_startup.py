"""Start-up: what is loaded, and when; never how long it takes, which is `benchmarks/startup.py`'s to say."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import apm_hf
from apm_hf import registration

HEAVY = {"torch", "transformers", "numpy", "PIL", "accelerate", "shtab"}


def last_line(program, environment):
    """What a fresh process that runs the program prints last, as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# --- what is not loaded ---


def test_the_package_and_the_help_of_its_command_load_no_heavy_library(environment):
    program = f"""
import json, sys
import apm_hf
told = {{"package": sorted({HEAVY!r} & set(sys.modules)), "names": sorted(set(apm_hf.__all__) - set(dir(apm_hf)))}}
from apm_hf.cli import COMMANDS, main
for command in ("", *sorted(set(COMMANDS) - {{"distill"}})):  # its options are fields of what it trains with
    try:
        main([command, "--help"] if command else ["--help"])
    except SystemExit as end:
        told[command] = [end.code, *sorted({HEAVY!r} & set(sys.modules))]
print(json.dumps(told))
"""
    told = last_line(program, environment)
    assert told.pop("package") == told.pop("names") == []
    assert len(told) > 10 and set(map(tuple, told.values())) == {(0,)}, told


# --- registration, in fresh processes ---

ORDERS = """
import json, os, sys
import torch, transformers.activations  # both orders need them, and none of what follows is loaded by them
from importlib.machinery import SourceFileLoader

AUTO = "transformers.models.auto."
assert AUTO + "configuration_auto" not in sys.modules and "apm_hf" not in sys.modules


def loaded():
    return sorted(name for name in sys.modules if name.startswith("apm_hf.") and name != "apm_hf.registration")


def ours_first():
    import apm_hf
    from transformers import AutoModel
    from transformers.models.auto import configuration_auto, modeling_auto
    told = {"loaded": loaded(), "loader": type(modeling_auto.__spec__.loader) is SourceFileLoader}
    assert modeling_auto.__loader__ is modeling_auto.__spec__.loader
    return told


def theirs_first():
    from transformers import AutoModel, pipeline
    from transformers.models.auto import image_processing_auto, modeling_auto
    import apm_hf
    return {"loaded": loaded()}


def use():
    from threading import Thread
    from transformers import AutoConfig, AutoModel, AutoModelForSemanticSegmentation, pipeline
    from transformers.models.auto.image_processing_auto import AutoImageProcessor
    import apm_hf
    from apm_hf.demo_assets import DEMO_MODEL
    models = []
    threads = [Thread(target=lambda: models.append(AutoModel.from_pretrained(DEMO_MODEL))) for _ in range(3)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert [type(model) for model in models] == 3 * [apm_hf.APMModel], models
    assert AutoConfig.for_model("apm").__class__ is apm_hf.APMConfig
    segmenter = AutoModelForSemanticSegmentation.from_config(models[0].config)
    assert type(segmenter) is apm_hf.APMForSemanticSegmentation
    image_processor = AutoImageProcessor.from_pretrained(DEMO_MODEL)
    assert type(image_processor) in (apm_hf.APMImageProcessor, apm_hf.APMImageProcessorPil)
    from transformers.pipelines import PIPELINE_REGISTRY
    _, task, _ = PIPELINE_REGISTRY.check_task("apm-zero-shot-image-classification")
    assert task["impl"] is apm_hf.TestTimeTrainingPipeline
    assert pipeline("image-segmentation", model=segmenter, image_processor=image_processor)


told = {}
for order in (ours_first, theirs_first):
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        found = order()
        use()
        os.write(writer, json.dumps(found).encode())
        os._exit(0)  # an exception ends the child with a traceback, and status 1
    _, status = os.waitpid(child, 0)
    assert status == 0, order.__name__
    told[order.__name__] = json.loads(os.read(reader, 10_000))
print(json.dumps(told))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="both orders begin in one process that is forked")
def test_auto_classes_and_pipelines_know_apm_whichever_was_imported_first(environment):
    told = last_line(ORDERS, environment)
    # Importing both loads no class of ours; pipelines take theirs along.
    assert told["ours_first"] == {"loaded": [], "loader": True}
    assert not [name for name in told["theirs_first"]["loaded"] if "modeling" in name or "image_processing" in name]


# --- registration where transformers has changed ---


class Recorder:
    """An Auto class that remembers what it is told."""

    def __init__(self):
        self.told = []

    def register(self, *arguments, **options):
        assert options.pop("exist_ok")
        self.told.append((*arguments, *options.values()))


def module(**tables):
    autos = ("AutoConfig", "AutoImageProcessor", *registration.MODELS)
    return SimpleNamespace(**{name: Recorder() for name in autos}, **tables)


CLASSES = [("AutoConfig", "apm", "APMConfig")] + [
    (auto, "APMConfig", name) for auto, (_, name) in registration.MODELS.items()
]


def by_class(found):
    """Whether the models' and the configuration's classes were registered, with `name`s for classes."""
    told = [
        (auto, *getattr(found, auto).told[0])
        for auto in ("AutoConfig", *registration.MODELS)
        if getattr(found, auto).told
    ]
    return [tuple(getattr(one, "__name__", one) for one in row) for row in told]


@pytest.mark.parametrize("tables", ["none", "plain dictionaries", "tables nobody reads"])
def test_where_tables_are_not_as_known_classes_are_registered(tables):
    found = module()
    mappings = ["CONFIG_MAPPING", "IMAGE_PROCESSOR_MAPPING", *(mapping for mapping, _ in registration.MODELS.values())]
    for mapping in mappings if tables != "none" else ():
        names = {} if tables == "plain dictionaries" else SimpleNamespace(_reverse_config_mapping={})
        setattr(found, f"{mapping}_NAMES", {})
        setattr(found, mapping, Unread() if tables == "tables nobody reads" else names)
    registration._configuration(found)
    registration._models(found)
    registration._image_processors(found)
    assert by_class(found) == CLASSES
    config, processors = found.AutoImageProcessor.told[0]
    assert config is apm_hf.APMConfig
    assert processors == {"torchvision": apm_hf.APMImageProcessor, "pil": apm_hf.APMImageProcessorPil}


class Unread(dict):
    """A mapping that has what is written, and does not look at it."""

    def __init__(self):
        self._reverse_config_mapping = {}


def test_another_model_of_the_same_type_is_replaced():
    found = module(CONFIG_MAPPING_NAMES={"apm": "AnotherConfig"}, CONFIG_MAPPING={"apm": object})
    registration._configuration(found)
    assert found.AutoConfig.told == [("apm", apm_hf.APMConfig)]


def test_where_modules_have_moved_everything_is_registered_at_once(monkeypatch):
    found = module()
    monkeypatch.setitem(sys.modules, "transformers", found)
    found.__spec__ = SimpleNamespace(submodule_search_locations=[str(Path(__file__).parent)])
    monkeypatch.setattr(registration, "_pipelines", lambda module: None)
    registration.register()
    assert by_class(found) == CLASSES and found.AutoImageProcessor.told


def test_registering_again_changes_nothing():
    from transformers.models.auto import configuration_auto, modeling_auto

    finders, known = list(sys.meta_path), len(modeling_auto.MODEL_MAPPING)
    registration.register()
    assert sys.meta_path == finders and len(modeling_auto.MODEL_MAPPING) == known
    assert configuration_auto.CONFIG_MAPPING["apm"] is apm_hf.APMConfig
    assert configuration_auto.CONFIG_MAPPING_NAMES["apm"] == "APMConfig"


# --- names ---


def test_every_public_name_is_its_modules_own():
    for name in apm_hf.__all__:
        value = getattr(apm_hf, name)
        assert value is getattr(sys.modules[f"apm_hf.{apm_hf._MODULES[name]}"], name)
        assert apm_hf.__dict__[name] is value  # found without looking again


def test_a_star_import_gives_the_public_names():
    found = {}
    exec("from apm_hf import *", found)
    assert set(found) - {"__builtins__"} == set(apm_hf.__all__)


def test_type_checkers_are_told_the_names_that_are_loaded_on_use():
    (block,) = [
        node
        for node in ast.parse(Path(apm_hf.__file__).read_text()).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    told = {alias.name: node.module for node in block.body for alias in node.names}
    assert told == apm_hf._MODULES and sorted(told) == apm_hf.__all__


def test_modules_of_public_names_are_attributes_without_an_import_of_their_own():
    for name in set(apm_hf._MODULES.values()):
        assert getattr(apm_hf, name) is sys.modules[f"apm_hf.{name}"]


# --- the benchmark's own check ---


def test_a_figure_above_its_limit_is_missed_and_the_benchmark_fails(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import startup

    slow, quick = (startup.Figure("import", seconds, "rival", 2.0, limit=0.3) for seconds in (0.4, 0.2))
    free = startup.Figure("whole", 9.0, "rival", 2.0)
    assert slow.missed and not quick.missed and not free.missed and free.ratio == 4.5
    monkeypatch.setattr(sys, "argv", ["startup.py"])
    for found, status in (([quick, free], 0), ([quick, slow], 1)):
        monkeypatch.setattr(startup, "figures", lambda found=found: found)
        assert startup.main() == status
    assert "MISSED" in capsys.readouterr().out
