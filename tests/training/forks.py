"""
Runs train.py in forked processes, which saves importing torch and transformers for each: a line of JSON (arguments and
log file) on stdin, the process id on stdout, and its exit status when it ended.
"""

import json
import os
import runpy
import sys
from pathlib import Path

import transformers.trainer  # noqa: F401

import mmgem.evaluation.evaluator
import mmgem.training.trainer  # noqa: F401


def main() -> None:
    train = str(Path(__file__).parents[2] / "train.py")
    for line in sys.stdin:
        arguments, log = json.loads(line)
        process = os.fork()
        if process == 0:
            os.setsid()  # to be killed with its loader's workers
            output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.argv = [train, *arguments]
            runpy.run_path(train, run_name="__main__")
            return
        print(process, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
