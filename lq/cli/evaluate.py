"""``lq evaluate``: networks in all their forms side by side on the test images of a DataModule."""

from dataclasses import dataclass
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.utils import instantiate
from omegaconf import MISSING, DictConfig, OmegaConf

from lq._paths import home
from lq.cli.config import GROUPS, given_overrides, named_loggers, register
from lq.cli.fields import doc
from lq.cli.terminal import print_ui_command, quiet
from lq.deployed import Deployed, open_deployed
from lq.evaluation_experiment import EvaluationSettings, run_evaluation
from lq.models import create_model
from lq.runs import input_of

__all__ = ["EVALUATE_GROUPS", "EvaluateConfig", "build_evaluation", "main"]


@dataclass
class EvaluateConfig:
    """Fields of the top level; every group is a field of its own."""

    model: Any = None
    data: Any = MISSING
    logger: Any = MISSING
    files: list[str] = doc(
        "networks: checkpoints, artifacts, ONNX files, C files or programs; integer:FILE for the integer engine.",
        [],
    )
    allow: list[str] = doc("import paths that an artifact may call.", [])
    images: int | None = doc("how many test images; null for all.", None)
    experiment: str = doc("name under which the tracking store groups runs.", "lq-evaluate")


EVALUATE_GROUPS: dict[str, dict[str, type[Any]]] = {name: GROUPS[name] for name in ("model", "data", "logger")}


def build_evaluation(config: DictConfig) -> EvaluationSettings:
    """What a configuration describes.

    Args:
        config: composed by Hydra.

    Returns:
        The settings, networks opened.

    Raises:
        ValueError: where there is nothing to evaluate.
    """
    plain: Any = OmegaConf.to_container(config, resolve=True)
    if not plain["files"] and not plain["model"]:
        raise ValueError("files must name at least one network, got none: files=[net.lq.safetensors,net.onnx]")
    data = instantiate(config.data)
    data.prepare_data()
    data.setup("test")
    shape = tuple(input_of(data)["shape"])
    networks = [_float(plain["model"], shape)] if plain["model"] else []
    networks += [open_deployed(file, shape, plain["allow"]) for file in plain["files"]]
    return EvaluationSettings(
        networks,
        data,
        images=plain["images"],
        loggers=named_loggers(config, " ".join(network.name for network in networks)[:200]),
        description={**plain, "overrides": given_overrides()},
    )


def _float(model: dict[str, Any], shape: tuple[int, ...]) -> Deployed:
    network = create_model(**model).eval()
    size = sum(p.numel() * p.element_size() for p in network.parameters())
    return Deployed(model["name"], "float", size, network, shape)


register()
ConfigStore.instance().store(name="evaluate_schema", node=EvaluateConfig)


@hydra.main(version_base="1.3", config_path=str(home() / "conf"), config_name="evaluate_config")
def main(config: DictConfig) -> None:
    """Evaluate and print the table.

    Args:
        config: composed by Hydra.
    """
    quiet()
    print(run_evaluation(build_evaluation(config)))
    print_ui_command(config)


if __name__ == "__main__":
    main()
