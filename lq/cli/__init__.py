"""The command ``lq``: each subcommand composes, instantiates and runs; no logic of its own."""

import os
import sys

__all__ = ["main"]

_USAGE = """\
usage: lq {train,compare} ...

  train     train a quantized network, or a sweep of them       lq train --help
  compare   print the runs of a sweep side by side              lq compare --help
"""


def main() -> None:
    """Run the subcommand named by the first argument."""
    command, rest = (sys.argv[1] if len(sys.argv) > 1 else "--help"), sys.argv[2:]
    if command == "compare":
        from lq.cli.compare import main as compare

        compare(rest)
    elif command == "train":
        _train(rest)
    elif command in ("-h", "--help"):
        print(_USAGE, end="")
    else:
        sys.exit(f"lq: command must be train or compare, got {command!r}\n\n{_USAGE}")


def _train(rest: list[str]) -> None:
    from lq._paths import home

    if {"-h", "--help"} & set(rest):
        from lq.cli.help import train_help

        print(train_help())
        return
    os.environ["LQ_HOME"] = str(home())  # where conf/config.yaml looks for recipes
    from lq.cli import train

    # under Hydra, Lightning starts the processes of further devices from this path and these arguments
    sys.argv = [train.__file__, *rest]
    train.main()
