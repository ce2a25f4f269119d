"""Distillation from the float copy of the network that is being quantized, or from any other teacher."""

import copy
import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_map_only

from lq.callbacks.outputs import as_logits, check_shapes, feature, kind
from lq.callbacks.parts import descend, paths_near
from lq.callbacks.patches import Patches
from lq.checks import require_integer, require_number
from lq.files import raw_bytes
from lq.functional.distillation import distillation_loss, feature_loss
from lq.surgery import dequantize_model
from lq.tracking import metric

__all__ = ["SelfDistillation"]


class SelfDistillation(Callback):
    """Adds the divergence from a teacher to the loss of an unmodified LightningModule.

    The teacher is a copy of the student in float, taken before the first step and before a checkpoint is loaded: it is
    in evaluation mode, gets no gradients, and is part of neither the module nor its checkpoints. It sees whatever the
    student sees with gradients in ``training_step``.

    Args:
        student: path of the network in the module, such as "model".
        teacher: any other network that takes the same inputs; None for the student's float copy.
        weight: factor of the divergence.
        task_weight: factor of the task's loss; 0 learns from the teacher alone, so that labels do not matter.
        temperature: that softens both, positive; at 1 little is learned from a teacher as sure of itself as a network
            is of images that it was trained on.
        features: paths in the student whose outputs shall resemble the teacher's, too.
        feature_weight: factor of the mean of their `lq.functional.distillation.feature_loss`.
        logits: takes the logits from what the networks return; None where they return them.
        dim: of the classes.

    Raises:
        ValueError: for a weight that is negative or no number, weights that leave no loss, a temperature that is not
            positive, or features without a weight.
        TypeError: for a teacher that is not a network, or logits that are no function.

    Source: Hinton et al. 2015; with the float copy as teacher, Esser et al., ICLR 2020, section 3.5.

    >>> callback = SelfDistillation(student="model", weight=1.0)
    >>> callback.weight
    1.0
    """

    def __init__(
        self,
        student: str = "model",
        *,
        teacher: nn.Module | None = None,
        weight: float = 1.0,
        task_weight: float = 1.0,
        temperature: float = 4.0,
        features: Sequence[str] = (),
        feature_weight: float = 0.0,
        logits: Callable[[Any], Tensor] | None = None,
        dim: int = 1,
    ) -> None:
        """Validate; nothing is touched before `setup`."""
        super().__init__()
        for name, value in {"weight": weight, "task_weight": task_weight, "feature_weight": feature_weight}.items():
            finite, off = "be finite and not negative", "1 is usual, 0 switches it off"
            require_number(name, value, lambda v: 0 <= v < math.inf, finite, off)
        if not (weight or task_weight or feature_weight):
            raise ValueError("weight and task_weight must not both be 0, which leaves no loss: set weight=1")
        require_number("temperature", temperature, lambda v: 0 < v < math.inf, "be positive", "4 is usual")
        listed = isinstance(features, Sequence) and not isinstance(features, str)
        if not listed or not all(isinstance(path, str) for path in features):
            example = features if isinstance(features, str) else "layer1"
            raise ValueError(f'features must be a list of paths, got {features!r}: write features=["{example}"]')
        if not (logits is None or callable(logits)):
            raise TypeError(f"logits must be a function or None, got {logits!r}: give one that takes what is returned")
        require_integer("dim", dim, fix="1 is usual")
        if bool(features) != (feature_weight > 0):
            raise ValueError(
                f"features and feature_weight belong together, got {list(features)} and {feature_weight}: give both"
            )
        if not (teacher is None or isinstance(teacher, nn.Module)):
            raise TypeError(
                f"teacher must be a network (torch.nn.Module) or None, got {teacher!r}: load it first, or leave it out "
                "for the student's float copy"
            )
        self.student, self.temperature = student, temperature
        self.weight, self.task_weight = weight, task_weight
        self.features, self.feature_weight = list(features), feature_weight
        self.logits, self.dim = logits or as_logits, dim
        self.given, self.teacher = teacher, None
        self._patches, self._handles, self._terms = Patches(), list[Any](), list[Tensor]()
        self._inputs: list[Any] = []  # of calls of the student that have not returned yet
        self._active, self._fingerprint = False, ""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Arrange that the teacher is copied before a checkpoint reaches the student."""
        if stage != "fit":
            return
        if not pl_module.automatic_optimization:
            raise ValueError(
                "SelfDistillation needs automatic optimization, got a module that optimizes manually: add "
                "lq.functional.distillation.distillation_loss to its loss"
            )
        if not (self.weight or self.features):
            rank_zero_warn("weight=0 without features adds nothing to the loss but the teacher's time: leave it out")
        self.teacher, restore = None, pl_module.on_load_checkpoint

        def on_load_checkpoint(checkpoint: dict[str, Any]) -> None:
            self._copy(pl_module, trainer.precision_plugin.convert_module)  # of the module that comes later than this
            restore(checkpoint)

        self._patches.put(pl_module, "on_load_checkpoint", on_load_checkpoint)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copy the teacher where no checkpoint is loaded."""
        self._copy(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring the teacher to the student's device and attach."""
        student, teacher = self._student(pl_module), self.teacher
        assert teacher is not None
        example = next((p for p in student.parameters() if p.is_floating_point()), torch.empty(0))
        teacher.to(example.device, example.dtype)
        step = pl_module.training_step

        def training_step(*args: Any, **kwargs: Any) -> Any:
            self._active = torch.is_grad_enabled()
            try:
                return self._add(pl_module, step(*args, **kwargs))
            finally:
                self._active = False
                mine.clear()  # a part that does not run in the next step has no feature there
                theirs.clear()
                self._terms.clear()
                self._inputs.clear()

        self._patches.put(pl_module, "training_step", training_step)
        mine, theirs = self._watch(student), self._watch(teacher)

        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._active and torch.is_grad_enabled():  # a look without gradients is no step
                # the student may change them in place before the teacher sees them
                self._inputs.append(tree_map_only(Tensor, _copied, (args, kwargs)))

        def compare(_: nn.Module, _args: Any, output: Any) -> None:
            if self._active and torch.is_grad_enabled():
                target = self._taught(teacher, *self._inputs.pop())
                with saved_tensors_hooks(_same, _same):  # where checkpointing repeats the student, this is not repeated
                    self._terms.append(self._term(output, target, mine, theirs))

        self._handles.append(student.register_forward_pre_hook(keep, with_kwargs=True))
        self._handles.append(student.register_forward_hook(compare))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Detach."""
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave nothing attached after a crash."""
        self._release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Undo what `setup` arranged."""
        self._release()

    def state_dict(self) -> dict[str, Any]:
        """Which teacher it was, not the teacher."""
        return {"teacher": self._fingerprint}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse to go on with another teacher."""
        if self.teacher is not None and state_dict["teacher"] != self._fingerprint:
            raise ValueError(
                "the teacher must be that of the run that is resumed, got other weights: build the module from the "
                "same float checkpoint before fit(ckpt_path=...), or give teacher="
            )

    def _copy(self, pl_module: LightningModule, convert: Callable[[nn.Module], nn.Module] | None = None) -> None:
        if self.teacher is not None:
            return
        student = self._student(pl_module)
        if self.given is student:  # it is quantized by now
            raise ValueError(
                f"teacher must be another network than the student, got {type(student).__name__}, which is both: leave "
                "it out for the student's float copy"
            )
        teacher = copy.deepcopy(student if self.given is None else self.given)
        if self.given is None:
            dequantize_model(teacher, keep_latent=True)
            teacher = teacher if convert is None else convert(teacher)
        self.teacher, self._fingerprint = teacher.eval().requires_grad_(False), _fingerprint(teacher)

    def _student(self, pl_module: LightningModule) -> nn.Module:
        path = self.student if isinstance(self.student, str) else ""
        found, nearest = descend(pl_module, path)
        if not path or not found:
            near = paths_near(*nearest)
            raise ValueError(f"student must be the path of a network in the module, got {self.student!r}: try {near}")
        return nearest[1]

    @torch.no_grad()
    def _taught(self, teacher: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.given is None:
            return teacher(*args, **kwargs)
        try:
            return teacher(*args, **kwargs)
        except (RuntimeError, TypeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise ValueError(
                f"teacher must take the student's inputs, {[kind(a) for a in (*args, *kwargs.values())]}, got "
                f"{type(teacher).__name__}, which fails on them: {error}. Choose a teacher for the same data"
            ) from error

    def _watch(self, network: nn.Module) -> dict[str, Tensor]:
        """What the chosen parts of a network gave last, kept up to date."""
        seen: dict[str, Tensor] = {}
        for path in self.features:
            found, (where, part) = descend(network, path)
            if not found:
                which = "teacher" if network is self.teacher else "student"
                raise ValueError(
                    f"features must be paths in student and teacher, got {path!r}, which the {which} lacks: it has "
                    f"{paths_near(where, part) or 'no parts'}"
                )

            def keep(_: nn.Module, _args: Any, output: Tensor, path: str = path) -> None:
                seen[path] = output

            self._handles.append(part.register_forward_hook(keep))
        return seen

    def _term(self, output: Any, target: Any, mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> Tensor:
        term = torch.zeros(())
        if self.weight:  # without, a teacher may have other classes, or none
            z, t = self.logits(output), self.logits(target)
            check_shapes("logits", z, t, "choose a teacher for the same classes")
            if not -z.ndim <= self.dim < z.ndim:
                raise ValueError(f"dim must be one of logits {tuple(z.shape)}, got {self.dim}: 1 is usual")
            term = self.weight * distillation_loss(z, t, temperature=self.temperature, dim=self.dim)
        for path in self.features:
            pair = feature(path, mine, "student"), feature(path, theirs, "teacher")
            check_shapes(f"features {path!r}", *pair, "leave them out, or choose parts of one width")
            term = term + self.feature_weight / len(self.features) * feature_loss(*pair)
        return term

    def _add(self, pl_module: LightningModule, returned: Any) -> Any:
        """The weighted loss with the divergence added, in the form that it was returned in."""
        if returned is None or not torch.is_grad_enabled():
            return returned
        if not self._terms:
            raise ValueError(
                f"student {self.student!r} must run in training_step with gradients, it did not: name what does"
            )
        term = torch.stack(self._terms).mean()
        pl_module.log(metric("distillation_loss"), term.detach())
        loss = returned["loss"] if isinstance(returned, dict) else returned
        if self.task_weight:  # 0 times the loss of labels that are not there may be no number
            term = self.task_weight * loss + term
        return {**returned, "loss": term} if isinstance(returned, dict) else term

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._patches.undo()


def _copied(value: Tensor) -> Tensor:
    return value.detach().clone()


def _same(value: Tensor) -> Tensor:
    return value


def _fingerprint(network: nn.Module) -> str:
    total = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        total.update(raw_bytes(tensor))
    return total.hexdigest()
