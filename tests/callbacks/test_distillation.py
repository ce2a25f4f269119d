import copy

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn

import lq
from lq.functional.distillation import distillation_loss, feature_loss
from lq.nn import named_quantized_layers
from tests.helpers.modules import Manual, Plain, fit, loader, mlp
from tests.integration.test_resume import run, same_runs

QUANTIZATION = {"bits": 3, "quantizer": "lsq", "regularizer": None, "calibration_batches": 2}
SMOOTH = {"bits": 3, "activation": None, "slope_end": 4.0}  # nothing rounds, which would enlarge the last digit


def sgd(params):
    return torch.optim.SGD(params, lr=0.02, momentum=0.9)


def module(kind=Plain):
    torch.manual_seed(0)
    return kind(mlp(), optimizer=sgd)


class Returning(Plain):
    def training_step(self, batch, batch_idx):
        return {"loss": super().training_step(batch, batch_idx)}


class ByHand(Plain):
    """The same loss written out in training_step."""

    def __init__(self, teacher, weight, temperature, features=0.0, task=1.0):
        super().__init__(mlp(), optimizer=sgd)
        self.given = [teacher]  # in a list: no part of the module
        self.weight, self.temperature, self.features, self.task = weight, temperature, features, task

    def training_step(self, batch, batch_idx):
        x, y = batch
        z = self.net(x)
        with torch.no_grad():
            t = self.given[0](x)
        p = F.softmax(t / self.temperature, 1)
        divergence = (p * (p.log() - F.log_softmax(z / self.temperature, 1))).sum(1).mean() * self.temperature**2
        loss = self.task * F.cross_entropy(z, y) + self.weight * divergence
        if self.features:
            mine, theirs = self.net[:2](x), self.given[0][:2](x).detach()
            loss = loss + self.features * (mine - theirs).square().mean() / theirs.square().mean()
        return loss


@pytest.mark.parametrize(("temperature", "features", "task"), [(1.0, 0.0, 1.0), (3.0, 0.5, 1.0), (1.0, 0.0, 0.2)])
@pytest.mark.parametrize("first", ["distillation", "quantization"])
def test_it_trains_as_the_same_loss_written_out(temperature, features, task, first):
    plain, float_copy = module(Returning if task < 1 else Plain), copy.deepcopy(module().net)
    extra = {"features": ["1"], "feature_weight": features} if features else {}
    callbacks = [
        lq.SelfDistillation("net", weight=0.7, task_weight=task, temperature=temperature, **extra),
        lq.LearnedQuantization(**SMOOTH),
    ]
    fit(plain, callbacks if first == "distillation" else callbacks[::-1], loader(), precision="64-true")
    hand = ByHand(copy.deepcopy(float_copy).double(), 0.7, temperature, features, task)
    hand.net.load_state_dict(float_copy.state_dict())
    fit(hand, [lq.LearnedQuantization(**SMOOTH)], loader(), precision="64-true")
    for (name, ours), theirs in zip(plain.state_dict().items(), hand.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-7, msg=name)
    assert not torch.equal(plain.net[0].weight, float_copy[0].weight)


