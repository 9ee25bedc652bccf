"""Runs that are killed and resumed: `python -m tests.training.killed FOLDER`.

Each run has a process of its own, forked from one that has only imported the libraries, to import them once. The
first of each kind is killed by SIGKILL right after its checkpoint was written; the second, which chooses its child
anew, by data of which that of the checkpoint knows nothing, resumes and saves what it ends with.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from peft_childtune import ChildTuningCallback
from tests.training.runs import CHECKPOINT, KINDS, batches, state_of, trainer_for, wrapped


class Kill(TrainerCallback):
    """Kills the process once the checkpoint is written."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert state.global_step == CHECKPOINT
        os.kill(os.getpid(), signal.SIGKILL)


def start(kind: str, folder: Path) -> None:
    """Train until killed."""
    trainer_for(wrapped(kind), folder, callbacks=[ChildTuningCallback(batches()), Kill()]).train()


def resume(kind: str, folder: Path) -> None:
    """Train on from the last checkpoint in the folder, and save the end."""
    trainer = trainer_for(wrapped(kind), folder, callbacks=[ChildTuningCallback(batches(seed=1))])
    trainer.train(resume_from_checkpoint=True)
    torch.save(state_of(trainer), folder / "end.pt")


def in_new_process(run: Any, *args: Any) -> int:
    """Return how a process ends that does nothing else: 0, an exit status, or minus the number of a signal."""
    if (process := os.fork()) == 0:
        try:
            run(*args)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in KINDS:
        place = Path(sys.argv[1]) / name
        print(name, in_new_process(start, name, place), in_new_process(resume, name, place), flush=True)
