"""One of two processes, started by test_lightning_processes.py: EMACallback with strategies."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

warnings.simplefilter("ignore")

import lightning.pytorch as pl  # noqa: E402
import torch  # noqa: E402
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy  # noqa: E402
from torch import nn  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

from fused_ema import FusedScaledAdamW  # noqa: E402
from fused_ema.integrations.lightning import EMACallback  # noqa: E402
from fused_ema.sharding import is_sharded  # noqa: E402

DECAY = 0.8


def whole(value):
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def copied(state: dict) -> dict:
    return {name: whole(value).clone() for name, value in state.items()}


class Net(pl.LightningModule):
    """Keeps the parameters that each validation saw, and those at the start of training."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))
        self.seen: list[dict] = []
        self.start: dict = {}

    def configure_model(self):
        again = is_sharded(self.net[0].weight)  # Lightning calls this for validate() too
        if isinstance(self.trainer.strategy, ModelParallelStrategy) and not again:
            fully_shard(self.net[0], mesh=self.device_mesh["data_parallel"])
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def on_train_start(self):
        self.start = copied(self.net.state_dict())

    def loss(self, batch):
        return (self.net(batch) - batch.prod(1, keepdim=True)).square().mean()

    def training_step(self, batch, _):
        return self.loss(batch)

    def validation_step(self, batch, _):
        self.seen.append(copied(self.net.state_dict()))
        self.log("val", self.loss(batch), sync_dist=True)

    def configure_optimizers(self):
        return FusedScaledAdamW(self.parameters(), lr=0.02, ema_decay=DECAY, model=self)


def batches(count: int, seed: int) -> DataLoader:
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(torch.randn(8 * count, 4, generator=generator), batch_size=4)


def strategy(name: str):
    if name == "ddp":
        return DDPStrategy(process_group_backend="gloo")
    return ModelParallelStrategy(
        data_parallel_size=2,
        tensor_parallel_size=1,
        process_group_backend="gloo",
        save_distributed_checkpoint=name == "dcp",
    )


def fit(name: str, folder: Path, epochs: int, ckpt_path=None):
    module = Net()
    trainer = pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        devices=2,
        strategy=strategy(name),
        max_epochs=epochs,
        callbacks=[EMACallback(), ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, batches(3, 1), batches(1, 2), ckpt_path=ckpt_path, weights_only=False)
    return module, trainer


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(whole(found[key]), whole(value)), key


def main(name: str, folder: Path) -> None:
    module, trainer = fit(name, folder / "whole", 3)
    (opt,) = trainer.optimizers
    assert is_sharded(module.net[0].weight) == (name != "ddp")
    average = copied(opt.ema_state_dict(module.net))
    assert_same(module.seen[-1], average)
    weights = copied(module.net.state_dict())
    assert not torch.equal(weights["0.weight"], average["0.weight"])

    path = folder / "whole" / "epoch=1.ckpt"
    if name != "dcp":  # a file, whose model is the average
        saved = torch.load(path, weights_only=False)["state_dict"]
        saved = {key.removeprefix("net."): value for key, value in saved.items()}
        assert_same(saved, module.seen[1])
    resumed, _ = fit(name, folder / "resumed", 3, ckpt_path=path)
    assert_same(resumed.net.state_dict(), weights)
    assert_same(resumed.seen[-1], average)
    assert len(resumed.seen) == 1
    assert not torch.equal(resumed.start["0.weight"], module.seen[1]["0.weight"])  # the weights
    trainer.validate(module, batches(1, 2), verbose=False)
    assert_same(module.seen[-1], average)
    assert_same(module.net.state_dict(), weights)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[2:]:
        main(name, Path(sys.argv[1]) / name)
        (Path(sys.argv[1]) / f"{name}-{os.environ['RANK']}").touch()
