"""Make a model what a worked-on copy of it has become, in place."""

from torch import nn

from lq.nn import QuantLayer, to_float
from lq.surgery import keep_off_fast_path

__all__ = ["adopt"]


def adopt(model: nn.Module, work: nn.Module) -> None:
    """Turn a model into its changed copy; modules and parameters that it had stay the same objects.

    Args:
        model: to be changed; in evaluation mode afterwards.
        work: a copy of it whose layers were quantized, whose values changed, or that got further parts.
    """
    changed = dict(work.named_modules(remove_duplicate=False))
    done: set[int] = set()
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) in done or path not in changed:
            continue
        done.add(id(module))
        _adopt_one(module, changed[path])
    state = work.state_dict()
    model.load_state_dict(state)
    model.eval()
    keep_off_fast_path(model)


def _adopt_one(module: nn.Module, work: nn.Module) -> None:
    if isinstance(module, QuantLayer) and not isinstance(work, QuantLayer):
        to_float(module)
    if isinstance(work, QuantLayer):
        module.__class__ = type(work)
        module.transforms_weight = work.transforms_weight  # type: ignore[assignment]
        module.layer_spec = work.layer_spec  # type: ignore[assignment]
        module.add_module("weight_quantizer", work.weight_quantizer)
        module.add_module("input_quantizer", work.input_quantizer)
        module.add_module("weight_normalizer", work.weight_normalizer)
    for name, child in work.named_children():
        if type(getattr(module, name, None)) is not type(child) and not isinstance(child, QuantLayer):
            module.add_module(name, child)
    for name, parameter in work.named_parameters(recurse=False):
        if getattr(module, name, None) is None:
            module.register_parameter(name, parameter)