def test_the_teacher_stays_as_it_was_and_out_of_module_optimizer_and_checkpoint(tmp_path):
    plain, before = module(), copy.deepcopy(module().net.state_dict())
    distillation = lq.SelfDistillation("net")
    trainer = fit(plain, [distillation, lq.LearnedQuantization(**QUANTIZATION)], loader(), logger=CSVLogger(tmp_path))
    teacher = distillation.teacher
    assert not named_quantized_layers(teacher)
    assert not teacher.training
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(not p.requires_grad and p.grad is None for p in teacher.parameters())
    inside = {id(p) for p in plain.parameters()}
    assert not inside & {id(p) for p in teacher.parameters()}
    trainer.save_checkpoint(tmp_path / "net.ckpt")
    saved = torch.load(tmp_path / "net.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == plain.state_dict().keys()
    assert len(saved["callbacks"]["SelfDistillation"]["teacher"]) == 64
    assert trainer.logged_metrics["lq/distillation_loss"] > 0
    assert "training_step" not in vars(plain)
    assert "on_load_checkpoint" not in vars(plain)
    assert not plain.net._forward_hooks


@pytest.mark.parametrize(
    ("order", "precision"),
    [(1, "32-true"), (-1, "32-true"), (1, "bf16-true"), (-1, "bf16-true"), (1, "64-true"), (1, "bf16-mixed")],
)
def test_a_run_resumes_bit_for_bit_with_the_teacher_it_started_from(tmp_path, order, precision):
    def callbacks(folder):
        made = [lq.SelfDistillation("net"), lq.LearnedQuantization(**QUANTIZATION)][::order]
        return [*made, ModelCheckpoint(tmp_path / folder, save_top_k=-1, filename="{epoch}", every_n_epochs=1)]

    fitted = {"data": loader(), "epochs": 3, "precision": precision}
    whole = run(tmp_path, module(), callbacks("a"), **fitted)
    again = run(tmp_path, module(), callbacks("b"), str(tmp_path / "a" / "epoch=1.ckpt"), **fitted)
    if precision != "64-true":  # whose weights Lightning loads before it makes room for their last digits
        same_runs(whole, again)
    other = module()
    other.net[0].weight.data += 1
    with pytest.raises(ValueError, match="the teacher must be that of the run that is resumed"):
        run(tmp_path, other, callbacks("c"), str(tmp_path / "a" / "epoch=1.ckpt"), **fitted)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision(precision):
    plain, distillation = module(), lq.SelfDistillation("net")
    trainer = fit(plain, [distillation, lq.LearnedQuantization(**QUANTIZATION)], loader(), precision=precision)
    assert torch.isfinite(trainer.callback_metrics["lq/distillation_loss"])
    assert next(distillation.teacher.parameters()).dtype == next(plain.net.parameters()).dtype


def test_another_teacher_and_outputs_that_hold_logits():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = mlp()

        def forward(self, x):
            return {"logits": self.inner(x)}

    class Taking(Plain):
        def forward(self, x):
            return self.net(x)["logits"]

        def training_step(self, batch, batch_idx):
            return {"loss": self.loss(batch), "note": 1}

    teacher = Wrapped()
    distillation = lq.SelfDistillation("net", teacher=teacher, logits=lambda output: output["logits"])
    trainer = fit(Taking(Wrapped(), optimizer=sgd), [distillation], loader())
    assert trainer.callback_metrics["lq/distillation_loss"] > 0
    assert torch.equal(distillation.teacher.inner[0].weight, teacher.inner[0].weight)
    assert teacher.training  # the user's own is left alone
    with pytest.raises(ValueError, match=r"must return logits, got dict: give logits="):
        fit(Taking(Wrapped(), optimizer=sgd), [lq.SelfDistillation("net")], loader())


class Mislabelled(Plain):
    def training_step(self, batch, batch_idx):
        x, y = batch
        return {"loss": super().training_step((x, (y + 1) % 4), batch_idx)}


class Unlabelled(Plain):
    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), torch.full_like(y, -100))  # no number


def test_without_the_tasks_loss_labels_do_not_matter():
    nets = []
    for kind in (Plain, Mislabelled, Unlabelled):
        plain = module(kind)
        fit(plain, [lq.SelfDistillation("net", task_weight=0.0), lq.LearnedQuantization(**QUANTIZATION)], loader())
        nets.append(plain.net.state_dict())
    for name, value in nets[0].items():
        assert torch.equal(value, nets[1][name]), name
        assert torch.equal(value, nets[2][name]), name
    assert not torch.equal(nets[0]["0.weight"], module().net[0].weight)


ONE = {"feature_weight": 1.0}
NARROW = nn.Sequential(nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 4))


class Elsewhere(Plain):
    def training_step(self, batch, batch_idx):
        return self.net[0](batch[0]).square().mean()


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (Manual, {}, "needs automatic optimization"),
        (Plain, {"student": "model"}, r"student must be the path .* got 'model': try \['net'\]"),
        (Plain, {"student": ""}, "student must be the path"),
        (Plain, {"teacher": nn.Linear(8, 5)}, r"logits of student and teacher must have one shape, got \(8, 4\) and"),
        (Plain, {"student": "net.9"}, r"got 'net.9': try \['net.0', 'net.2', 'net.4'\]"),
        (Plain, {"student": None}, r"got None: try \['net'\]"),
        (
            Plain,
            {"teacher": nn.Linear(9, 4)},
            r"teacher must take the student's inputs, \['Tensor \(8, 8\)'\], got Linear",
        ),
        (Plain, {"features": ["9"], **ONE}, r"got '9', which the student lacks: it has \['0', '2', '4'\]"),
        (Plain, {"features": ["2"], **ONE, "teacher": nn.Linear(8, 4)}, "got '2', which the teacher lacks: it has no"),
        (Plain, {"features": ["0"], **ONE, "teacher": NARROW}, r"features '0' of .* got \(8, 16\) and \(8, 5\): leave"),
        (Plain, {"dim": 5}, r"dim must be one of logits \(8, 4\), got 5"),
        (Elsewhere, {}, "student 'net' must run in training_step"),
    ],
)
def test_what_cannot_be_is_said(make, settings, message):
    with pytest.raises(ValueError, match=message):
        fit(module(make), [lq.SelfDistillation(**{"student": "net", **settings})], loader())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": -1}, "weight must be finite and not negative, got -1"),
        ({"weight": float("inf")}, "weight must be finite and not negative, got inf"),
        ({"weight": "1"}, "weight must be a number and be finite and not negative, got '1'"),
        ({"task_weight": -1}, "task_weight must be finite and not negative, got -1"),
        ({"features": 3, "feature_weight": 1.0}, "features must be a list of paths, got 3"),
        ({"features": "layer1"}, r'features must be a list of paths, got .layer1.: write features=\["layer1"\]'),
        ({"weight": 0, "task_weight": 0}, "weight and task_weight must not both be 0"),
        ({"temperature": 0}, "temperature must be positive, got 0"),
        ({"temperature": float("inf")}, "temperature must be positive, got inf"),
        ({"temperature": "4"}, "temperature must be a number and be positive, got '4'"),
        ({"features": [1], "feature_weight": 1.0}, r"features must be a list of paths, got \[1\]"),
        ({"logits": 3}, "logits must be a function or None, got 3"),
        ({"dim": "classes"}, "dim must be an integer, got 'classes'"),
        ({"features": ["1"]}, "features and feature_weight belong together"),
        ({"feature_weight": 1.0}, "features and feature_weight belong together"),
        ({"teacher": "resnet56.ckpt"}, "teacher must be a network .* got 'resnet56.ckpt'"),
    ],
)
def test_bad_settings_are_refused_at_once(settings, message):
    with pytest.raises((ValueError, TypeError), match=message):
        lq.SelfDistillation("net", **settings)


