"""Libraries that find layers by type and replace or move them: adapters, quantisation, offloading.

torchao and bitsandbytes are imported by every `import transformers` or Trainer where they are installed, and print or
compile then: they lie in folders of their own, `torchao` and `bitsandbytes` in the environment, and are tried in a
child process.
"""

import copy
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from accelerate import cpu_offload, disk_offload
from optimum import quanto
from torch import nn
from transformers import QuantoConfig

from apm_hf import APMModel
from fixtures_ecosystem import (
    HEADS,
    MODELS,
    assert_alike,
    assert_same,
    build,
    inputs_for,
    labels_for,
    linears,
    loss_of,
    tensors,
)
from naive_apm import assert_close, random_coordinates

HERE = Path(__file__).parent


# --- adapters -----------------------------------------------------------------------------------------------------

ADAPTERS = {
    "LoRA": peft.LoraConfig(r=4, target_modules="all-linear"),
    "DoRA": peft.LoraConfig(r=4, use_dora=True, target_modules="all-linear"),
    "IA3": peft.IA3Config(target_modules="all-linear", feedforward_modules=[]),
    "OFT": peft.OFTConfig(r=0, oft_block_size=2, target_modules="all-linear"),
    "LoHa": peft.LoHaConfig(r=4, target_modules="all-linear"),
}
# peft 0.21 reads an attribute that transformers 5.23 has renamed, and adjusts sizes that do not divide a layer's.
of_peft = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning", "ignore:Invalid `oft_block_size`:UserWarning"
)


@of_peft
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapters_wrap_every_linear_learn_and_merge(adapter):
    model = build("rich")
    inputs, names = inputs_for(model), linears(model)
    expected = model(**inputs)
    adapted = peft.get_peft_model(model, copy.deepcopy(ADAPTERS[adapter]))
    wrapped = [name for name, module in adapted.base_model.model.named_modules() if hasattr(module, "base_layer")]
    assert wrapped == names
    assert_same(adapted(**inputs), expected)
    learnt = {name: value for name, value in adapted.named_parameters() if value.requires_grad}
    before = {name: value.detach().clone() for name, value in learnt.items()}
    optimizer = torch.optim.Adam(learnt.values(), lr=1e-3)
    for _ in range(2):  # half of a product of two matrices begins at 0
        loss_of(adapted(**inputs)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert [name for name, value in learnt.items() if torch.equal(value, before[name])] == []
    with torch.no_grad():
        outputs = adapted.eval()(**inputs)
        assert (outputs.last_hidden_state - expected.last_hidden_state).abs().max() > 1e-3
        merged = adapted.merge_and_unload()
        assert linears(merged) == names and isinstance(merged, APMModel)
        assert_same(merged(**inputs), outputs, 1e-4)


@of_peft
def test_an_adapter_of_a_head_is_saved_and_loaded_with_it(tmp_path):
    model = build("classification")
    inputs = inputs_for(model)
    config = peft.LoraConfig(r=2, target_modules="all-linear", modules_to_save=["classifier"])
    adapted = peft.get_peft_model(model, config)
    adapted(**inputs, **labels_for(build("classification"))).loss.backward()
    torch.optim.SGD(adapted.parameters(), lr=1e-2).step()
    adapted.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(build("classification"), tmp_path)
    assert_same(loaded.eval()(**inputs), adapted.eval()(**inputs), 1e-6)


# --- quantisation -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_quanto_quantises_every_linear():
    model = build("rich")
    inputs, names = inputs_for(model), linears(model)
    expected = model(**inputs)
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)
    layers = [name for name, module in model.named_modules() if isinstance(module, quanto.QLinear)]
    assert layers == names
    assert_alike(model(**inputs), expected)


@torch.no_grad()
def test_quanto_quantises_while_loading(tmp_path):
    model = build("rich")
    model.save_pretrained(tmp_path)
    loaded = APMModel.from_pretrained(tmp_path, quantization_config=QuantoConfig(weights="int8")).eval()
    layers = [name for name, module in loaded.named_modules() if isinstance(module, quanto.QLinear)]
    assert layers == linears(model)
    assert_alike(loaded(**inputs_for(model)), model(**inputs_for(model)))


@pytest.mark.filterwarnings("ignore:.*deprecated:UserWarning", "ignore:.*deprecated:DeprecationWarning")
@torch.no_grad()
def test_dynamic_quantisation_replaces_every_linear():
    model = build("rich")
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    dynamic = torch.ao.nn.quantized.dynamic.Linear
    layers = [name for name, module in quantised.named_modules() if isinstance(module, dynamic)]
    assert layers == linears(model)
    assert_alike(quantised(**inputs_for(model)), model(**inputs_for(model)))


