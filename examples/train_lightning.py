"""Lightning: train with an average, validate with it, and load it from a checkpoint."""

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from fused_ema import FusedScaledAdamW
from fused_ema.integrations.lightning import EMACallback


class Classifier(pl.LightningModule):
    """Two classes, inside and outside of a circle."""

    def __init__(self, lr: float = 0.01, ema_decay: float = 0.99, kappa: float = 1.0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(2, 32),
            torch.nn.BatchNorm1d(32),
            torch.nn.ReLU(),
            torch.nn.Linear(32, 2),
        )

    def training_step(self, batch, batch_idx):
        x, y = batch
        return torch.nn.functional.cross_entropy(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("accuracy", (self.net(x).argmax(1) == y).float().mean())

    def configure_optimizers(self):
        return FusedScaledAdamW(
            self.parameters(),
            lr=self.hparams.lr,
            ema_decay=self.hparams.ema_decay,
            kappa=self.hparams.kappa,
            model=self,
        )


def loader(samples: int, seed: int) -> DataLoader:
    x = torch.randn(samples, 2, generator=torch.Generator().manual_seed(seed))
    return DataLoader(TensorDataset(x, (x.norm(dim=1) > 1.2).long()), batch_size=64, shuffle=True)


if __name__ == "__main__":
    best = ModelCheckpoint("build/lightning", monitor="accuracy", mode="max")
    trainer = pl.Trainer(
        max_epochs=5, accelerator="cpu", logger=False, callbacks=[EMACallback(), best]
    )
    trainer.fit(Classifier(), loader(2048, 0), loader(512, 1))
    model = Classifier.load_from_checkpoint(best.best_model_path, weights_only=False)  # the average
    accuracy = trainer.validate(model, loader(512, 1))[0]["accuracy"]
    print(f"the best average: {accuracy:.3f}")
