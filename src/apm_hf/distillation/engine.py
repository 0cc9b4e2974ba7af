"""Configure Accelerate for a run, prepare the student with it, and get the trained student back as a plain model.

One process, several (DDP) or parameters in shards (FSDP2) are Accelerate's to choose, from its launcher or its
configuration file: see `docs/distributed.md` and `examples/configs`. What differs between them stands here.
"""

import copy
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from ..configuration_apm import APMConfig
from ..modeling_apm import APMModel
from ..runs.devices import default_precision
from ..runs.processes import on_cpu
from .settings import DistillationConfig

logger = logging.get_logger(__name__)

# Where one kernel updates all weights, instead of a loop over them.
FUSED = ("cpu", "cuda")


def make_accelerator(config: DistillationConfig, student: APMConfig, *, heads: Iterable[str] = ()) -> Any:
    """Make an `Accelerator` for the processes that were launched.

    Args:
        heads: names of the additional teachers' heads that are trained.

    Raises:
        ImportError: where Accelerate, or the tracker in `report_to`, is not installed.
        ValueError: for an unknown tracker, and for kinds of sharding that a student is not made for.
    """
    # Accelerate is an extra: models load and run without it.
    try:
        from accelerate import Accelerator, DistributedDataParallelKwargs
        from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration
    except ImportError as error:
        raise ImportError('distillation needs the package `accelerate`: pip install "apm_hf[train]"') from error
    check_tracker(config.report_to)
    # A loss of weight 0 leaves its head without gradient, which DDP must be told.
    poolings = {student.pooling, *(student.teacher_head(name)["pooling"] for name in student.teacher_heads or ())}
    unused = bool(student.use_rgb_head and not config.rgb_weight)
    unused = unused or ("attention" in poolings and not config.cls_weight)
    unused = unused or bool(student.num_levels and not config.level_weight)
    unused = unused or set(student.teacher_heads or ()) != set(heads)
    accelerator = Accelerator(
        cpu=on_cpu(),
        # Passes are counted through the ends of epochs, so that a step is always as many images.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=config.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        mixed_precision=precision(config.mixed_precision),
        # Accelerate would put a wrapper around the student; `compile_in_place` does what it was told.
        dynamo_backend="no",
        log_with=None if config.report_to == "none" else config.report_to,
        project_config=ProjectConfiguration(config.output_dir, logging_dir=str(Path(config.output_dir, "logs"))),
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=unused)],
    )
    if sharded(accelerator):
        _check_sharding(accelerator)
    return accelerator


def precision(wanted: str | None) -> str:
    """Return the run's precision, else the launcher's unless it is the default `no`, else the device's."""
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    return wanted or (launched if launched != "no" else default_precision())


def check_tracker(name: str) -> None:
    """Refuse a tracker that is not installed, which Accelerate would leave out silently.

    Raises:
        ImportError: for one that is not installed; says which package is missing.
        ValueError: for one that Accelerate does not know.
    """
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import LoggerType

    if name in ("none", "all"):
        return
    known = [str(tracker) for tracker in LoggerType.list() if tracker != "all"]
    if name not in known:
        raise ValueError(f"report_to: expected one of {['none', 'all', *known]}, got {name!r}")
    if name not in {str(tracker) for tracker in get_available_trackers()}:
        raise ImportError(f"report_to: the tracker {name!r} needs its package: pip install {name}")


def make_optimizer(student: APMModel, learning_rate: float, device: torch.device) -> torch.optim.Adam:
    """Make Adam for the student's parameters, in one kernel where the device has it; FSDP2 shards them later."""
    return torch.optim.Adam(student.parameters(), lr=learning_rate, fused=device.type in FUSED or None)


def sharded(accelerator: Any) -> bool:
    """Return whether each process holds a part of every weight."""
    return str(accelerator.distributed_type).endswith("FSDP")


def prepare(accelerator: Any, student: APMModel, *others: Any) -> tuple[Any, ...]:
    """Call `accelerator.prepare(student, *others)`; under FSDP2 the student becomes one unit.

    It is gathered as a whole for a pass, in the dtype of `mixed_precision`, and its gradients are reduced in float32.
    Inputs stay unchanged: coordinates in bfloat16 would miss their patches.
    """
    if sharded(accelerator):
        from torch.distributed.fsdp import MixedPrecisionPolicy

        plugin = accelerator.state.fsdp_plugin
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
        reduced = None if dtype is None else torch.float32
        plugin.mixed_precision_policy = MixedPrecisionPolicy(dtype, reduced, cast_forward_inputs=False)
        plugin.auto_wrap_policy = None
        # FSDP2 warns of writing into views that a module returns, such as the trigger column; nothing here does.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        # Accelerate would shard the input embeddings as a unit of their own.
        student.get_input_embeddings = lambda: None  # type: ignore[method-assign, assignment, return-value]
    return accelerator.prepare(student, *others)


def compile_in_place(prepared: Any, backend: str | None) -> None:
    """Compile what `prepare` returned, without a wrapper: names of weights stay, checkpoints fit either way.

    Args:
        backend: of `torch.compile`; None asks Accelerate's own settings (`dynamo_backend`), `"no"` is no.
    """
    from accelerate.utils import TorchDynamoPlugin

    launched = TorchDynamoPlugin()  # from the environment that Accelerate's launcher makes
    options, name = launched.to_kwargs(), backend or launched.backend.value.lower()
    options.pop("backend", None)
    if name != "no":
        logger.info(f"the student is compiled with {name}")
        prepared.compile(backend=name, **options)


def whole_student(accelerator: Any, prepared: Any, config: APMConfig) -> APMModel:
    """Return the trained student as a plain model on the CPU, in every process; shards are gathered into a new one.

    Args:
        config: the student's.
    """
    if sharded(accelerator):
        return gathered(prepared, config)
    student = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False).cpu()
    # Accelerate peels its autocast off the method, and transformers' decorators with it: back to the class's own.
    student.__dict__.pop("forward", None)
    student._compiled_call_impl = None
    return student


def gathered(student: Any, config: APMConfig) -> APMModel:
    """Return a plain student with the weights of a sharded one; called by all processes."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    state: dict[str, Any] = get_model_state_dict(student, options=StateDictOptions(full_state_dict=True))
    with torch.random.fork_rng(devices=[]):
        whole = APMModel(copy.deepcopy(config))
    whole.load_state_dict({name: values.cpu() for name, values in state.items()})
    return whole


def _check_sharding(accelerator: Any) -> None:
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ValueError(f"fsdp_version: expected 2, got {plugin.fsdp_version}; see examples/configs")
    if plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "fsdp_cpu_ram_efficient_loading: expected false, got true: transformers would load the teacher in the "
            "first process alone, and leave it random in the others"
        )
    if plugin.activation_checkpointing:
        raise ValueError("fsdp_activation_checkpointing: expected false, got true")
