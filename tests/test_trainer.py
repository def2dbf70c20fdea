"""EmaTrainerMixin with Hugging Face's Trainer."""

from __future__ import annotations

import copy
import warnings

import pages
import pytest
import torch
from pages import one_thread  # noqa: F401
from torch import nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers", minversion="5")
    pytest.importorskip("accelerate")
    from accelerate.optimizer import AcceleratedOptimizer
    from safetensors.torch import load_file
    from transformers import PreTrainedConfig, PreTrainedModel, Trainer, TrainingArguments

    from fused_ema.integrations.transformers import EmaTrainerMixin, optimizer_cls_and_kwargs

from fused_ema import FusedEMA, FusedScaledAdamW, FusedScaledSGD, ProgressiveScaling

pytestmark = pytest.mark.filterwarnings("ignore")
DECAY = 0.8


class TinyConfig(PreTrainedConfig):
    model_type = "tiny"


class Tiny(PreTrainedModel):
    """Records the weights that it is evaluated with."""

    config_class = TinyConfig

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.first, self.norm, self.last = nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 1)
        self.seen: list[dict] = []
        self.post_init()

    def forward(self, x, labels=None):
        if not self.training:
            self.seen.append(copy.deepcopy(self.state_dict()))
        logits = self.last(self.norm(self.first(x)).tanh())
        return {"loss": (logits[:, 0] - labels).square().mean(), "logits": logits}


def made(seed: int = 0) -> Tiny:
    torch.manual_seed(seed)
    return Tiny(TinyConfig())


class Data(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict:
        x = torch.randn(4, generator=torch.Generator().manual_seed(index))
        return {"x": x, "labels": x.prod()}


class EmaTrainer(EmaTrainerMixin, Trainer):
    pass


def arguments(folder, **changed) -> TrainingArguments:
    given = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "num_train_epochs": 3,
        "per_device_train_batch_size": 8,
        "learning_rate": 0.05,
        "weight_decay": 0.1,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**{**given, **changed})


def trainer(folder, model=None, *, kind=EmaTrainer, optimizer=FusedScaledAdamW, **changed):
    args = arguments(folder, **changed)
    return kind(
        model=model or made(),
        args=args,
        train_dataset=Data(),
        eval_dataset=Data(),
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(args, optimizer, ema_decay=DECAY),
    )


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def differ(found: dict, other: dict) -> bool:
    return not torch.equal(found["first.weight"], other["first.weight"])


def test_evaluation_and_prediction_use_the_average(tmp_path):
    model = made()
    train = trainer(tmp_path, model)
    train.evaluate()
    assert_same(model.seen[-1], model.state_dict())
    train.train()
    average = train.ema_optimizer().ema_state_dict(model)
    assert_same(model.seen[-1], average)
    assert differ(average, model.state_dict())
    weights = copy.deepcopy(model.state_dict())
    for evaluate in (train.evaluate, lambda: train.predict(Data())):
        evaluate()
        assert_same(model.seen[-1], average)
        assert_same(model.state_dict(), weights)
    train.save_model(str(tmp_path / "out"))
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), average)
    assert not (tmp_path / "out" / "training_weights").exists()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_it_trains_as_trainers_own_adamw(accumulation, tmp_path):
    ours, theirs = made(), made()
    options = {"gradient_accumulation_steps": accumulation, "max_grad_norm": 0.3}
    train = trainer(tmp_path / "ours", ours, **options)
    train.train()
    args = arguments(tmp_path / "theirs", **options)
    Trainer(theirs, args, train_dataset=Data(), eval_dataset=Data()).train()
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-4, atol=1e-5)
    groups = train.ema_optimizer().param_groups
    assert [len(group["params"]) for group in groups] == [2, 4]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]


def test_the_best_model_is_what_was_ranked(tmp_path):
    model = made()
    options = {"load_best_model_at_end": True, "metric_for_best_model": "loss"}
    train = trainer(tmp_path, model, **options, greater_is_better=True)
    train.train()
    losses = [entry["eval_loss"] for entry in train.state.log_history if "eval_loss" in entry]
    ranked = model.seen[4 * losses.index(max(losses))]
    best = train.state.best_model_checkpoint
    assert_same(load_file(f"{best}/model.safetensors"), ranked)
    assert_same(Tiny.from_pretrained(best).state_dict(), ranked)
    assert differ(load_file(f"{best}/training_weights/model.safetensors"), ranked)
    assert_same(model.state_dict(), ranked)
    assert train.evaluate()["eval_loss"] == max(losses)
    assert_same(model.seen[-1], ranked)
    train.save_model(str(tmp_path / "out"))
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), ranked)


def test_a_run_goes_on_bit_for_bit(tmp_path):
    whole, resumed = made(), made(1)
    trainer(tmp_path, whole).train()
    again = trainer(tmp_path, resumed)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_same(resumed.state_dict(), whole.state_dict())
    for found, expected in zip(resumed.seen, whole.seen[4:], strict=True):
        assert_same(found, expected)
    plain = trainer(tmp_path / "plain", made(), kind=Trainer, eval_strategy="no")
    plain.train()
    from_plain = trainer(tmp_path, made(1))
    from_plain.train(resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-4"))
    assert_same(from_plain.model.state_dict(), whole.state_dict())


def test_the_prepared_optimizer_acts(tmp_path):
    train = trainer(tmp_path, optimizer=FusedScaledSGD)
    train.train()
    prepared, inner = train.optimizer, train.ema_optimizer()
    assert isinstance(prepared, AcceleratedOptimizer)
    assert type(inner) is FusedScaledSGD
    prepared.kappa = 4.0
    assert inner.kappa == 4.0
    ProgressiveScaling(prepared, 8, {0: 16})
    assert inner.kappa == 2.0
    assert_same(prepared.ema_state_dict(train.model), inner.ema_state_dict(train.model))


def test_a_teacher_is_paired_by_name(tmp_path):
    model, teacher = made(), made(1)
    args = arguments(tmp_path)
    chosen = optimizer_cls_and_kwargs(args, model=model, teacher=teacher, ema_decay=DECAY)
    for kind in (EmaTrainer, Trainer):
        train = kind(
            model, args, train_dataset=Data(), eval_dataset=Data(), optimizer_cls_and_kwargs=chosen
        )
        before = copy.deepcopy(teacher.state_dict())
        train.train()
        assert differ(teacher.state_dict(), before)
        assert train.optimizer.optimizer.state[model.last.weight]["ema"] is teacher.last.weight


def test_the_average_of_another_optimizer(tmp_path):
    class Following(EmaTrainer):
        follower = None

        def create_optimizer(self, model=None):
            made = super().create_optimizer(model)
            if self.follower is None:
                self.follower = FusedEMA(self.optimizer, ema_decay=DECAY, model=self.model)
            return made

        def ema_optimizer(self):
            return self.follower

    model, args = made(), arguments(tmp_path)
    train = Following(model, args, train_dataset=Data(), eval_dataset=Data())
    train.train()
    assert_same(model.seen[-1], train.follower.ema_state_dict(model))
    assert differ(model.seen[-1], model.state_dict())


def test_the_page_and_the_example_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pages.run_page("frameworks/trainer.md")
    pages.run_example("train_trainer.py", monkeypatch)
    assert "accuracy of the best average" in capsys.readouterr().out
