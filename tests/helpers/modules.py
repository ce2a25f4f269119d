"""Tiny networks and LightningModules that know nothing of lq."""

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

TRAINER = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "num_sanity_val_steps": 0,
}


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


def small_cnn() -> nn.Sequential:
    """Depthwise, grouped, strided and dilated convolutions, batch norm, a linear layer."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=2, dilation=2, groups=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 4),
    )


def loader(batches: int = 12, batch_size: int = 8, shape: tuple[int, ...] = (8,)) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batches * batch_size, *shape, generator=generator)
    classes = torch.randint(4, (batches * batch_size,), generator=generator)
    return DataLoader(TensorDataset(images, classes), batch_size=batch_size)


class Plain(LightningModule):
    """A classifier as any user might write it."""

    def __init__(self, net: nn.Module | None = None, optimizer=None, scheduler=None) -> None:
        super().__init__()
        self.net = net or mlp()
        self.make_optimizer = optimizer or (lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9))
        self.make_scheduler = scheduler

    def forward(self, x):
        return self.net(x)

    def loss(self, batch):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.loss(batch))

    def test_step(self, batch, batch_idx):
        self.log("test/loss", self.loss(batch))

    def configure_optimizers(self):
        optimizer = self.make_optimizer(self.parameters())
        if self.make_scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.make_scheduler(optimizer), "interval": "step"},
        }


class Manual(Plain):
    """The same under manual optimization, accumulating over two batches."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        self.manual_backward(self.loss(batch) / 2)
        if batch_idx % 2:
            optimizer.step()
            optimizer.zero_grad()


def fit(module: LightningModule, callbacks=(), data: DataLoader | None = None, epochs: int = 1, **changes) -> Trainer:
    trainer = Trainer(**{**TRAINER, "max_epochs": epochs, "callbacks": list(callbacks), **changes})
    trainer.fit(module, loader() if data is None else data)
    return trainer


class SmallResidual(nn.Module):
    """Residual, strided, depthwise, pooled twice: everything that integers do."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.depthwise, self.bn2 = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8), nn.BatchNorm2d(8)
        self.point, self.down = nn.Conv2d(8, 12, 1), nn.Conv2d(8, 12, 1, stride=2)
        self.cap, self.relu = nn.ReLU6(), nn.ReLU()
        self.most, self.mean = nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2)
        self.head = nn.Linear(12 * 2 * 2, 5)

    def forward(self, x):
        x = self.relu(self.bn1(self.stem(x)))
        y = self.cap(self.bn2(self.depthwise(x)))
        x = self.relu(self.point(y) + self.down(x))
        return self.head(self.mean(self.most(x)).flatten(1))


def golden_network(width: int = 4) -> nn.Sequential:
    """What the golden artifacts hold: never to be changed."""
    layers = nn.Conv2d(2, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten(), nn.Linear(4 * width, 3)
    return nn.Sequential(*layers)
