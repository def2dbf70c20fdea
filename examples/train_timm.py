"""timm: a model, timm's factory, scheduler and checkpoints, and the average as its EMA model."""

import timm
import torch
from timm import utils
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask

from fused_ema.integrations.timm import FusedModelEma


def batches(count: int, seed: int) -> list:
    """Images whose brighter half is the left one, or the right one."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 16, 3, 16, 16, generator=generator)
    labels = torch.randint(2, (count, 16), generator=generator)
    shade = torch.where(labels == 0, 1.0, -1.0)[:, :, None, None, None]
    images[..., :8] += shade
    images[..., 8:] -= shade
    return list(zip(images, labels, strict=True))


@torch.no_grad()
def accuracy(model: torch.nn.Module) -> float:
    model.eval()
    return sum((model(x).argmax(1) == y).float().mean().item() for x, y in batches(4, 1)) / 4


if __name__ == "__main__":
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=2, img_size=16)
    task = ClassificationTask(model, torch.nn.CrossEntropyLoss(), verbose=False)
    optimizer = create_optimizer_v2(
        model, "fusedadamw", lr=1e-3, weight_decay=0.05, layer_decay=0.8, ema_decay=0.9, kappa=2
    )
    task.trainable_module_ema = FusedModelEma(model, optimizer)  # in place of task.setup_ema(...)
    scheduler, epochs = create_scheduler_v2(optimizer, "cosine", num_epochs=3)
    saver = utils.CheckpointSaver(model, optimizer, checkpoint_dir=".", task=task)
    for epoch in range(epochs):
        task.train()
        for x, y in batches(8, 0):
            optimizer.zero_grad()
            task(x, y)["loss"].backward()
            optimizer.step()  # moves the average, too
        scheduler.step(epoch + 1)
        metric = accuracy(task.get_eval_model(ema=True))
        saver.save_checkpoint(epoch, metric)  # state_dict_ema is the average
        print(f"epoch {epoch}: accuracy {accuracy(model):.2f}, of the average {metric:.2f}")
