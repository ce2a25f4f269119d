"""Quantization-aware training as one Lightning callback."""

from dataclasses import fields
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from lq.calibration import uncalibrated_layers
from lq.callbacks.batches import Forward, loss_scale, overrides
from lq.callbacks.first_batches import (
    calibrate_on_training_batches,
    follow_norms_on_training_batch,
    reestimate_on_training_batches,
    round_on_training_batches,
    training_norms,
)
from lq.callbacks.guards import (
    check_averaging_order,
    check_collapse,
    check_loss,
    check_optimizers,
    check_same_spec,
    check_stepped,
    warn_of_late_averaging,
    warn_of_other_schedule,
    warn_without_validation,
)
from lq.callbacks.patches import Patches
from lq.callbacks.regularization import add_regularizer, check_regularizer
from lq.callbacks.schedule import Annealing, AnnealSpec, choose, describe
from lq.callbacks.steps import moves_weights, part_of_fit, steps_of_fit
from lq.callbacks.tracker import QuantizationTracker, log_report
from lq.checkpoints import checkpoint_entry, restore_plan
from lq.group_rules import GroupRules, Rule, decay_rules
from lq.network import layer_statistics, scale_parameters, set_slope
from lq.nn import QuantLayer, named_quantized_layers
from lq.spec import QuantSpec
from lq.surgery import SwapReport, apply_plan, execution_order, idle_options, make_plan, run_example, swap_report
from lq.tracking import metric

__all__ = ["LearnedQuantization"]

_SPEC_FIELDS = tuple(f.name for f in fields(QuantSpec))
_ANNEAL_FIELDS = tuple(f.name for f in fields(AnnealSpec))
_say = rank_zero_only(print)


