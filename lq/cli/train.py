"""``lq train``: compose, instantiate, run."""

import logging
import warnings

import hydra
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig

from lq._paths import home
from lq.cli.config import build, register
from lq.experiment import run
from lq.tracking.mlflow import default_tracking_uri, ui_command

__all__ = ["main"]

register()


@hydra.main(version_base="1.3", config_path=str(home() / "conf"), config_name="config")
def main(config: DictConfig) -> float:
    """Train, print the outcome, and return the accuracy, which sweepers optimise.

    Args:
        config: composed by Hydra.

    Returns:
        Test accuracy of the quantized network.
    """
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning's own use of torch
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # its notices on hardware, five times a run
    outcome = run(build(config))
    if rank_zero_only.rank:
        return outcome.quantized_accuracy
    print(f"\n{outcome}")
    if "experiment" in config.logger:
        print(f"\nCompare runs in the browser:  {ui_command(config.logger.tracking_uri or default_tracking_uri())}")
    return outcome.quantized_accuracy


if __name__ == "__main__":
    main()
