"""Mutate artifacts for as long as you like: a loader may only load them or raise lq.ArtifactError.

    pip install -e '.[fuzz]'
    python benchmarks/fuzz_artifact.py -runs=20000 -max_len=256 -len_control=0 -rss_limit_mb=8192 -timeout=20

Half of the inputs are golden files with changed bytes. The others are what an attacker would send: header and tensors
changed at will, checksums made anew, so that everything behind the checksums is reached, too.
"""

import json
import os
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file

import lq

atheris: Any = import_module("atheris")  # untyped, and only for those who fuzz
with atheris.instrument_imports(include=["lq.exporting", "lq.surgery.rebuild", "lq.functional.packing"]):
    import lq.exporting.architecture
    import lq.exporting.artifact
    import lq.exporting.files

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # of the function that builds the golden networks
GOLDEN = sorted((ROOT / "tests" / "exporting" / "golden").glob("*.safetensors"))
WORDS = ["bits", "tied", "name", "resnet18", "conv1", "float16", "subset", "lsq", "channel", "..", "pretrained", ""]
target = Path(tempfile.mkdtemp()) / "fuzzed.lq.safetensors"


def any_value(given: Any, depth: int = 0) -> Any:
    """A JSON value."""
    kind = given.ConsumeIntInRange(0, 7 if depth < 3 else 5)
    if kind == 0:
        return given.ConsumeIntInRange(-9, 9)
    if kind == 1:
        return given.ConsumeInt(8)
    if kind == 2:
        return given.ConsumeRegularFloat()
    if kind == 3:
        return given.PickValueInList(WORDS)
    if kind == 4:
        return given.PickValueInList([None, True, False, [], {}, 10**400])
    if kind == 5:
        return given.ConsumeUnicodeNoSurrogates(8)
    inner = [any_value(given, depth + 1) for _ in range(given.ConsumeIntInRange(0, 3))]
    return inner if kind == 6 else dict.fromkeys((given.PickValueInList(WORDS) for _ in inner), inner)


def change(given: Any, value: Any) -> Any:
    """The value with one part of it replaced, removed or added."""
    if isinstance(value, dict | list) and value and given.ConsumeIntInRange(0, 9):
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = given.PickValueInList(keys)
        if given.ConsumeIntInRange(0, 9) == 0:
            del value[key]
        else:
            value[key] = change(given, value[key])
        return value
    return any_value(given)


def attack(given: Any, golden: Path) -> None:
    """Header and tensors changed, checksums right."""
    with safe_open(golden, "pt") as file:
        header = json.loads(file.metadata()["lq"].partition(" ")[2])
    header.pop("sha256")
    header.pop("format_version")
    tensors = load_file(golden)
    for _ in range(given.ConsumeIntInRange(0, 3)):
        header = change(given, header)
    if given.ConsumeBool() and tensors:
        name = given.PickValueInList(sorted(tensors))
        tensor = tensors.pop(name)
        kind = given.ConsumeIntInRange(0, 3)
        changed = [tensor.reshape(-1)[: given.ConsumeIntInRange(0, 9)], tensor.double(), tensor.int(), tensor[None]]
        tensors[given.PickValueInList([name, "", "a.b.c"])] = changed[kind].clone()
    lq.exporting.files.write_artifact(target, tensors, header if isinstance(header, dict) else {"layers": header})


def one(data: bytes) -> None:
    """One mutation."""
    given = atheris.FuzzedDataProvider(data)
    golden = given.PickValueInList(GOLDEN)
    if given.ConsumeBool():
        content = bytearray(golden.read_bytes())
        for _ in range(given.ConsumeIntInRange(1, 4)):
            at, new = given.ConsumeIntInRange(0, len(content) - 1), given.ConsumeBytes(given.ConsumeIntInRange(0, 8))
            content[at : at + given.ConsumeIntInRange(0, 8)] = new
        target.write_bytes(content)
    else:
        try:
            attack(given, golden)
        except (ValueError, OverflowError):  # what no JSON writer writes
            return
    try:
        lq.load(target, allow=["tests.helpers.modules:golden_network"])
    except lq.ArtifactError:
        pass


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