def test_a_teacher_that_adds_nothing_is_said_to():
    with pytest.warns(UserWarning, match="weight=0 without features adds nothing to the loss"):
        fit(module(), [lq.SelfDistillation("net", weight=0)])


def test_features_can_be_learned_from_a_teacher_of_other_classes():
    torch.manual_seed(1)
    teacher = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 7))
    features = {"features": ["1"], "feature_weight": 1.0, "teacher": teacher}
    trainer = fit(module(), [lq.LearnedQuantization(**QUANTIZATION), lq.SelfDistillation("net", weight=0, **features)])
    assert trainer.callback_metrics["lq/distillation_loss"] > 0
    with pytest.raises(ValueError, match=r"logits of student and teacher must have one shape, got \(8, 4\) and"):
        fit(module(), [lq.LearnedQuantization(**QUANTIZATION), lq.SelfDistillation("net", **features)])


class Looks(Plain):
    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            self.net(batch[0] + 1)
        return super().training_step(batch, batch_idx)


def test_a_look_without_gradients_is_no_part_of_the_loss():
    losses = []
    for kind in (Plain, Looks):
        trainer = fit(module(kind), [lq.LearnedQuantization(**SMOOTH), lq.SelfDistillation("net")])
        losses.append(float(trainer.callback_metrics["lq/distillation_loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_losses_are_smooth_and_zero_for_equals():
    z = torch.randn(4, 5, dtype=torch.float64)
    assert distillation_loss(z, z, temperature=2.0) == pytest.approx(0.0, abs=1e-6)
    assert feature_loss(z, z) == 0
    grid = torch.randn(2, 5, 3, 3)
    rows = grid.permute(0, 2, 3, 1).reshape(-1, 5)
    torch.testing.assert_close(
        distillation_loss(grid, grid.flip(1)), distillation_loss(rows, rows.flip(1)), atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize("order", [1, -1])
def test_the_float_copy_is_that_of_the_float_network_whatever_weights_a_quantizer_begins_with(order):
    plain, before = module(), copy.deepcopy(module().net.state_dict())
    bounded = {"quantizer": "a2q_plus", "granularity": "channel", "accumulator_bits": 8, "first_last_bits": None}
    distillation = lq.SelfDistillation("net")
    quantization = lq.LearnedQuantization(**bounded)
    moved = []

    class Look(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 0:
                moved.append(not torch.equal(pl_module.net[0].weight, before["0.weight"]))

    fit(plain, [*[distillation, quantization][::order], Look()], loader())
    assert moved == [True]
    for name, value in distillation.teacher.state_dict().items():
        assert torch.equal(value, before[name])


class Parts(nn.Module):
    """One part of it never runs, one returns a tuple."""

    def __init__(self):
        super().__init__()
        self.first, self.pair, self.unused, self.last = nn.Linear(8, 8), Pair(), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.last(self.pair(self.first(x))[0].relu())


class Pair(nn.Module):
    def forward(self, x):
        return x, x


@pytest.mark.parametrize(
    ("path", "message"), [("unused", "'unused', which did not run"), ("pair", "'pair', which returned tuple")]
)
def test_parts_without_a_feature_are_refused(path, message):
    with pytest.raises(ValueError, match=message):
        fit(Plain(Parts()), [lq.SelfDistillation("net", features=[path], feature_weight=1.0)], loader())


def test_a_quantized_teacher_teaches_as_it_is():
    teacher = mlp()
    lq.quantize_model(teacher, lq.QuantSpec(bits=2))
    lq.calibrate(teacher, [torch.randn(16, 8)])
    distillation = lq.SelfDistillation("net", teacher=teacher)
    fit(module(), [distillation, lq.LearnedQuantization(**QUANTIZATION)], loader())
    x = torch.randn(4, 8)
    assert named_quantized_layers(distillation.teacher)
    assert torch.equal(distillation.teacher(x), teacher.eval()(x))
