"""``lq compare``: the runs of a sweep side by side."""

import argparse
from collections.abc import Sequence
from typing import Any

from lq.text import format_table
from lq.tracking.mlflow import default_tracking_uri, ui_command

__all__ = ["compare", "main"]

_METRICS = (
    "float/test/acc",
    "test/acc",
    "val/acc",
    "lq/alignment",
    "lq/sqnr_db",
    "lq/bits_per_weight",
    "lq/size_bytes",
)


def compare(tracking_uri: str, experiment: str | None = None, sweep: str | None = None) -> str:
    """Table of the runs of a sweep, or of all runs of an experiment.

    Args:
        tracking_uri: of the store.
        experiment: name; None takes all.
        sweep: id of a sweep's parent run, or "last" for the newest; None lists every run.

    Returns:
        The table.

    Raises:
        ValueError: for an experiment or a sweep that the store does not have, naming those it has.
    """
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri)
    known = {e.name: e.experiment_id for e in client.search_experiments(order_by=["last_update_time DESC"])}
    if experiment is not None and experiment not in known:
        raise ValueError(f"experiment must be one of {sorted(known)}, got {experiment!r}: check --tracking-uri")
    ids = [known[experiment]] if experiment else list(known.values())
    runs = _runs(client, ids)
    if sweep is not None:
        parents = [run.info.run_id for run in runs if run.data.tags.get("lq.sweep")]
        if sweep not in (*parents, "last") or not parents:
            listed = f"be one of {parents}, or last" if parents else "exist"
            raise ValueError(f"sweep must {listed}, got {sweep!r}: start one with lq train -m quantizer=soft,lsq")
        sweep = parents[-1] if sweep == "last" else sweep
        runs = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == sweep]
    runs = [run for run in runs if not run.data.tags.get("lq.sweep")]
    if not runs:
        raise ValueError(f"a run must match, got none for experiment={experiment!r}, sweep={sweep!r} in {tracking_uri}")
    shown = [m for m in _METRICS if any(m in run.data.metrics for run in runs)]
    overrides = [run.data.params.get("overrides", "").split() for run in runs]
    common = set.intersection(*map(set, overrides)) if len(runs) > 1 else set()
    rows = [
        (
            run.info.run_name,
            run.info.status.lower(),
            " ".join(o for o in given if o not in common),
            *(run.data.metrics.get(m) for m in shown),
        )
        for run, given in zip(runs, overrides, strict=True)
    ]
    return format_table(("run", "status", "what differs", *shown), rows)


def _runs(client: Any, ids: Sequence[str]) -> list[Any]:
    """All runs, the oldest first; a store hands them out page by page."""
    found, token = [], None
    while token != "":
        page = client.search_runs(ids, order_by=["attributes.start_time ASC"], page_token=token)
        found, token = found + list(page), page.token or ""
    return found


def main(arguments: Sequence[str]) -> None:
    """Parse and print.

    Args:
        arguments: of the command line.
    """
    parser = argparse.ArgumentParser(prog="lq compare", description="Print the runs of a sweep side by side.")
    parser.add_argument("--tracking-uri", default=default_tracking_uri(), help="MLflow store [%(default)s]")
    parser.add_argument("--experiment", help="name of the experiment [all]")
    parser.add_argument("--sweep", default=None, help='id of a sweep\'s parent run, or "last" [every run]')
    options: Any = parser.parse_args(arguments)
    try:
        print(compare(options.tracking_uri, options.experiment, options.sweep))
    except ValueError as error:
        parser.error(str(error))
    print(f"\nThe same in the browser:  {ui_command(options.tracking_uri)}")
