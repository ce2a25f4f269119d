"""The configuration of ``lq search``: its schema, and how it becomes objects."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.utils import instantiate
from omegaconf import MISSING, DictConfig, OmegaConf

from lq.cli.config import GROUPS, given_overrides, named_loggers
from lq.cli.fields import doc
from lq.cli.schema import schema
from lq.search_experiment import SearchSettings
from lq.search_spec import SearchSpec

__all__ = ["SEARCH_GROUPS", "SearchConfig", "build_search", "register_search", "search_name"]


@dataclass
class SearchConfig:
    """Fields of the top level; every group is a field of its own."""

    model: Any = MISSING
    data: Any = MISSING
    search: Any = MISSING
    trainer: Any = MISSING
    logger: Any = MISSING
    experiment: str = doc("name under which the tracking store groups runs.", "lq-search")
    seed: int = doc("of everything that is random.", 0)
    calibration_images: int = doc("training images that the search may look at.", 512)
    calibration_batch_size: int = doc("images per batch of those.", 64)
    pretrain_epochs: int = doc("float epochs first; 0 where model.checkpoint is a float network.", 0)
    pretrain_lr: float = doc("peak learning rate of those.", 0.1)
    registered_model: str | None = doc("name under which MLflow registers the packed network; null for none.", None)
    output_dir: str = doc(
        "folder for the network, its codes and what is kept of an interrupted search: give the same one to go on.",
        MISSING,
    )


SEARCH_GROUPS: dict[str, dict[str, type[Any]]] = {
    "model": GROUPS["model"],
    "data": GROUPS["data"],
    "search": {"schema": schema(SearchSpec, instantiate=False)},
    "trainer": GROUPS["trainer"],
    "logger": GROUPS["logger"],
}


def register_search() -> None:
    """Make the schemas known to Hydra under the names that ``conf/`` refers to."""
    store = ConfigStore.instance()
    store.store(name="search_schema", node=SearchConfig)
    store.store(group="search", name="schema", node=SEARCH_GROUPS["search"]["schema"])


def build_search(config: DictConfig) -> SearchSettings:
    """Build everything a search run needs.

    Args:
        config: composed by Hydra.

    Returns:
        Settings for `lq.search_experiment.run_search`.

    Raises:
        ValueError: for a bad value, naming the field, the values allowed and the fix.
    """
    plain: Any = OmegaConf.to_container(config, resolve=True)
    spec = SearchSpec.from_dict(plain["search"])
    assert isinstance(spec, SearchSpec)
    return SearchSettings(
        model=plain["model"],
        spec=spec,
        data=instantiate(config.data),
        trainer=plain["trainer"],
        loggers=named_loggers(config, search_name(plain["model"]["name"], spec)),
        output_dir=Path(config.output_dir),
        description={**plain, "overrides": given_overrides()},
        **{
            name: plain[name]
            for name in (
                "seed",
                "calibration_images",
                "calibration_batch_size",
                "pretrain_epochs",
                "pretrain_lr",
                "registered_model",
            )
        },
    )


def search_name(model: str, spec: SearchSpec) -> str:
    """Name by which a person tells runs apart.

    Args:
        model: name of the network.
        spec: of the search.

    Returns:
        Such as "resnet18 subset W4A32 inputs reconstructed".

    >>> search_name("resnet18", SearchSpec(bits=4, importance="inputs", reconstruct=500))
    'resnet18 subset W4A32 inputs reconstructed'
    """
    extras = [spec.importance, "equalized" if spec.equalize else None]
    extras += [spec.rounding if spec.rounding != "nearest" else None, "reconstructed" if spec.reconstruct else None]
    return " ".join([model, spec.quantizer, spec.widths, *(e for e in extras if e)])
