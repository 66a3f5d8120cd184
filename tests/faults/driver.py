"""Runs main.py or main_eval.py with faults injected from outside; the programs themselves know nothing of it.

    python tests/faults/driver.py REQUEST_JSON     one run, as torchrun starts it
    python tests/faults/driver.py --serve          fork a run for each request on stdin

A request is ``{"program": "main", "argv": [...], "faults": [[name, {arguments}], ...]}``. Serving saves the seconds
that importing torch takes: each run is a fork of a process that has imported everything and done nothing else.
"""

import importlib
import json
import os
import runpy
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


def execute(request: dict) -> None:
    """Inject the request's faults and run its program as ``python PROGRAM.py ARGV`` would."""
    program = request["program"]
    sys.argv = [f"{program}.py", *request["argv"]]
    if program.startswith("tools/"):
        runpy.run_path(str(ROOT / f"{program}.py"), run_name="__main__")
        return
    from tests.faults import injections
    from utils.training import records

    records.plot_curves = lambda *_: None  # drawing takes longer than the training here
    for name, arguments in request["faults"]:
        getattr(injections, name)(**arguments)
    importlib.import_module(program).main()


def serve() -> dict:
    """Answer requests until stdin ends; in a forked child return its request instead.

    ``{"start": REQUEST}`` is answered with the child's process id, ``{"poll": pid}`` with its return code (negative
    for a signal) or null while it runs.
    """
    import main  # noqa: F401
    from tests.faults import injections  # noqa: F401

    for line in sys.stdin:
        message = json.loads(line)
        if "start" in message:
            pid = os.fork()
            if pid == 0:
                become(message["start"])
                return message["start"]
            answer = pid
        else:
            pid, status = os.waitpid(message["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        print(json.dumps(answer), flush=True)
    sys.exit()


def become(request: dict) -> None:
    """Turn a forked child into a process of its own session with the request's environment and output file."""
    os.setsid()
    os.environ.update(request["env"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 (the standard stream of this process)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


if __name__ == "__main__":
    execute(serve() if sys.argv[1] == "--serve" else json.loads(sys.argv[1]))
