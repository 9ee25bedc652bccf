"""Runs an example with one more tracker: `python file_tracker.py FOLDER EXAMPLE ARGUMENT... --log-with file`.

The tracker would log from every process, to a file of its own in FOLDER: the example has to keep the others from it.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.tracking import GeneralTracker, register_tracker_class

FOLDER, EXAMPLE, *ARGUMENTS = sys.argv[1:]


class FileTracker(GeneralTracker):
    name = "file"
    requires_logging_directory = False
    main_process_only = False

    def __init__(self, project: str) -> None:
        self.tracker = Path(FOLDER) / f"{project}-{PartialState().process_index}.jsonl"
        super().__init__()

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        with self.tracker.open("a") as file:
            print(json.dumps({"step": step, **values}), file=file)


register_tracker_class(FileTracker)
sys.path.insert(0, str(Path(EXAMPLE).parent))
sys.argv = [EXAMPLE, *ARGUMENTS]
runpy.run_path(EXAMPLE, run_name="__main__")
