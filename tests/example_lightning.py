"""A LightningModule with a regularizer: manual optimization, checkpoints and resumption as usual.

    pip install pytorch-lightning
    python tests/example_lightning.py

Lightning's automatic optimization calls ``backward`` itself, which a regularizer must do, so it is switched off.
``self.optimizers()`` hands the closure on to `step` and counts the step, on which checkpoints and ``max_steps``
rely (``use_pl_optimizer=False`` does not count). Clip with the regularizer's ``clip_norm``; for half precision
take ``precision="bf16-mixed"``, as "16-mixed" has a GradScaler of its own.
"""

from __future__ import annotations

import pytorch_lightning as lightning
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hessdiag.integrations.lightning import SharpnessCallback
from hessdiag.regularizers import NSO
from hessdiag.sources.datasets import digits


class Digits(lightning.LightningModule):
    """A perceptron on the embedded digits, trained by noise stability optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10)
        )

    def configure_optimizers(self) -> NSO:
        return NSO(torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9), sigma=0.02)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        x, y = batch
        loss = self.optimizers().step(lambda: F.cross_entropy(self.model(x), y))
        self.log("loss", loss, on_step=False, on_epoch=True)

    def hessdiag_loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(self.model(batch[0]), batch[1])  # what SharpnessCallback measures

    def test_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        x, y = batch
        self.log("accuracy", (self.model(x).argmax(1) == y).float().mean())


def loader(split: int) -> DataLoader:
    """Batches of the training digits (0) or all test digits (1), always in the same order."""
    return DataLoader(digits()[split], batch_size=(128, 360)[split])


if __name__ == "__main__":
    trainer = lightning.Trainer(max_epochs=5, accelerator="cpu", callbacks=[SharpnessCallback(every=20)])
    module = Digits()
    trainer.fit(module, loader(0))
    trainer.test(module, loader(1))
