"""One run on one process, on several, on two computers and in shards: the same global batch gives the same losses.

`apm distill` is really launched on two "computers" that meet on the loopback as the file for Accelerate says; other
processes are forked from this one, which has imported everything, with the environment of `torchrun`. FSDP2, which
Accelerate leaves out on a CPU, is switched on behind its back: everything but the device is what GPUs would run.
"""

import json
import os
import shutil
import signal
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.commands import launch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from safetensors.torch import load_file
from torch.utils.data import IterableDataset

from apm_hf.distillation import DistillationConfig, engine, loop
from apm_hf.distillation import recipe as training
from apm_hf.distillation.recipe import TrainingConfig, train
from apm_hf.distillation.targets import TargetMaker
from apm_hf.image_processing_pil_apm import APMImageProcessorPil
from apm_hf.runs.checkpoints import Checkpoints
from apm_hf.runs.stopping import EXIT_STOPPED
from fixtures_runs import Fatal, forget_accelerate, forked, processes, random_targets, run, status_of
from fixtures_tiny import save_clip, save_splits, student

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
CONFIGS = sorted((EXAMPLES / "configs").glob("*.yaml"))
STUDENT = {"image_size": 24, "patch_size": 8, "position_size": 16, "hidden_sizes": [32, 24], "rgb_hidden_sizes": [12]}
STEPS = 4


