"""Hugging Face Trainer: its optimizer, and evaluation and saving with the average."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn
from transformers import TrainingArguments

from .. import FusedScaledAdam, FusedScaledAdamW, FusedScaledOptimizer
from ..wrapped import unwrapped
from .accelerate import reachable

# The folder of a checkpoint that holds the weights; the checkpoint's model is the average.
WEIGHTS = "training_weights"


def optimizer_cls_and_kwargs(
    args: TrainingArguments,
    optimizer: type[FusedScaledOptimizer] = FusedScaledAdamW,
    *,
    model: nn.Module | None = None,
    **options: Any,
) -> tuple[type[FusedScaledOptimizer], dict[str, Any]]:
    """Return ``Trainer``'s argument ``optimizer_cls_and_kwargs``.

    Learning rate, betas and eps are those of ``args``; ``Trainer`` makes its two groups, with and
    without ``args.weight_decay``.

    Args:
        args: the training arguments.
        optimizer: a class of fused optimizers.
        model: the model, where :class:`EmaTrainerMixin` does not name it: a plain ``Trainer``, or
            with ``teacher=``, which is paired by name.
        options: other arguments of the optimizer, such as ``ema_decay`` and ``kappa``.
    """
    kwargs: dict[str, Any] = {"lr": args.learning_rate}
    if issubclass(optimizer, FusedScaledAdam):
        kwargs |= {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    made = optimizer if model is None else _with_model(optimizer, model)
    return made, kwargs | options


def _with_model(optimizer: type[FusedScaledOptimizer], model: nn.Module) -> Any:
    """A class with ``model=``, because ``Trainer`` would take that out of the kwargs."""

    def make(self: Any, params: Any, **kwargs: Any) -> None:
        optimizer.__init__(self, params, model=model, **kwargs)

    return type(optimizer.__name__, (optimizer,), {"__init__": make})


class EmaTrainerMixin:
    """Evaluates, predicts and saves with the average.

    Use it as ``class EmaTrainer(EmaTrainerMixin, Trainer): ...``. The model that a checkpoint holds
    is the average, so that ``from_pretrained`` and ``load_best_model_at_end`` give what was
    evaluated. The weights are in its folder ``training_weights``, from which
    ``train(resume_from_checkpoint=...)`` continues. The optimizer learns the model's names and
    buffers if it was made without ``model=``, and ``trainer.optimizer`` reaches it through
    accelerate's wrapper.

    After ``load_best_model_at_end`` the model is the best average itself, and nothing is put in its
    place until the next ``train()``. With FSDP, checkpoints keep the weights, and
    ``load_best_model_at_end`` raises ValueError.
    """

    _holds_best = False

    def ema_optimizer(self) -> FusedScaledOptimizer | None:
        """The optimizer with the average; override it to return a ``FusedEMA`` of your own."""
        optimizer = unwrapped(getattr(self, "optimizer", None))
        if isinstance(optimizer, FusedScaledOptimizer) and optimizer._averaged_groups():
            return optimizer
        return None

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """Make the optimizer, as ``Trainer`` does, and let it know the model."""
        trainer: Any = self
        if trainer.is_fsdp_enabled and trainer.args.load_best_model_at_end:
            raise ValueError(
                "load_best_model_at_end=True with FSDP, whose checkpoints keep the weights; "
                "allowed: False"
            )
        made = super().create_optimizer(model)  # type: ignore[misc]
        optimizer = self.ema_optimizer()
        if optimizer is not None and optimizer._buffers is None:
            optimizer.attach_model(trainer.model if model is None else model)
        self._holds_best = False
        return made

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """Make the scheduler, and the prepared optimizer reachable."""
        reachable(getattr(self, "optimizer", None))
        return super().create_scheduler(*args, **kwargs)  # type: ignore[misc]

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate or predict with the average."""
        with self._average():
            return super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the average as the model, and a checkpoint's weights beside it."""
        trainer: Any = self
        average = self._average()
        is_checkpoint = _internal_call and output_dir is not None and not trainer.is_fsdp_enabled
        if is_checkpoint and not isinstance(average, nullcontext):
            folder = os.path.join(str(output_dir), WEIGHTS)
            super().save_model(folder, _internal_call=True)  # type: ignore[misc]
        with average:
            super().save_model(output_dir, _internal_call)  # type: ignore[misc]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        weights = os.path.join(resume_from_checkpoint, WEIGHTS)
        source = weights if os.path.isdir(weights) else resume_from_checkpoint
        super()._load_from_checkpoint(source, *args, **kwargs)  # type: ignore[misc]

    def _load_best_model(self) -> None:
        super()._load_best_model()  # type: ignore[misc]
        self._holds_best = True

    def _average(self) -> AbstractContextManager[Any]:
        optimizer = self.ema_optimizer()
        if optimizer is None or self._holds_best or optimizer._swap_flag.swapped:
            return nullcontext()
        trainer: Any = self
        return optimizer.ema_weights(model=trainer.model)
