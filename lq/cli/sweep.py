"""One parent run per sweep, under which every job nests."""

import atexit
import os
from typing import Any

from hydra.experimental.callback import Callback
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

__all__ = ["ParentRun"]


class ParentRun(Callback):
    """Hydra callback: creates store, experiment and parent run before the jobs start, and closes the run at exit.

    The store is created here because several jobs that find none would each try to.
    """

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Create the parent run; jobs find its id in the environment."""
        from hydra.core.global_hydra import GlobalHydra

        from lq.tracking.mlflow import PARENT_RUN

        # here ``config`` holds the sweep's overrides but not their values: compose one job without its choices
        if "experiment" not in config.logger:
            return
        assert GlobalHydra.instance().is_initialized()
        os.environ.pop(PARENT_RUN, None)
        # what was asked for may hold interpolations that only jobs can resolve
        asked: Any = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
        logger = instantiate(config.logger, _partial_=True)(run_name=" ".join(["sweep", *asked]))
        run_id = logger.run_id
        logger.experiment.set_tag(run_id, "lq.sweep", "true")
        os.environ[PARENT_RUN] = run_id
        self._logger, self._failed = logger, False
        # on_multirun_end is not called when a job raised
        atexit.register(self._close)

    def on_job_end(self, config: DictConfig, job_return: Any, **kwargs: Any) -> None:
        """Remember a failure."""
        if getattr(job_return, "status", None) is not None and job_return.status.name == "FAILED":
            self._failed = True

    def _close(self) -> None:
        self._logger.finalize("failed" if self._failed else "success")
