"""``--help`` of the commands that Hydra runs: groups and fields with one line each, read from the schemas."""

import dataclasses
from typing import Any

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from lq._paths import home
from lq.cli.config import GROUPS, TrainConfig
from lq.cli.evaluate import EVALUATE_GROUPS, EvaluateConfig
from lq.cli.fields import entry, field_lines, shown
from lq.cli.schema import argument_docs
from lq.cli.search_config import SEARCH_GROUPS, SearchConfig

__all__ = ["help_text"]

_TRAIN = """\
lq train: train a quantized network, float stage first if asked, tracked in MLflow.

Usage:
  lq train [recipes=NAME] [GROUP=OPTION] [FIELD=VALUE] ...      one run
  lq train -m quantizer=soft,lsq quantizer.bits=2,3,4           a sweep: one parent run, a nested run per job
  lq train --cfg job [...]                                      print the composed configuration and stop
  lq train --hydra-help                                         Hydra's own flags
"""


_SEARCH = """\
lq search: quantize a trained network without training it, tracked in MLflow.

Usage:
  lq search [recipes=NAME] [GROUP=OPTION] [FIELD=VALUE] ...     one run; without arguments: handwritten digits
  lq search -m search.bits=2,3,4 search.importance=null,inputs  a sweep: one parent run, a nested run per job
  lq search --cfg job [...]                                     print the composed configuration and stop
  lq search --hydra-help                                        Hydra's own flags
"""


_EVALUATE = """\
lq evaluate: run networks in all their forms on the same test images: accuracy, agreement, bytes, images per second.

Usage:
  lq evaluate files=[FILE,...] [data=NAME] [FIELD=VALUE] ...    tracked in MLflow; without data: handwritten digits
  lq evaluate files=[net.lq.safetensors,integer:net.lq.safetensors,net.onnx,net.c] data=cifar10
  lq evaluate model=cifar_resnet20 model.checkpoint=float.safetensors files=[...]    the float network beside them
  lq evaluate --hydra-help                                      Hydra's own flags
"""


def help_text(command: str) -> str:
    """The whole text.

    Args:
        command: "train", "search" or "evaluate".

    Returns:
        Lines for a terminal.
    """
    head, top, groups = {
        "train": (_TRAIN, TrainConfig, GROUPS),
        "search": (_SEARCH, SearchConfig, SEARCH_GROUPS),
        "evaluate": (_EVALUATE, EvaluateConfig, EVALUATE_GROUPS),
    }[command]
    names = [g for g in _groups() if g in {f.name for f in dataclasses.fields(top)}]
    lines = [head, "Groups (GROUP=OPTION):"]
    if command != "evaluate":
        recipes = [r for r in _options(home() / "recipes") if r.startswith("search_") == (command == "search")]
        lines.append(entry("recipes", ", ".join(recipes)))
    lines += [entry(group, ", ".join(_options(home() / "conf" / group))) for group in names]
    lines += ["", "Fields of the top level:", *field_lines(top, "")]
    for group, schemas in groups.items():
        for name, node in schemas.items():
            option = name.removeprefix("schema").strip("_")
            lines += ["", f"Fields of {group}{'=' + option if option else ''}:", *field_lines(node, f"{group}.")]
    for option in _options(home() / "conf" / "callbacks") if "callbacks" in names else ():
        lines += ["", f"Fields of callbacks={option}:"]
        for name, node in OmegaConf.load(home() / "conf" / "callbacks" / f"{option}.yaml").items():
            lines += [] if name == "defaults" else _instance_lines(node, f"callbacks.{name}.")
    return "\n".join(lines)


def _instance_lines(node: DictConfig, prefix: str) -> list[str]:
    """A line for each argument that a group gives to what it instantiates."""
    docs = argument_docs(get_object(node._target_)) if "_target_" in node else {}
    lines = []
    for name, value in OmegaConf.to_container(node).items():  # type: ignore[union-attr]
        if isinstance(value, dict) and "_target_" in value:
            lines += _instance_lines(node[name], f"{prefix}{name}.")
        elif name != "_target_":
            lines.append(entry(f"{prefix}{name}", shown(docs.get(str(name), ""), value)))
    return lines


def _groups() -> list[str]:
    return sorted(p.name for p in (home() / "conf").iterdir() if p.is_dir())


def _options(folder: Any) -> list[str]:
    return sorted(p.stem for p in folder.glob("*.yaml"))