@pytest.fixture(autouse=True)
def fresh_accelerate(monkeypatch):
    """Accelerate keeps its state between runs of one process; a new process starts without."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # Accelerate warns of several processes without
    forget_accelerate()
    yield
    forget_accelerate()


def largest_difference(first, second):
    first, second = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


def logged(folder):
    """What TensorBoard was told: `{name: [value of step 1, 2, ...]}`."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = (folder / "logs").glob("*/events.out.tfevents.*")
    events = EventAccumulator(str(file)).Reload()
    return {name: [event.value for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


# --- launched -----------------------------------------------------------------------------------------------------


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@pytest.fixture(scope="module")
def launched(tmp_path_factory, environment):
    """A folder with the same run four times, 16 images a step, and what the two that were launched printed."""
    folder = tmp_path_factory.mktemp("launched")
    save_clip(folder / "clip")
    save_splits(folder / "photos", num_train=48, num_validation=5)
    settings = {"max_steps": STEPS, "learning_rate": 1e-2, "mixed_precision": "no", "num_locations": 5}
    settings |= {"num_pictures": 0, "logging_steps": 1}
    named = {
        "teacher": str(folder / "clip"),
        "dataset": str(folder / "photos"),
        "preset": "tiny",
        "config_overrides": json.dumps(STUDENT),
    }

    def flags(name, **more):
        every = {**named, **settings, "output_dir": folder / name, **more}
        return [word for flag, value in every.items() for word in (f"--{flag}", str(value))]

    two_machines = str(EXAMPLES / "configs/two_machines.yaml")
    meet = [
        "--config_file",
        two_machines,
        "--num_processes",
        "2",
        "--main_process_port",
        free_port(),
        "--machine_rank",
    ]
    split = flags("two_machines", batch_size=4, gradient_accumulation_steps=2)

    def start(rank):
        """`accelerate launch ... -m apm_hf.commands.main distill ...`, whose worker is a new process."""
        log = os.open(folder / f"computer_{rank}", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.update(environment)
        words = [*meet, str(rank), "--module", "apm_hf.commands.main", "distill", *split]
        launch.launch_command(launch.launch_command_parser().parse_args(words))

    children = [forked(lambda rank=rank: start(rank)) for rank in (0, 1)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
        patch.setattr(training, "_draw_card_picture", lambda *inputs: None)  # those that are launched draw one
        patch.setenv("OMP_NUM_THREADS", "1")  # Accelerate warns of several processes without

        def train_here(name, **split):
            forget_accelerate()
            config = DistillationConfig(output_dir=str(folder / name), **settings, **split)
            train(TrainingConfig(**named), config, command="train")

        train_here("one", batch_size=16)
        train_here("passes", batch_size=8, gradient_accumulation_steps=2)
        assert processes(2, lambda rank: train_here("two_processes", batch_size=8)) == [0, 0]
    statuses = [status_of(child) for child in children]
    printed = {f"computer_{rank}": (folder / f"computer_{rank}").read_text() for rank in (0, 1)}
    assert statuses == [0, 0], printed
    return folder, printed


@pytest.mark.parametrize(("name", "num_processes"), [("passes", 1), ("two_processes", 2), ("two_machines", 2)])
def test_the_same_global_batch_gives_the_same_losses_at_every_step(launched, name, num_processes):
    folder, printed = launched
    one, other = logged(folder / "one"), logged(folder / name)
    assert json.loads((folder / name / "speed.json").read_text())["processes"] == num_processes
    losses = [key for key in one if key.startswith("loss")]
    assert sorted(losses) == ["loss", "loss_cls", "loss_grid", "loss_rgb"]
    for key in losses:
        assert len(one[key]) == STEPS and other[key] == pytest.approx(one[key], abs=1e-5), key
    assert one["loss"][0] - one["loss"][-1] > 1e-2, "nothing was learnt"
    assert largest_difference(folder / "one", folder / name) < 1e-5
    first, second = (json.loads((folder / run / "metrics.json").read_text()) for run in ("one", name))
    assert [row["step"] for row in first] == [0, STEPS]
    for one_row, other_row in zip(first, second, strict=True):
        assert other_row == pytest.approx(one_row, abs=1e-5)


def test_each_launched_process_says_how_many_there_are(launched):
    _, printed = launched
    assert [printed[f"computer_{rank}"].count("processes: 2, device: cpu") for rank in (0, 1)] == [1, 1]


# --- the files for Accelerate ---------------------------------------------------------------------------------------


def parsed(path, *words):
    """Arguments as `accelerate launch` completes them."""
    arguments = launch.launch_command_parser().parse_args(["--config_file", str(path), *words, "train.py"])
    arguments, _, _ = launch._validate_launch_command(arguments)
    return arguments


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_every_file_and_it_says_how_it_is_used(path):
    config = load_config_from_file(str(path))
    assert config.distributed_type.value in ("NO", "MULTI_GPU", "FSDP") and path.read_text().startswith("# ")
    arguments = parsed(path)
    assert arguments.num_processes == config.num_processes and arguments.mixed_precision == config.mixed_precision
    assert arguments.use_fsdp == ("fsdp" in path.stem) and bool(arguments.use_cpu) == (path.stem == "cpu")
    assert (arguments.dynamo_backend.lower() == "inductor") == ("compile" in path.stem)


def test_there_is_a_file_for_each_kind_of_run():
    names = {"cpu", "one_gpu", "one_gpu_compile", "multi_gpu_ddp", "multi_gpu_fsdp2", "two_machines"}
    assert {path.stem for path in CONFIGS} == names


def test_what_the_fsdp2_file_says_is_what_a_student_can_be_sharded_by(monkeypatch):
    told = prepare_multi_gpu_env(parsed(EXAMPLES / "configs/multi_gpu_fsdp2.yaml"))
    for name, value in told.items():
        if name.startswith("FSDP_"):
            monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    engine._check_sharding(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)))
    assert plugin.fsdp_version == 2 and plugin.state_dict_type.name == "FULL_STATE_DICT"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"fsdp_version": 1}, "fsdp_version: expected 2, got 1"),
        ({"cpu_ram_efficient_loading": True}, "fsdp_cpu_ram_efficient_loading: expected false"),
        ({"activation_checkpointing": True}, "fsdp_activation_checkpointing: expected false"),
    ],
)
def test_what_a_student_cannot_be_sharded_by_is_refused(wrong, message):
    fields = {"fsdp_version": 2, "cpu_ram_efficient_loading": False, "activation_checkpointing": False}
    plugin = SimpleNamespace(**{**fields, **wrong})
    with pytest.raises(ValueError, match=message):
        engine._check_sharding(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)))


def test_the_launchers_precision_and_compiler_hold_where_the_run_says_nothing(monkeypatch):
    _, told = prepare_simple_launcher_cmd_env(parsed(EXAMPLES / "configs/one_gpu_compile.yaml", "--cpu"))
    for name, value in told.items():
        if name.startswith("ACCELERATE_"):
            monkeypatch.setenv(name, value)
    assert engine.precision(None) == "bf16" and engine.precision("no") == "no"
    compiled = []
    prepared = SimpleNamespace(compile=lambda **options: compiled.append(options))
    engine.compile_in_place(prepared, None)
    engine.compile_in_place(prepared, "eager")
    engine.compile_in_place(prepared, "no")
    assert [options["backend"] for options in compiled] == ["inductor", "eager"]
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # what the launcher says where nobody said anything
    monkeypatch.setattr(engine, "default_precision", lambda: "bf16")
    assert engine.precision(None) == "bf16"


