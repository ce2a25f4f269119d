"""What the commands print, and what they keep from being printed."""

import logging
import warnings

from omegaconf import DictConfig

from lq.tracking.mlflow import default_tracking_uri, ui_command

__all__ = ["print_ui_command", "quiet"]


def quiet() -> None:
    """Keep Lightning's notices away from the terminal: on its own use of torch, and on hardware, five times a run."""
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)


def print_ui_command(config: DictConfig) -> None:
    """Say how to look at the run, where it went to MLflow.

    Args:
        config: composed by Hydra.
    """
    if "experiment" in config.logger:
        print(f"\nCompare runs in the browser:  {ui_command(config.logger.tracking_uri or default_tracking_uri())}")
