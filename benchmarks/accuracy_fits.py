"""Fits of the accuracy benchmark, one folder per seed: what was interrupted goes on from its last whole epoch."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from filelock import FileLock, Timeout

LAST, OUTCOME, SPENT = "checkpoints/last.ckpt", "outcome.json", "seconds.txt"


def fits(folder: Path, overrides: list[str], seeds: list[int]) -> Iterator[tuple[int, dict, float]]:
    """Run ``lq train --multirun`` for what ``folder`` lacks; its subfolder of a seed goes once its row is taken.

    Yields:
        Seed, outcome and seconds that the fit took, of every fit that ended, even where another one fails.

    Raises:
        subprocess.CalledProcessError: after those, if one failed.
        SystemExit: before any starts, where another process is at one of them.
    """
    with ExitStack() as held:
        for seed in seeds:
            _lock(held, folder, seed)
        failure = _run(folder, overrides, seeds)
        for seed in seeds:
            path = folder / str(seed) / OUTCOME
            if path.is_file():
                yield seed, json.loads(path.read_text()), _seconds(folder / str(seed), path)
                shutil.rmtree(folder / str(seed))
        if failure:
            raise failure
        if not any((own / name).is_file() for own in folder.iterdir() for name in (LAST, OUTCOME)):
            shutil.rmtree(folder)  # else other seeds are there, begun by another call


def _lock(held: ExitStack, folder: Path, seed: int) -> None:
    """Keep other processes from a seed; the system lets go of it where this one is killed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        held.enter_context(FileLock(f"{folder}.{seed}.lock", blocking=False))
    except Timeout:
        sys.exit(f"another process is at seed {seed} in {folder}: wait for it, or give other --seeds")


def _run(folder: Path, overrides: list[str], seeds: list[int]) -> subprocess.CalledProcessError | None:
    """All that have no outcome yet; returns the last failure, which keeps no other from its fit."""
    waiting = [seed for seed in seeds if not (folder / str(seed) / OUTCOME).is_file()]
    resumed = [seed for seed in waiting if (folder / str(seed) / LAST).is_file()]
    groups = [[seed] for seed in resumed] + [[seed for seed in waiting if seed not in resumed]]
    failure = None
    for group in filter(None, groups):
        try:
            _train(folder, overrides, group, resume=group[0] in resumed)
        except subprocess.CalledProcessError as error:
            failure = error
    return failure


def _train(folder: Path, overrides: list[str], seeds: list[int], resume: bool) -> None:
    given = [*overrides, "seed=" + ",".join(map(str, seeds))]
    if resume:
        own = folder / str(seeds[0])
        given.append(f"ckpt_path={own / LAST}")
        (own / SPENT).write_text(str(_seconds(own, own / LAST)))
        print(f"goes on from {own / LAST}: remove {own} to start over", flush=True)
    where = [f"hydra.sweep.dir={folder}", "hydra.sweep.subdir=${seed}"]
    subprocess.run([sys.executable, "-m", "lq", "train", "--multirun", *where, *given], check=True)


def _seconds(own: Path, end: Path) -> float:
    """From when Hydra wrote the configuration until ``end`` was written, and what earlier starts took."""
    earlier = float((own / SPENT).read_text()) if (own / SPENT).is_file() else 0.0
    # a start that was interrupted in its first epoch has a configuration later than the checkpoint that it went on from
    return earlier + max(0.0, end.stat().st_mtime - (own / ".hydra" / "config.yaml").stat().st_mtime)
