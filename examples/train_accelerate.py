"""accelerate: accumulation, a batch size that grows, and evaluation with the average."""

import torch
from torch.utils.data import DataLoader, TensorDataset

from fused_ema import FusedScaledAdamW, ProgressiveScaling
from fused_ema.integrations.accelerate import Accelerator

BASE = 32  # the batch size for which lr and ema_decay are given


def data(samples: int, seed: int) -> TensorDataset:
    x = torch.randn(samples, 2, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, x.prod(1, keepdim=True))


if __name__ == "__main__":
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = torch.nn.Sequential(torch.nn.Linear(2, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
    opt = FusedScaledAdamW(model.parameters(), lr=0.01, ema_decay=0.99, model=model)
    model, opt = accelerator.prepare(model, opt)
    growing = ProgressiveScaling(opt, BASE, {0: 32, 4: 128})
    for _ in range(8):
        size = int(growing.batch_size) // accelerator.gradient_accumulation_steps
        loader = accelerator.prepare(DataLoader(data(2048, 0), batch_size=size, shuffle=True))
        for x, y in loader:
            with accelerator.accumulate(model):
                loss = (model(x) - y).square().mean()
                accelerator.backward(loss)
                opt.step()
                opt.zero_grad()
        growing.step()
    x, y = data(512, 1).tensors
    with opt.ema_weights(), torch.no_grad():
        error = (model(x) - y).square().mean().item()
    print(f"kappa {opt.kappa}, error of the average: {error:.4f}")
    accelerator.save_state("build/accelerate")  # the average is in the optimizer's state
