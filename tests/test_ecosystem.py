"""The model among its neighbours: transformers' Trainer and conventions, several processes, and other weights.

`test_ecosystem_layers.py` holds the libraries that replace or move layers, `test_ecosystem_compiled.py` those that
trace the model.
"""

import copy
import json

import pytest
import torch
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import prune
from torch.utils.data import Dataset
from transformers import AutoModel, Trainer, TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer

from apm_hf import APMForImageClassification, APMModel
from fixtures_ecosystem import (
    HEADS,
    MODELS,
    NUM_LABELS,
    RICH,
    assert_same,
    build,
    inputs_for,
    labels_for,
    loss_of,
    tensors,
)
from fixtures_runs import forget_accelerate, processes
from naive_apm import small_config, small_images

HELD = []  # a wrapper for several processes that is destroyed may wait for a thread that waits for it


@pytest.fixture(autouse=True)
def one_processor(monkeypatch):
    """Accelerate keeps its state between runs of one process; a new process starts without."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    forget_accelerate()
    yield
    forget_accelerate()


# --- Trainer ------------------------------------------------------------------------------------------------------


class Labelled(Dataset):
    """16 images with the labels of a head."""

    def __init__(self, kind):
        self.images, self.labels = small_images(16), labels_for(build(kind), 16)["labels"]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


def trainer(kind, folder, **options):
    settings = {"max_steps": 4, "save_steps": 2, "logging_steps": 1, "learning_rate": 1e-2}
    settings |= {"per_device_train_batch_size": 4, "report_to": [], "disable_tqdm": True}
    # Adam would blow up gradients that are 0 but for rounding.
    settings |= {"use_cpu": True, "dataloader_pin_memory": False, "optim": "sgd"}
    arguments = TrainingArguments(str(folder), **(settings | options))
    return Trainer(build(kind).train(), arguments, train_dataset=Labelled(kind), eval_dataset=Labelled(kind))


def differences(first, second):
    first, second = first.state_dict(), second.state_dict()
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


# The new name does not exist in the oldest version that this package supports.
renamed = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")


@renamed
@pytest.mark.parametrize("kind", ["classification", "segmentation"])
def test_trainer_trains_saves_and_resumes(kind, tmp_path):
    whole = trainer(kind, tmp_path / "whole")
    before = copy.deepcopy(whole.model)
    whole.train()
    assert differences(before, whole.model) > 1e-3
    whole.save_model(tmp_path / "final")
    assert json.loads((tmp_path / "final/config.json").read_text())["use_cache"] is False  # Trainer's own field
    assert differences(whole.model, type(whole.model).from_pretrained(tmp_path / "final")) == 0
    resumed = trainer(kind, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    assert resumed.state.global_step == 4 and differences(whole.model, resumed.model) == 0
    checkpointed = trainer(kind, tmp_path / "checkpointed", gradient_checkpointing=True)
    checkpointed.train()
    assert differences(whole.model, checkpointed.model) < 1e-5
    assert whole.evaluate()["eval_loss"] > 0


@renamed
def test_trainer_with_checkpointing_on_two_processes_learns_what_one_does(tmp_path):
    def learn(rank):
        forget_accelerate()
        two = trainer("classification", tmp_path / "two", per_device_train_batch_size=2, gradient_checkpointing=True)
        HELD.append(two)
        assert two.args.world_size == 2
        two.train()
        if rank == 0:
            two.model.save_pretrained(tmp_path / "final")
        distributed.barrier()

    assert processes(2, learn) == [0, 0]
    forget_accelerate()
    one = trainer("classification", tmp_path / "one")
    one.train()
    other = APMForImageClassification.from_pretrained(tmp_path / "final")
    assert differences(build("classification"), other) > 1e-3, "nothing was learnt"
    assert differences(one.model, other) < 1e-4


# --- DDP and FSDP2 ------------------------------------------------------------------------------------------------


def test_every_parameter_of_every_model_is_reached_by_a_loss():
    for kind in MODELS:
        model = build(kind)
        labels = labels_for(model) if kind in HEADS else {}
        outputs = model(**inputs_for(model), **labels)
        (outputs.loss if kind in HEADS else loss_of(outputs)).backward()
        assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == [], kind


def test_plain_ddp_trains_every_head():
    def learn(rank):
        distributed.init_process_group("gloo")
        for kind in ("rich", *HEADS):
            model = build(kind).train()
            parallel = DistributedDataParallel(model)
            HELD.append(parallel)
            for _ in range(2):  # the second pass fails where the first left a parameter without gradient
                outputs = parallel(**inputs_for(model), **(labels_for(model) if kind in HEADS else {}))
                (outputs.loss if kind in HEADS else loss_of(outputs)).backward()
        distributed.barrier()

    assert processes(2, learn) == [0, 0]


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")  # of the view in which a Linear ends
@pytest.mark.parametrize("number", [1, 2])
def test_outputs_of_shards_follow_their_weights(number):
    def evaluate(rank):
        distributed.init_process_group("gloo")
        for kind in ("rich", "classification", "clip-ttt"):
            model, other = build(kind), build(kind, seed=5)
            inputs, names = inputs_for(model), model._no_split_modules
            for module in [module for module in model.modules() if type(module).__name__ in names]:
                fully_shard(module)
            HELD.append(fully_shard(model))
            with torch.no_grad():
                assert_same(model(**inputs), build(kind)(**inputs))
                model.reshard()
                set_model_state_dict(model, other.state_dict(), options=StateDictOptions(full_state_dict=True))
                assert_same(model(**inputs), other(**inputs))
                shards = {name: value.clone() for name, value in model.state_dict().items()}
                for parameter in (*model.parameters(), *other.parameters()):
                    parameter.mul_(1.5)
                assert_same(model(**inputs), other(**inputs))
                model.load_state_dict(shards)
                assert_same(model(**inputs), build(kind, seed=5)(**inputs))
            loss_of(model.train()(**inputs)).backward()
            assert all(parameter.grad is not None for parameter in model.parameters())
        distributed.barrier()

    assert processes(number, evaluate) == [0] * number


# --- weights that change between two evaluations ------------------------------------------------------------------


@torch.no_grad()
def average(model):
    """Write an exponential mean of two models through `.data`."""
    for parameter, other in zip(model.parameters(), build("rich", seed=5).parameters(), strict=True):
        parameter.data.copy_(0.9 * parameter.data + 0.1 * other.data)


def prune_by_data(model):
    for parameter in model.parameters():
        parameter.data.mul_((parameter.data.abs() > 0.2).to(parameter.dtype))


def prune_layers(model):
    for module in [module for module in model.modules() if isinstance(module, nn.Linear)]:
        prune.l1_unstructured(module, "weight", amount=0.5)


def write_through_shared_memory(model):
    """Let another process write, as workers of Hogwild do."""
    model.share_memory()

    def write(rank):
        for parameter in model.parameters():
            parameter.data.mul_(1.5)

    assert processes(1, write) == [0]


@pytest.mark.parametrize("change", [average, prune_by_data, prune_layers, write_through_shared_memory])
def test_outputs_follow_weights_that_change_behind_autograds_back(change):
    model, inputs = build("rich"), inputs_for(build("rich"))
    with torch.no_grad():
        before = tensors(model(**inputs))
        change(model)
        after = model(**inputs)
        weights = {}
        for name, module in model.named_modules():
            names = {name for name, _ in module.named_parameters(recurse=False)}
            for own in {name.removesuffix("_orig") for name in names}:
                weights[f"{name}.{own}".lstrip(".")] = getattr(module, own)
        fresh = build("rich", seed=9)  # a model that has computed nothing before
        fresh.load_state_dict(weights)
        assert_same(after, fresh(**inputs), 1e-6)
    assert (tensors(after)["last_hidden_state"] - before["last_hidden_state"]).abs().max() > 0.1


# --- conventions --------------------------------------------------------------------------------------------------


def test_files_hold_fields_of_libraries_users_and_later_versions(tmp_path):
    model = build("plain")
    model.config.use_cache = False
    model.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**fields, "field_of_2030": {"a": 1}}))
    for loaded in (APMModel.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        assert loaded.config.field_of_2030 == {"a": 1}
        assert_same(loaded.eval()(**inputs_for(model)), model(**inputs_for(model)), 0)
        loaded.save_pretrained(tmp_path / "again")
        assert json.loads((tmp_path / "again/config.json").read_text())["field_of_2030"] == {"a": 1}


def test_conventions_of_transformers_hold(tmp_path):
    model = build("rich")
    assert any(isinstance(module, GradientCheckpointingLayer) for module in model.modules())
    assert model.get_input_embeddings() is model.trigger
    assert APMModel(small_config(tie_word_embeddings=True)).config.tie_word_embeddings
    for kind in ("rich", "classification", "segmentation"):
        model = build(kind)
        options = {"output_attentions": True, "interpolate_pos_encoding": True}
        assert_same(model(**inputs_for(model), **options), model(**inputs_for(model)), 0)
        states = model(**inputs_for(model), output_hidden_states=True).hidden_states
        assert [state.shape[-1] for state in states] == [32, 24]
        assert isinstance(model(**inputs_for(model), return_dict=False), tuple)


def test_other_sizes_may_be_ignored_with_feature_statistics(tmp_path):
    build("rich").save_pretrained(tmp_path)
    wider = {"feature_size": 32, "feature_mean": [0.3] * 32, "feature_std": [2.0] * 32}
    model, found = APMModel.from_pretrained(tmp_path, **wider, ignore_mismatched_sizes=True, output_loading_info=True)
    outputs = model(**inputs_for(model))
    assert outputs.last_hidden_state.shape == (2, 9, 32) and outputs.last_hidden_state.isfinite().all()
    assert model.feature_space.mean.tolist() == pytest.approx(wider["feature_mean"])
    names = {str(entry[0] if isinstance(entry, tuple) else entry) for entry in found["mismatched_keys"]}
    assert "decoder.feature_head.weight" in names and "trigger.weight" not in names
    APMForImageClassification(small_config(**RICH, num_labels=NUM_LABELS)).save_pretrained(tmp_path / "head")
    model = APMForImageClassification.from_pretrained(tmp_path / "head", num_labels=9, ignore_mismatched_sizes=True)
    assert model(**inputs_for(model)).logits.shape == (2, 9)
