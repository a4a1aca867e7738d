"""A worker: one process with one pipeline, which answers jobs line by line until its input ends.

It is started as a program of its own (`python -m quantdm.runs.engines.worker RUN_DIR DEVICE BATCH_SIZE`), so it never
imports the script that called the search. Jobs come as lines of JSON on standard input, answers leave as lines of JSON
on standard output; whatever libraries print goes to standard error.
"""

import json
import os
import queue
import signal
import sys
import threading
from functools import cache

import torch

from quantdm.processes import answering
from quantdm.runs.engines.answer import respond
from quantdm.runs.evaluator import Evaluator
from quantdm.runs.run import Run


def main(run_dir: str, device: str, batch_size: str) -> None:
    """Open the run's pipeline on a device and answer jobs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    torch.set_num_threads(1)
    answer = answering()
    jobs: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(jobs,), daemon=True).start()

    @cache
    def evaluator() -> Evaluator:
        run = Run.open(run_dir)
        most = "auto" if batch_size == "auto" else int(batch_size)
        return Evaluator(run, run.open_subject(device=device), batch_size=most)

    while True:
        job = json.loads(jobs.get())
        answer(respond(evaluator, job["method"], job["argument"]))


def _listen(jobs: "queue.SimpleQueue[str]") -> None:
    """Pass jobs on; end this process when its parent closes the pipe or was killed, whatever it is doing."""
    for line in sys.stdin:
        jobs.put(line)
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