# --- shards -------------------------------------------------------------------------------------------------------


def shard():
    """From here on, this process's `Accelerator`s shard, as the launcher's environment makes them on GPUs."""
    whole = Accelerator.__init__

    def sharding(accelerator, *inputs, **options):
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, state_dict_type="FULL_STATE_DICT", reshard_after_forward=True
        )
        whole(accelerator, *inputs, **options)
        for state in (AcceleratorState, PartialState):
            state._shared_state["distributed_type"] = DistributedType.FSDP
        AcceleratorState._shared_state["fsdp_plugin"] = plugin
        assert accelerator.is_fsdp2

    Accelerator.__init__ = sharding


SPLIT = {"gradient_accumulation_steps": 1, "statistics_images": 0}  # two processes of 4 images: what one does in two


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_student_in_shards_learns_what_a_whole_one_does_and_resumes(tmp_path, precision):
    data = random_targets(16)
    architecture = {"local_patch": True, "feature_mean": [0.1] * 16, "feature_std": [0.5] * 16}
    settings = {"mixed_precision": precision, "max_steps": 5, "validation_steps": 5}

    def cut(rank):
        shard()
        model = student(**architecture)

        dtypes = set()
        model.register_forward_pre_hook(
            lambda module, inputs: dtypes.add((inputs[1].dtype, module.decoder.feature_head.weight.dtype))
        )
        rows = data if rank == 0 else Fatal(data, 14, lambda: os.kill(os.getpid(), signal.SIGTERM))
        try:
            run(tmp_path / "two", data=rows, model=model, checkpoint_steps=0, **SPLIT, **settings)
        finally:
            # Places in bfloat16 would miss their patches.
            assert dtypes == {(torch.float32, torch.bfloat16 if precision == "bf16" else torch.float32)}
            model.reshard()  # what the last pass gathered
            share = sum(p.to_local().numel() for p in model.parameters()) / student(**architecture).num_parameters()
            assert 0.4 < share < 0.6

    def resume(rank):
        shard()
        model = student(seed=5, **architecture)
        run(tmp_path / "two", data=data, model=model, resume=True, **SPLIT, **settings)

    assert processes(2, cut) == [EXIT_STOPPED, EXIT_STOPPED]
    if precision == "bf16":
        return
    (name,) = Checkpoints(tmp_path / "two", keep=1).names()
    saved = {path.name for path in (tmp_path / "two/checkpoints" / name).iterdir()}
    assert {"pytorch_model_fsdp.bin", "optimizer.bin", "random_states_1.pkl"} <= saved
    with pytest.raises(ValueError, match="sharded True -> False"):
        run(tmp_path / "two", data=data, model=student(**architecture), resume=True, **SPLIT, **settings)
    assert processes(2, resume) == [0, 0]
    run(tmp_path / "one", data=data, model=student(**architecture), statistics_images=0, **settings)
    assert largest_difference(tmp_path / "one", tmp_path / "two") < 1e-6
    first, second = (json.loads((tmp_path / run / "metrics.json").read_text()) for run in ("one", "two"))
    for one_row, other_row in zip(first, second, strict=True):
        assert other_row == pytest.approx(one_row, abs=1e-6)


# --- compiled -----------------------------------------------------------------------------------------------------


def test_a_compiled_student_is_saved_plain_and_resumes_either_way(tmp_path):
    """Begun plain, gone on with compiled, ended plain: as one that never was compiled."""
    settings = {"statistics_images": 0, "max_steps": 4, "validation_steps": 4, "gradient_accumulation_steps": 1}
    settings |= {"batch_size": 6, "checkpoint_steps": 1}
    result = run(tmp_path / "plain", keep_checkpoints=3, **settings)
    names = result.student.state_dict().keys()
    frames = torch._dynamo.utils.counters["frames"]["ok"]
    for first, backend in ((1, "eager"), (3, None)):
        folder = tmp_path / str(backend)
        before = tmp_path / ("plain" if backend else "eager")
        shutil.copytree(before / f"checkpoints/step_{first:08d}", folder / f"checkpoints/step_{first:08d}")
        result = run(folder, model=student(seed=5), resume=True, torch_compile=backend, **settings)
        assert load_file(folder / "checkpoints/step_00000003/model.safetensors").keys() == names
        assert largest_difference(tmp_path / "plain", folder) < 1e-6
        assert result.student._compiled_call_impl is None and result.student.state_dict().keys() == names
    assert torch._dynamo.utils.counters["frames"]["ok"] > frames, "nothing was compiled"


