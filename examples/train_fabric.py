"""Lightning Fabric: evaluation with the average, through the optimizer that setup() returns."""

import torch
from lightning.fabric import Fabric
from torch.utils.data import DataLoader, TensorDataset

from fused_ema import FusedScaledAdamW


def data(samples: int, seed: int) -> TensorDataset:
    x = torch.randn(samples, 2, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, x.prod(1, keepdim=True))


if __name__ == "__main__":
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    fabric.seed_everything(0, verbose=False)
    net = torch.nn.Sequential(torch.nn.Linear(2, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
    model, opt = fabric.setup(
        net, FusedScaledAdamW(net.parameters(), lr=0.01, ema_decay=0.99, model=net)
    )
    loader = fabric.setup_dataloaders(DataLoader(data(2048, 0), batch_size=32, shuffle=True))
    for _ in range(5):
        for x, y in loader:
            opt.zero_grad()
            fabric.backward((model(x) - y).square().mean())
            fabric.clip_gradients(model, opt, max_norm=1.0)
            opt.step()
    x, y = data(512, 1).tensors
    with opt.ema_weights(), torch.no_grad():
        error = (model(x) - y).square().mean().item()
    print(f"error of the average: {error:.4f}")
    fabric.save("build/fabric.pt", {"model": model, "opt": opt, "ema": opt.ema_state_dict(net)})
