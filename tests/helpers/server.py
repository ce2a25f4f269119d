"""Commands of ``lq``, each in a fork of one process that has imported everything: the imports take several seconds."""

import json
import os
import runpy
import sys

import mlflow.store.tracking.sqlalchemy_store  # noqa: F401

import lq.cli.compare  # noqa: F401
import lq.cli.search  # noqa: F401
import lq.cli.train  # noqa: F401
import lq.tracking.figures  # noqa: F401


def become(command: dict) -> None:
    """Make this process the one in which a user types the command."""
    os.chdir(command["cwd"])
    os.environ.clear()
    os.environ.update(command["environment"])
    sys.argv[1:], sys.path[0] = command["arguments"], command["cwd"]
    for number, path in enumerate((os.devnull, command["stdout"], command["stderr"])):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
    sys.stdin = open(0)


def serve() -> None:
    """A command per line; the answer is its exit status. Ends with its input."""
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            become(json.loads(line))
            runpy.run_module("lq", run_name="__main__", alter_sys=True)
            return
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