CHILDREN = {
    "torchao": """
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import TorchAoConfig

quantised = build("rich")
quantize_(quantised, Int8WeightOnlyConfig())
changed = [name for name in names if type(quantised.get_submodule(name).weight) is not nn.Parameter]
assert changed == names, changed
assert_alike(quantised(**inputs), expected)
loaded = APMModel.from_pretrained(folder, quantization_config=TorchAoConfig(Int8WeightOnlyConfig())).eval()
changed = [name for name in names if type(loaded.get_submodule(name).weight) is not nn.Parameter]
assert changed == names, changed
assert_alike(loaded(**inputs), expected)
loaded.save_pretrained(folder + "/again")
assert_same(APMModel.from_pretrained(folder + "/again").eval()(**inputs), loaded(**inputs))
""",
    "bitsandbytes": """
import bitsandbytes
from transformers import BitsAndBytesConfig

loaded = APMModel.from_pretrained(folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True)).eval()
changed = [name for name in names if isinstance(loaded.get_submodule(name), bitsandbytes.nn.Linear8bitLt)]
assert changed == names, changed
assert_alike(loaded(**inputs), expected)
""",
}


def is_there(library):
    return (Path(sys.prefix) / library).is_dir() or importlib.util.find_spec(library) is not None


@pytest.fixture(scope="module")
def child(tmp_path_factory, environment):
    """Return the lines and the errors of one child process that tries all libraries that are there, in turn."""
    folder = tmp_path_factory.mktemp("quantised")
    build("rich").save_pretrained(folder)
    present = {library: program for library, program in CHILDREN.items() if is_there(library)}
    program = f"""
import sys
import traceback
import torch
from torch import nn
from apm_hf import APMModel
from fixtures_ecosystem import assert_alike, assert_same, build, inputs_for, linears

folder = sys.argv[1]
model = build("rich")
inputs, names = inputs_for(model), linears(model)
with torch.no_grad():
    expected = model(**inputs)
    for library, program in {present!r}.items():
        try:
            exec(program)
            print(library, len(changed))
        except Exception:
            traceback.print_exc()
"""
    paths = [HERE.parent / "src", HERE, *(Path(sys.prefix) / library for library in present)]
    paths = [*map(str, paths), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    command = [sys.executable, "-c", program, str(folder)]
    environment = {**environment, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    return done.stdout.splitlines(), done.stderr


@pytest.mark.parametrize("library", CHILDREN)
def test_int8_weights_of_libraries_that_are_kept_apart(library, request):
    if not is_there(library):
        pytest.skip(f"{library} is neither installed nor in a folder of this name in the environment")
    lines, errors = request.getfixturevalue("child")
    assert f"{library} {len(linears(build('rich')))}" in lines, errors


# --- offloading ---------------------------------------------------------------------------------------------------


def offloaded(model, where, folder):
    if where == "cpu":
        return cpu_offload(copy.deepcopy(model), execution_device="cpu")
    if where == "disk":
        return disk_offload(copy.deepcopy(model), str(folder / "offloaded"), execution_device="cpu")
    model.save_pretrained(folder / "saved")
    names = [name for name, _ in model.named_children()]
    places = {name: ("disk", "cpu")[row % 2] for row, name in enumerate(names)}
    places |= {name: "cpu" for name, _ in model.named_parameters(recurse=False)}
    options = {"device_map": places, "offload_folder": str(folder / "offloaded")}
    return type(model).from_pretrained(folder / "saved", **options).eval()


@pytest.mark.filterwarnings("ignore:The following device_map keys:UserWarning")  # of a parameter outside any layer
@torch.no_grad()
@pytest.mark.parametrize("where", ["cpu", "disk", "map"])
@pytest.mark.parametrize("kind", MODELS)
def test_offloaded_models_compute_the_same(kind, where, tmp_path):
    model = build(kind)
    other, inputs = offloaded(model, where, tmp_path), inputs_for(model)
    assert any(parameter.device.type == "meta" for parameter in other.parameters())
    assert_same(other(**inputs), model(**inputs))
    if kind == "segmentation":
        assert_same(other(**inputs, output_size=(5, 7)), model(**inputs, output_size=(5, 7)))
    if kind not in (*HEADS, "embedding"):
        places, column = random_coordinates(4), other.fold(**inputs)
        pixels = inputs["pixel_values"]
        assert_same(other.query(column, places, pixel_values=pixels), model(pixels, places))
        assert_close(other.pooled_features(pixels), model(pixels).pooler_output)


def test_a_device_map_by_size_leaves_a_part_on_the_disk(tmp_path):
    model = build("rich")
    model.save_pretrained(tmp_path)
    size = sum(parameter.nbytes for parameter in model.parameters())
    options = {"max_memory": {"cpu": int(0.9 * size)}, "offload_folder": str(tmp_path / "offloaded")}
    other = APMModel.from_pretrained(tmp_path, device_map="auto", **options).eval()
    assert set(other.hf_device_map.values()) == {"cpu", "disk"}
    with torch.no_grad():
        assert tensors(other(**inputs_for(model))).keys() == tensors(model(**inputs_for(model))).keys()
        assert_same(other(**inputs_for(model)), model(**inputs_for(model)))