class LearnedQuantization(Callback):
    """Trains a low-bit network around an unmodified LightningModule.

    Swaps its layers before the optimizers are built, calibrates activations on the first training batches, raises
    the slope of the staircase with every optimizer step, adds the gradient of the scale regularizer, and logs
    alignment and quantization loss. Validation and test always see the hard network that will ship.

    Args:
        spec: what to quantize and how; or give its fields (``bits=4``, ...) as keywords.
        anneal: slope, hold and regularizer; or give its fields (``slope_end=16``, ...) as keywords.
        calibration_forward: runs the module on a batch to calibrate; needed only where the module optimizes manually
            and has no forward of its own.
        log_every_n_steps: optimizer steps between logs; None takes ``Trainer(log_every_n_steps)``, of which 0 logs
            nothing.
        log_layers: whether to log every layer, too.
        **settings: fields of `lq.QuantSpec` and `lq.callbacks.AnnealSpec`.

    Raises:
        TypeError: for a keyword that is neither's field.
        ValueError: for a bad value, naming the field, the values allowed and the fix.

    Note:
        Place it before `WeightAveraging` and its like. Use `lq.load_from_checkpoint` to load what it trained.

    >>> callback = LearnedQuantization(bits=3, slope_end=12.0)
    >>> callback.spec.bits, callback.anneal.slope_end
    (3, 12.0)
    """

    def __init__(
        self,
        spec: QuantSpec | None = None,
        anneal: AnnealSpec | None = None,
        *,
        calibration_forward: Forward | None = None,
        log_every_n_steps: int | None = None,
        log_layers: bool = True,
        **settings: Any,
    ) -> None:
        """Validate everything; nothing is touched before `setup`."""
        super().__init__()
        self.spec = choose("spec", spec, QuantSpec, {k: v for k, v in settings.items() if k in _SPEC_FIELDS})
        self.anneal = choose("anneal", anneal, AnnealSpec, {k: v for k, v in settings.items() if k in _ANNEAL_FIELDS})
        unknown = [name for name in settings if name not in (*_SPEC_FIELDS, *_ANNEAL_FIELDS)]
        if unknown:
            raise TypeError(
                f"LearnedQuantization got unknown settings {unknown}: allowed are {_SPEC_FIELDS + _ANNEAL_FIELDS}"
            )
        self.calibration_forward = calibration_forward
        self.tracker = QuantizationTracker(log_every_n_steps, log_layers)
        self.annealing = Annealing(self.anneal)
        self.report: SwapReport | None = None
        self._patches = Patches()
        self._rules: list[GroupRules] = []
        self._collapsed_at_start: frozenset[str] = frozenset()
        self._fresh: list[Any] = []  # layers that a fit has not begun with yet
        self._stepped = self._started = self._drifted = False
        self._order: list[str] | None = None
        self._norms: list[str] | None = None  # those that train
        self._regularizer: torch.Tensor | None = None
        self._loss: torch.Tensor | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Swap the layers, or arrange that layers which the module builds later are swapped when they exist."""
        check_averaging_order(trainer.callbacks, self)  # pyright: ignore[reportAttributeAccessIssue]
        self._started = False
        if stage == "fit":
            warn_of_late_averaging(trainer.callbacks)  # pyright: ignore[reportAttributeAccessIssue]
            self.annealing = Annealing(self.anneal)
            self.tracker.restart()
            self._regularizer = self._loss = self._norms = None
        restore = pl_module.on_load_checkpoint

        def on_load_checkpoint(checkpoint: dict[str, Any]) -> None:
            restore(checkpoint)
            restore_plan(pl_module, checkpoint, self.spec)
            if stage == "fit":
                warn_of_other_schedule(checkpoint["lq"].get("anneal", {}), describe(self.anneal))

        self._patches.put(pl_module, "on_load_checkpoint", on_load_checkpoint)
        if not (overrides(pl_module, "setup") or overrides(pl_module, "configure_model")):
            self._swap(pl_module)
            return
        configure = pl_module.configure_model

        def configure_model() -> None:
            configure()
            self._swap(pl_module)

        self._patches.put(pl_module, "configure_model", configure_model)

    def _swap(self, pl_module: LightningModule) -> None:
        plan = make_plan(pl_module, self.spec)
        if all(isinstance(p.found.module, QuantLayer) for p in plan.layers if p.spec is not None):
            check_same_spec([p.found for p in plan.layers], self.spec)  # swapped in an earlier stage, or loaded
            self.report = self.report or swap_report(plan)
            return
        example = pl_module.example_input_array
        self._order = None if example is None else execution_order(pl_module, lambda: run_example(pl_module, example))
        plan = make_plan(pl_module, self.spec, self._order)
        self._fresh = [p.found.module for p in plan.layers if p.spec and not isinstance(p.found.module, QuantLayer)]
        self.report = apply_plan(pl_module, plan, fit=False)
        if idle := idle_options(self.spec, plan):
            rank_zero_warn(idle)
        set_slope(pl_module, self.anneal.slope_start)

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say that these figures do not count."""
        if uncalibrated_layers(pl_module):
            _say("The sanity check runs before calibration: activations are not quantized in it.")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Calibrate, find the first and last block, take charge of the scales, report."""
        self._started = True
        if not named_quantized_layers(pl_module):
            raise ValueError("no layer was quantized: build the network in __init__, setup or configure_model")
        check_regularizer(pl_module, self.anneal)
        left = 1 - part_of_fit(trainer, 0)  # all of it but where a trainer goes on with more epochs
        self.annealing.resolve(left * steps_of_fit(trainer))
        begins = self.annealing.step == 0
        fresh = begins and bool(self._fresh or uncalibrated_layers(pl_module))
        count, run = self.anneal.calibration_batches, self.calibration_forward
        if fresh:
            order = calibrate_on_training_batches(trainer, pl_module, self.spec, count, run, self._order, self._fresh)
            self.report = swap_report(make_plan(pl_module, self.spec, order))
        follow_norms_on_training_batch(trainer, pl_module, run, calibrate=begins)
        if fresh and self.anneal.start_rounding:
            round_on_training_batches(trainer, pl_module, count, run)
        self._fresh = []  # those of a fit that is resumed are not either
        warn_without_validation(self.anneal.hold, trainer.enable_validation)
        check_optimizers(trainer.optimizers, pl_module)
        scales = Rule(tuple(scale_parameters(pl_module)), lr=self.anneal.scale_lr_factor, weight_decay=0.0)
        layers = named_quantized_layers(pl_module).values() if self.anneal.weight_decay_by_bits else ()
        self._rules = [GroupRules(o, lambda: [scales, *decay_rules(layers)]) for o in trainer.optimizers]
        self._collapsed_at_start = check_collapse(pl_module, layer_statistics(pl_module))
        set_slope(pl_module, self.annealing.slope)
        if self.report is not None and begins:
            log_report(trainer, self.report)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set the slope of this step."""
        set_slope(pl_module, self.annealing.slope)
        self._stepped, self._drifted = False, True  # a batch moves the statistics of batch norms

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Add the gradient of the regularizer, once per step, after unscaling and before clipping."""
        if not moves_weights(optimizer):
            return  # training_step skipped the batch
        self._stepped = True
        if self.annealing.strength:
            factor = self.annealing.strength * loss_scale(trainer, optimizer)
            value = add_regularizer(pl_module, optimizer.param_groups, self.anneal, factor)
            self._regularizer = self._regularizer if value is None else value

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the step, check for collapse, log when due."""
        if batch_idx == 0 or self._norms is None:  # the module may freeze norms as late as in its own step
            self._norms = training_norms(pl_module)
        returned = outputs.get("loss") if isinstance(outputs, dict) else outputs
        loss = self._loss = returned if isinstance(returned, torch.Tensor) else None
        due = self._stepped and self.tracker.due(trainer, self.annealing.step + 1)
        if loss is not None and (due or loss.device.type == "cpu" or trainer.is_last_batch):
            check_loss(loss, self.annealing.step, ())
        if not self._stepped:
            return
        slope, strength = self.annealing.slope, self.annealing.strength
        self.annealing.advance()
        if not due:
            return
        extra = {metric("slope"): slope}
        if self._regularizer is not None:
            extra[metric("regularizer")] = float(self._regularizer)
        if loss is not None:
            # Lightning hands over the loss divided by the batches that it accumulates over
            task = float(loss) * (trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1)
            extra[metric("loss_total")] = task + strength * extra.get(metric("regularizer"), 0.0)
        statistics = layer_statistics(pl_module)
        check_collapse(pl_module, statistics, self._collapsed_at_start)
        values = self.tracker.record(trainer, pl_module, self.annealing.step, extra, statistics)
        self.annealing.see_alignment(values[metric("alignment")])

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse to anneal by steps that nobody reports; re-estimate batch norms where no validation has since."""
        check_stepped(self.annealing.step)
        if self._drifted:
            self._reestimate(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn of what never came: how often a module steps its optimizers itself is not known beforehand."""
        if not pl_module.automatic_optimization and (missed := self.annealing.unreached):
            named = " and ".join(f"{name} (step {at})" for name, at in missed.items())
            rank_zero_warn(
                f"the fit ended after {self.annealing.step} optimizer steps, before {named}: this module steps its "
                "optimizers itself, less than once a batch or several of them. Give integers, in optimizer steps"
            )

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Re-estimate batch norms before the first batch, when weight averaging has put its weights in place."""
        if batch_idx == 0 and dataloader_idx == 0 and self._started and not trainer.sanity_checking:
            self._reestimate(trainer, pl_module)

    def _reestimate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        count, forward, self._drifted = self.anneal.reestimate_bn, self.calibration_forward, False
        reestimate_on_training_batches(trainer, pl_module, count, forward, self._norms or ())

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the plateau criterion."""
        if self._started and not trainer.sanity_checking:
            self.annealing.see_metrics(dict(trainer.callback_metrics), trainer.strategy.reduce_boolean_decision)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave nothing attached after a crash."""
        self._started = False
        self._release()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse to have trained on nothing: Lightning skips an empty loader without a word."""
        if not self._started and trainer.train_dataloader is not None and trainer.num_training_batches == 0:
            raise ValueError("train_dataloader must yield at least one batch, got an empty one: check the dataset")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Undo what `setup` arranged; the layers stay quantized."""
        self._release()

    def _release(self) -> None:
        for rules in self._rules:
            rules.remove()
        self._patches.undo()
        self._rules = []

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Say in the checkpoint what it is; write none of a network that a NaN has reached."""
        if self._started:
            check_loss(self._loss, self.annealing.step, scale_parameters(pl_module))
        checkpoint["lq"] = checkpoint_entry(pl_module, self.spec) | {"anneal": describe(self.anneal)}

    def state_dict(self) -> dict[str, Any]:
        """Step, hold and plateau."""
        return self.annealing.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from the very same slope."""
        self.annealing.load_state_dict(state_dict)
