"""``lq train --help``: groups and fields with one line each, read from the schemas."""

import dataclasses
import textwrap
from typing import Any

from omegaconf import MISSING

from lq._paths import home
from lq.cli.config import GROUPS, TrainConfig

__all__ = ["train_help"]

_WIDTH = 118
_HEAD = """\
lq train: train a quantized network, float stage first if asked, tracked in MLflow.

Usage:
  lq train [recipes=NAME] [GROUP=OPTION] [FIELD=VALUE] ...      one run
  lq train -m quantizer=soft,lsq quantizer.bits=2,3,4           a sweep: one parent run, a nested run per job
  lq train --cfg job [...]                                      print the composed configuration and stop
  lq train --hydra-help                                         Hydra's own flags
"""


def train_help() -> str:
    """The whole text.

    Returns:
        Lines for a terminal.
    """
    lines = [_HEAD, "Groups (GROUP=OPTION):", _entry("recipes", ", ".join(_options(home() / "recipes")))]
    lines += [_entry(group, ", ".join(_options(home() / "conf" / group))) for group in _groups()]
    lines += ["", "Fields of the top level:", *_fields(TrainConfig, "")]
    for group, schemas in GROUPS.items():
        for name, node in schemas.items():
            option = name.removeprefix("schema").strip("_")
            lines += ["", f"Fields of {group}{'=' + option if option else ''}:", *_fields(node, f"{group}.")]
    return "\n".join(lines)


def _groups() -> list[str]:
    return sorted(p.name for p in (home() / "conf").iterdir() if p.is_dir())


def _options(folder: Any) -> list[str]:
    return sorted(p.stem for p in folder.glob("*.yaml"))


def _fields(node: type[Any], prefix: str) -> list[str]:
    lines = []
    for f in dataclasses.fields(node):
        if f.name == "_target_" or "help" not in f.metadata:
            continue
        default = f.default if f.default is not dataclasses.MISSING else f.default_factory()  # type: ignore[misc]
        shown = "required" if default == MISSING else f"default {_plain(default)}"
        sentence = f.metadata["help"].split(". ")[0].rstrip(".")
        lines.append(_entry(prefix + f.name, f"{sentence} [{shown}]" if sentence else f"[{shown}]"))
    return lines


def _plain(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _entry(name: str, text: str) -> str:
    head = f"  {name:<36} "
    return textwrap.fill(text, _WIDTH, initial_indent=head, subsequent_indent=" " * len(head))
