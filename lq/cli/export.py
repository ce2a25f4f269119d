"""``lq export`` and ``lq inspect``: a network as an artifact, as C or as ONNX, and what a file holds."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING
from torch import nn

from lq.cli.arguments import parse, usage
from lq.cli.fields import doc
from lq.deployed import load_network
from lq.exporting import (
    ArtifactError,
    IntegerNetwork,
    UnsupportedError,
    check_accumulators,
    integer_cost,
    repair_accumulators,
    save,
)
from lq.exporting.inspect import describe

__all__ = ["ExportConfig", "export", "inspect"]

TARGETS = ("artifact", "c", "onnx")
OVERFLOWS = ("refuse", "repair")


@dataclass
class ExportConfig:
    """Fields of ``lq export``."""

    checkpoint: str = doc("what to export: a checkpoint of lq train or lq search, or an artifact.", MISSING)
    out: str = doc("file to write, such as net.lq.safetensors, net.c or net.onnx.", MISSING)
    target: str = doc('"artifact", "c" or "onnx".', "artifact")
    shape: list[int] = doc("of one input, [3,32,32]; the file may say it.", [])
    allow: list[str] = doc("import paths that an artifact may call.", [])
    accumulator_bits: int = doc("width of integer accumulators that must never overflow (c).", 32)
    overflow: str = doc('where they could: "refuse", or "repair" by larger scales.', "refuse")
    shift_only: bool = doc("requantize by shifts alone, which rounds factors to powers of two (c).", False)
    integers: bool | None = doc(
        "whether runtimes may compute in integers and round biases; null: at 8 bits (onnx).", None
    )
    fold_points: bool = doc("write weights of points as constants instead of codes and a table (onnx).", False)


def export(arguments: Sequence[str]) -> None:
    """Run ``lq export``.

    Args:
        arguments: of the command line, such as ``["checkpoint=net.ckpt", "out=net.c", "target=c"]``.
    """
    if not arguments or {"-h", "--help"} & set(arguments):
        print(usage("lq export", ExportConfig))
        return
    config = parse(ExportConfig, arguments)
    for name, allowed in (("target", TARGETS), ("overflow", OVERFLOWS)):
        if getattr(config, name) not in allowed:
            raise ValueError(f"{name} must be one of {allowed}, got {getattr(config, name)!r}: choose one of those")
    if not Path(config.checkpoint).is_file():
        raise FileNotFoundError(f"checkpoint must be a file, got {config.checkpoint!r} which does not exist")
    network, header = load_network(Path(config.checkpoint), config.allow)
    shape = tuple(config.shape) or tuple(header["input"].get("shape", ()))
    if config.target == "artifact":
        given = {**header["input"], **({"shape": list(shape)} if shape else {})}
        written = {name: header[name] for name in ("architecture", "metrics")}
        save(network, config.out, input=given, provenance={"source": Path(config.checkpoint).name}, **written)
        print(describe(config.out))
        return
    if not shape:
        raise ValueError(f"shape must be given for {config.checkpoint!r}, which does not say it: shape=[3,32,32]")
    if config.target == "onnx":
        from lq.exporting.onnx import write_onnx

        write_onnx(network, config.out, shape, fold_points=config.fold_points, integers=config.integers)
        print(f"{config.out}: {Path(config.out).stat().st_size:,} bytes")
        return
    _export_c(network, shape, config)


def _export_c(network: nn.Module, shape: tuple[int, ...], config: Any) -> None:
    from lq.exporting.c import write_c

    if config.accumulator_bits < 32 and config.overflow == "repair":
        for path, factor in repair_accumulators(network, shape, config.accumulator_bits).items():
            print(f"{path}: scales raised up to {factor:.2f}-fold, so that {config.accumulator_bits} bits suffice")
    integers = IntegerNetwork(network, shape, shift_only=config.shift_only)
    check_accumulators(integers, config.accumulator_bits)
    source = write_c(integers, config.out)
    print(integer_cost(integers))
    print(f"\n{config.out}: flash {source.flash_bytes:,} bytes of constants, ram {source.ram_bytes:,} bytes")
    print(f"compile and run:  gcc -O2 {config.out} -o net && ./net images.bin")


def inspect(arguments: Sequence[str]) -> None:
    """Run ``lq inspect``.

    Args:
        arguments: paths of artifacts.
    """
    if not arguments or {"-h", "--help"} & set(arguments):
        print("usage: lq inspect FILE ...\n\nPrint what an artifact holds, layer by layer; nothing of it is run.")
        return
    for path in arguments:
        print(describe(path))


def run(command: str, arguments: Sequence[str]) -> None:
    """Run a command and turn its complaints into one line.

    Args:
        command: "export" or "inspect".
        arguments: of the command line.
    """
    try:
        {"export": export, "inspect": inspect}[command](arguments)
    except (ArtifactError, UnsupportedError, ValueError, OSError, ImportError) as error:
        sys.exit(f"lq {command}: {error}")
