"""One job of a sweep under a strategy that starts processes, in processes of its own."""

import subprocess
import sys
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch import Trainer
from omegaconf import DictConfig, OmegaConf

from lq.outcome import Outcome

__all__ = ["needs_own_processes", "run_in_own_processes"]

# which sweep it is part of; all else that is told to Hydra concerns the job, too
_OF_THE_SWEEP = ("hydra.mode", "hydra.run.dir", "hydra.sweep", "hydra/sweeper", "hydra.launcher", "hydra/launcher")


def needs_own_processes(config: DictConfig) -> bool:
    """Whether this is a job of a sweep whose Trainer starts processes for further devices, or would with more of them.

    Lightning starts them with the arguments of this process, which are those of the whole sweep, and only once in the
    life of a process; in that process it leaves the first one's address to all that follow, of one device, too.

    Args:
        config: composed by Hydra.

    Returns:
        False outside a sweep, and where something else, such as torchrun, has started the processes.
    """
    if HydraConfig.get().mode != RunMode.MULTIRUN:
        return False
    arguments: Any = OmegaConf.to_container(config.trainer, resolve=True)
    trainer = Trainer(**{**arguments, "logger": False})
    return trainer.strategy.launcher is not None


def run_in_own_processes(config: DictConfig) -> Outcome:
    """Run a job of a sweep as a run of its own, in the job's folder.

    Args:
        config: composed by Hydra.

    Returns:
        What it has found.

    Raises:
        subprocess.CalledProcessError: where it fails; it has said why.
    """
    subprocess.run(_command(), check=True, cwd=HydraConfig.get().runtime.cwd)
    return Outcome.from_json((Path(config.output_dir) / "outcome.json").read_text())


def _command() -> list[str]:
    hydra = HydraConfig.get()
    command = [sys.executable, "-m", "lq", "train", "--config-name", str(hydra.job.config_name)]
    for source in hydra.runtime.config_sources:
        if source.provider == "command-line":
            command += ["--config-dir", source.path]
    told = [given for given in hydra.overrides.hydra if not given.lstrip("+~").startswith(_OF_THE_SWEEP)]
    here = [f"hydra.job.num={hydra.job.num}", f"hydra.run.dir='{hydra.runtime.output_dir}'"]
    return [*command, *hydra.overrides.task, *told, *here]
