"""LightningModules and data modules as people write them, tiny; and checkpoints of Lightning's trainer."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytorch_lightning as lightning
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

ROWS, CLASSES = 24, 3


def rows(seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(ROWS, 4, generator=generator)
    return TensorDataset(inputs, torch.randint(CLASSES, (ROWS,), generator=generator))


class Plain(lightning.LightningModule):
    """With what a step usually does beside its loss: log, print, ask the logger, count its accuracy."""

    def __init__(self, width: int = 5, lr: float = 0.25) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, CLASSES))
        self.accuracy = MulticlassAccuracy(CLASSES)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        scores = self(x)
        loss = F.cross_entropy(scores, y)
        self.accuracy(scores, y)
        self.log("loss", loss, prog_bar=True)
        self.log_dict({"accuracy": self.accuracy, "step": float(self.global_step)})
        if self.logger is not None:
            self.logger.experiment.add_scalar("loss", loss.detach(), self.global_step)
        self.print(end="")
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)


class Needs(Plain):
    """An argument without a default."""

    def __init__(self, width: int, lr: float = 0.25) -> None:
        super().__init__(width, lr)


class Loaders(Plain):
    """Loaders of its own, shuffled; the test data are not there."""

    def train_dataloader(self):
        return DataLoader(self.rows, batch_size=8, shuffle=True)

    def val_dataloader(self):
        return [DataLoader(rows(1), batch_size=8)]

    def test_dataloader(self):
        raise FileNotFoundError("test.csv")

    def setup(self, stage):
        self.rows = rows()


class Dropped(Plain):
    """Dropout and BatchNorm; the step gives a dict."""

    def __init__(self, width: int = 5, lr: float = 0.25) -> None:
        super().__init__(width, lr)
        self.net = nn.Sequential(
            nn.Linear(4, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Dropout(0.5), nn.Linear(width, CLASSES)
        )

    def training_step(self, batch):
        return {"loss": F.cross_entropy(self(batch[0]), batch[1], label_smoothing=0.1), "n": len(batch[0])}


class Bag(lightning.LightningModule):
    """All hyper-parameters in one argument, read by attribute and by key; the net is made late."""

    def __init__(self, config) -> None:
        super().__init__()
        self.save_hyperparameters(config)
        self.width, self.net = config.width, None
        assert config["lr"] == self.hparams.lr

    def configure_model(self):
        if self.net is None:
            self.net = nn.Sequential(nn.Linear(4, self.width), nn.Tanh(), nn.Linear(self.width, CLASSES))

    def training_step(self, batch, *places):
        return F.mse_loss(self.net(batch[0]), F.one_hot(batch[1], CLASSES).float())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)


class Warm(Plain):
    """A penalty that grows with the epoch."""

    def training_step(self, batch, batch_idx):
        penalty = sum(parameter.pow(2).sum() for parameter in self.parameters())
        return F.cross_entropy(self(batch[0]), batch[1]) + 0.01 * (self.current_epoch + 1) * penalty


class Scaled(Plain):
    """What is done to a batch before the step."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch[0] * 0.5 + 0.1, batch[1]

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])


class Outer(Plain):
    """A module of Lightning in another, which asks for its trainer too."""

    def __init__(self, width: int = 5, lr: float = 0.25) -> None:
        super().__init__(width, lr)
        self.net = Plain(width)

    def training_step(self, batch, batch_idx):
        self.net.print(end="")
        return F.cross_entropy(self.net(batch[0]), batch[1]) * (self.net.trainer.world_size + 1)


class Manual(Plain):
    """Optimizes by itself."""

    def __init__(self, width: int = 5, lr: float = 0.25) -> None:
        super().__init__(width, lr)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.optimizers().zero_grad()
        self.manual_backward(loss)
        self.optimizers().step()


class Stated(Manual):
    """Says its loss for hessdiag."""

    def hessdiag_loss(self, batch):
        return F.cross_entropy(self(batch[0]), batch[1])


class Raises(Plain):
    def __init__(self, width: int = 5, lr: float = 0.25) -> None:
        raise RuntimeError("no GPU\nhere")


class Exits(Plain):
    def __init__(self, width: int = 5, lr: float = 0.25) -> None:
        raise SystemExit(0)


class Nothing(Plain):
    def training_step(self, batch, batch_idx):
        return None


class Vector(Plain):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1], reduction="none")


class Asks(Plain):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1]) / self.trainer.max_epochs


class AsksOptimizers(Plain):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1]) * self.optimizers().param_groups[0]["lr"]


class Closed(Plain):
    """Writes to a file that is closed."""

    def __init__(self, width: int = 5, lr: float = 0.25) -> None:
        super().__init__(width, lr)
        with Path(os.devnull).open("w") as self.file:
            pass

    def training_step(self, batch, batch_idx):
        self.file.write("step")
        return F.cross_entropy(self(batch[0]), batch[1])


class Draws(Plain):
    """Noise in evaluation too."""

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0] + torch.randn_like(batch[0])), batch[1])


class Stepless(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, CLASSES)


class Data(lightning.LightningDataModule):
    """Fetches, sets up, and gives loaders."""

    def __init__(self, batch_size: int = 8, seed: int = 0) -> None:
        super().__init__()
        self.save_hyperparameters()

    def prepare_data(self):
        raise ConnectionError("nothing to fetch from")

    def setup(self, stage):
        if stage == "fit":
            self.rows = rows(self.hparams.seed)

    def train_dataloader(self):
        return DataLoader(self.rows, batch_size=self.hparams.batch_size, shuffle=True)

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return batch[0] * 2, batch[1]


class Missing(Data):
    def setup(self, stage):
        raise FileNotFoundError("train.csv")


class Several(Data):
    def train_dataloader(self):
        return [DataLoader(self.rows), DataLoader(self.rows)]


def saved(folder, module, steps: int = 3, data=None, callbacks=(), name: str = "last.ckpt") -> str:
    """The checkpoint of a short training, as the trainer writes it."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of workers, of steps between logs
        trainer = lightning.Trainer(
            max_steps=steps,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=list(callbacks),
            default_root_dir=folder,
        )
        loaders = {"datamodule": data} if data else {"train_dataloaders": DataLoader(rows(), batch_size=8)}
        trainer.fit(module, **loaders)
        trainer.save_checkpoint(folder / name)
    return str(folder / name)
