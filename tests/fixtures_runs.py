"""Short runs of distillation on random targets, in this process or in children forked from it.

Children know all that was imported, so several processes cost no more than one; they are killed by real signals.
"""

import os
import random
import signal
import socket
import traceback
import warnings

import torch
from accelerate.state import AcceleratorState, GradientState
from torch.utils.data import Dataset
from transformers.utils.logging import disable_progress_bar

from apm_hf.distillation import DistillationConfig, distill
from apm_hf.image_processing_pil_apm import APMImageProcessorPil
from apm_hf.runs.stopping import RunStopped
from apm_hf.teachers.targets import TargetCache
from fixtures_tiny import FEATURE_SIZE, STUDENT_SIZE, TEACHER_GRID, student

# 20 images are five passes an epoch: steps of two passes, and checkpoints, cross the ends of epochs.
SETTINGS = {
    "max_steps": 7,
    "checkpoint_steps": 2,
    "batch_size": 4,
    "gradient_accumulation_steps": 2,
    "num_locations": 3,
    "learning_rate": 1e-2,
    "warmup_steps": 3,
    "validation_steps": 3,
    "num_pictures": 0,
    "statistics_images": 8,
    "report_to": "none",
    "mixed_precision": "no",
}


def forget_accelerate():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def random_targets(num_images, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((3, STUDENT_SIZE, STUDENT_SIZE), (FEATURE_SIZE,), (TEACHER_GRID, TEACHER_GRID, FEATURE_SIZE))
    return TargetCache(*(torch.randn(num_images, *shape, generator=generator) for shape in shapes))


def run(folder, *, data=None, model=None, processor=None, **settings):
    forget_accelerate()
    return distill(
        model or student(),
        random_targets(20) if data is None else data,
        config=DistillationConfig(output_dir=str(folder), **(SETTINGS | settings)),
        image_processor=APMImageProcessorPil(
            size={"height": STUDENT_SIZE, "width": STUDENT_SIZE}, **(processor or {})
        ),
        validation_data=random_targets(6, seed=7),
    )


def damaged_places(files, number=200):
    """Yield so many of these files, each while another random bit of it is flipped."""
    places = random.Random(0)
    for _ in range(number):
        path = places.choice(files)
        whole = path.read_bytes()
        damaged = bytearray(whole)
        damaged[places.randrange(len(whole))] ^= 1 << places.randrange(8)
        path.write_bytes(damaged)
        yield path
        path.write_bytes(whole)


class Fatal(Dataset):
    """Reading the row after the first `num_rows` kills the process, by this signal; a callable is called instead."""

    def __init__(self, data, num_rows, action=lambda: os.kill(os.getpid(), signal.SIGKILL)):
        self.data, self.left, self.action = data, num_rows, action

    def __len__(self):
        return len(self.data)

    def digest(self):
        return self.data.digest()

    def __getitem__(self, index):
        if self.left == 0:
            self.action()
        self.left -= 1
        return self.data[index]


def forked(work):
    """The status of a child that does `work`; of one that was killed, the signal's number, negative."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: of threads, which do nothing here
        child = os.fork()
    if not child:
        status = 1
        try:
            # Threads that load weights race for PyTorch's thread pool, which does not outlive a fork.
            os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
            disable_progress_bar()  # its lock is shared with this process, which a child killed in it would lock out
            work()
            status = 0
        except RunStopped as stopped:
            status = stopped.code
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return child


def status_of(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def processes(number, work):
    """Statuses of so many forked children that know of each other, as `torchrun` starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    known = {"WORLD_SIZE": number, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_WORLD_SIZE": number}

    def of_rank(rank):
        os.environ.update({name: str(value) for name, value in {**known, "RANK": rank, "LOCAL_RANK": rank}.items()})
        work(rank)

    return [status_of(child) for child in [forked(lambda rank=rank: of_rank(rank)) for rank in range(number)]]
