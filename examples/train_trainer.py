"""Hugging Face Trainer: evaluate and save the average, and end with the best one."""

import torch
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from fused_ema.integrations.transformers import EmaTrainerMixin, optimizer_cls_and_kwargs


class EmaTrainer(EmaTrainerMixin, Trainer):
    """Trainer with the average."""


class Questions(Dataset):
    """Is token 7 among the 12 tokens?"""

    def __init__(self, samples: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(8, 32, (samples, 12), generator=generator)
        self.labels = torch.arange(samples) % 2
        self.tokens[self.labels == 1, 5] = 7

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict:
        return {"input_ids": self.tokens[i], "labels": self.labels[i]}


def accuracy(prediction) -> dict:
    return {"accuracy": float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}


if __name__ == "__main__":
    args = TrainingArguments(
        "build/trainer",
        use_cpu=True,
        report_to=[],
        learning_rate=3e-3,
        per_device_train_batch_size=32,
        num_train_epochs=4,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
    )
    sizes = {"hidden_size": 32, "intermediate_size": 64}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertForSequenceClassification(BertConfig(vocab_size=32, **sizes, **layers))
    trainer = EmaTrainer(
        model,
        args,
        train_dataset=Questions(512, 0),
        eval_dataset=Questions(128, 1),
        compute_metrics=accuracy,
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(args, ema_decay=0.9, kappa=1),
    )
    trainer.train()
    print(f"accuracy of the best average: {trainer.evaluate()['eval_accuracy']:.2f}")