# --- passes, teachers, trackers -------------------------------------------------------------------------------------


class Stream(IterableDataset):
    """The same rows, one after the other."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return (self.rows[index] for index in range(len(self.rows)))


def test_a_last_pass_with_fewer_images_counts_by_them(tmp_path, monkeypatch):
    """12 images: passes of 8 and 4 are one pass of 12, not the mean of a pass of 8 and one of 4."""
    # Adam is blind to the size of gradients.
    monkeypatch.setattr(loop, "make_optimizer", lambda student, lr, device: torch.optim.SGD(student.parameters(), lr))
    data = random_targets(12)
    settings = {"statistics_images": 0, "max_steps": 2, "report_to": "tensorboard", "logging_steps": 1}
    settings |= {"max_grad_norm": 0.0, "learning_rate": 0.3, "warmup_steps": 0}
    run(tmp_path / "one", data=Stream(data), batch_size=12, gradient_accumulation_steps=1, **settings)
    run(tmp_path / "two", data=Stream(data), batch_size=8, gradient_accumulation_steps=2, **settings)
    assert logged(tmp_path / "two")["loss"] == pytest.approx(logged(tmp_path / "one")["loss"], abs=1e-5)
    assert largest_difference(tmp_path / "one", tmp_path / "two") < 1e-6


def test_a_teacher_is_shown_as_many_images_at_a_time_as_it_is_told(tmp_path):
    from apm_hf import load_teacher

    teacher, shown = load_teacher(save_clip(tmp_path / "clip"), device="cpu"), []
    encode = teacher.encode_images
    teacher.encode_images = lambda **options: shown.append(len(options["pixel_values"])) or encode(**options)
    generator = torch.Generator().manual_seed(0)
    batch = {
        "pixel_values": torch.rand(7, 3, 24, 24, generator=generator),
        "teacher_pixel_values": torch.randn(7, 3, 32, 32, generator=generator),
    }
    processor = APMImageProcessorPil(size={"height": 24, "width": 24})
    parts = TargetMaker(teacher, processor, layers=[0, 1, 2], teacher_batch_size=3)(batch)
    assert shown == [3, 3, 1]
    whole = TargetMaker(teacher, processor, layers=[0, 1, 2])(batch)
    assert shown == [3, 3, 1, 7]
    for name in ("image_embeds", "features", "levels"):
        assert torch.allclose(getattr(parts, name), getattr(whole, name), atol=1e-6), name


def test_every_process_has_its_teacher_on_its_own_device(tmp_path, monkeypatch):
    class Enough(Exception):
        pass

    def load(name, *, device, dtype):
        raise Enough(str(device))

    monkeypatch.setattr(training, "load_teacher", load)
    monkeypatch.setattr(training, "process_state", lambda: SimpleNamespace(device=torch.device("cuda", 3)))
    config = DistillationConfig(output_dir=str(tmp_path))
    with pytest.raises(Enough, match="cuda:3"):
        train(TrainingConfig(teacher="teacher", dataset="images"), config, command="train")


def test_a_tracker_that_is_not_installed_is_named_with_its_package(monkeypatch):
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: ["tensorboard"])
    engine.check_tracker("tensorboard")
    for name in ("trackio", "wandb"):
        with pytest.raises(
            ImportError, match=f"report_to: the tracker '{name}' needs its package: pip install {name}"
        ):
            engine.check_tracker(name)
    with pytest.raises(ValueError, match="report_to: expected one of .*'trackio'.*, got 'nonsense'"):
        engine.check_tracker("nonsense")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"logging_steps": 0}, "logging_steps: expected a positive number, got 0"),
        ({"teacher_batch_size": 0}, "teacher_batch_size: expected a positive number or None, got 0"),
        ({"peak_tflops": float("nan")}, "peak_tflops: expected a positive number or None, got nan"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        DistillationConfig(output_dir="unused", **settings)
