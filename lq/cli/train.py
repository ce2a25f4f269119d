"""``lq train``: compose, instantiate, run."""

import hydra
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig

from lq._paths import home
from lq.cli.config import build, register
from lq.cli.job import needs_own_processes, run_in_own_processes
from lq.cli.terminal import print_ui_command, quiet
from lq.experiment import run

__all__ = ["main"]

register()


@hydra.main(version_base="1.3", config_path=str(home() / "conf"), config_name="config")
def main(config: DictConfig) -> float:
    """Train, print the outcome, and return the accuracy, which sweepers optimise.

    Args:
        config: composed by Hydra.

    Returns:
        Test accuracy of the quantized network; with ``test=false`` its accuracy on held-out images.
    """
    quiet()
    if needs_own_processes(config):
        return run_in_own_processes(config).objective
    outcome = run(build(config))
    if rank_zero_only.rank:
        return outcome.objective
    print(f"\n{outcome}")
    print_ui_command(config)
    return outcome.objective


if __name__ == "__main__":
    main()
