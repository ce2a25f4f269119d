"""The command ``lq``: each subcommand composes, instantiates and runs; no logic of its own."""

import os
import sys
from importlib import import_module

__all__ = ["main"]

_USAGE = """\
usage: lq {train,search,export,evaluate,inspect,compare,quantizers} ...

  train       train a quantized network, or a sweep of them       lq train --help
  search      quantize a trained network without training it      lq search --help
  export      write a network as a packed file, as C or as ONNX   lq export --help
  evaluate    run networks in all their forms side by side        lq evaluate --help
  inspect     print what a packed file holds                      lq inspect --help
  compare     print the runs of a sweep side by side              lq compare --help
  quantizers  list the methods to quantize with
"""


def main() -> None:
    """Run the subcommand named by the first argument."""
    command, rest = (sys.argv[1] if len(sys.argv) > 1 else "--help"), sys.argv[2:]
    if command == "compare":
        from lq.cli.compare import main as compare

        compare(rest)
    elif command == "quantizers":
        from lq.cli.quantizers import main as quantizers

        quantizers(rest)
    elif command in ("export", "inspect"):
        from lq.cli.export import run

        run(command, rest)
    elif command in ("train", "search", "evaluate"):
        _hydra(command, rest)
    elif command in ("-h", "--help"):
        print(_USAGE, end="")
    else:
        sys.exit(
            "lq: command must be train, search, export, evaluate, inspect, compare or quantizers, got "
            f"{command!r}\n\n{_USAGE}"
        )


def _hydra(command: str, rest: list[str]) -> None:
    from lq._paths import home

    if {"-h", "--help"} & set(rest):
        from lq.cli.help import help_text

        print(help_text(command))
        return
    os.environ["LQ_HOME"] = str(home())  # where the configuration looks for recipes
    module = import_module(f"lq.cli.{command}")
    # under Hydra, Lightning starts the processes of further devices from this path and these arguments
    sys.argv = [str(module.__file__), *rest]
    sys.modules["__main__"].__spec__ = None  # and not, under python -m lq, from that name without the command
    module.main()
