"""The rows of the accuracy benchmark's files: read whole, appended one at a time, told apart by their key."""

import csv
import sys
from pathlib import Path

from filelock import FileLock

KEY = "network bits method extras epochs lr seed".split()
FIELDS = [*KEY, "held_out", "test", "float", "seconds"]


def rows_of(path: Path) -> list[dict[str, str]]:
    """All rows of a file; none where it is not there yet.

    Raises:
        SystemExit: where the file ends in the midst of a row or has another header, before anything is lost to it.
    """
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        text = file.read()
    head = ",".join(FIELDS)
    if text.split("\n", 1)[0].strip("\r") != head:
        sys.exit(f"{path} must begin with the line {head!r}: restore it or move it away")
    if not text.endswith("\n"):
        sys.exit(f"{path} ends in the midst of a row, {text.splitlines()[-1]!r}: complete or remove it")
    return list(csv.DictReader(text.splitlines()))


def key_in(row: dict[str, str]) -> tuple[str, ...]:
    """What tells a row from others."""
    return tuple(row[name] for name in KEY)


def append(path: Path, row: dict[str, str]) -> None:
    """Add a row, at once and whole; one whose key is there already changes nothing, and that is said."""
    with FileLock(path.with_name(f".{path.name}.lock")):
        if key_in(row) in map(key_in, rows_of(path)):
            print(f"{path.name} has a row of {', '.join(key_in(row))} already: this one is not added", flush=True)
            return
        new = not path.is_file()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            if new:
                writer.writeheader()
            writer.writerow(row)
    print(*row.values(), flush=True)
