"""``lq search``: compose, instantiate, run."""

import hydra
from omegaconf import DictConfig

from lq._paths import home
from lq.cli.config import register
from lq.cli.search_config import build_search, register_search
from lq.cli.terminal import print_ui_command, quiet
from lq.search_experiment import run_search

__all__ = ["main"]

register()
register_search()


@hydra.main(version_base="1.3", config_path=str(home() / "conf"), config_name="search_config")
def main(config: DictConfig) -> float:
    """Search, print the report and the outcome, and return the accuracy, which sweepers optimise.

    Args:
        config: composed by Hydra.

    Returns:
        Test accuracy of the searched network.
    """
    quiet()
    outcome = run_search(build_search(config))
    print(f"\n{outcome.report}\n\n{outcome}")
    print_ui_command(config)
    return outcome.quantized_accuracy


if __name__ == "__main__":
    main()
