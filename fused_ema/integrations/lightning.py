"""Lightning: validation, test, prediction and checkpoints with the average."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from .. import FusedEMA, FusedScaledOptimizer, load_ema
from ..ema.decay import EmaDecay
from ..sharding import is_sharded
from ..wrapped import unwrapped

# Where Lightning's WeightAveraging saves the weights, and the state of its average.
WEIGHTS = "current_model_state"
AVERAGING = "averaging_state"


class EMACallback(Callback):
    """Validates, tests and predicts with the average, and saves it as the checkpoint's model.

    The averages are those of the module's optimizers (``ema_decay=`` there); any number of
    optimizers may have one. With ``ema_decay`` here, a :class:`~fused_ema.FusedEMA` averages the
    parameters of every other optimizer.

    The weights hold the average from the start of a validation, test or prediction to its end, or
    until an exception. A checkpoint holds the average as ``state_dict`` and the weights as
    ``current_model_state``, like those of Lightning's ``WeightAveraging``, so that
    ``load_from_checkpoint`` gives the average and ``fit(ckpt_path=...)`` continues from the
    weights. ``fit`` also continues from a checkpoint of ``WeightAveraging``. A distributed
    checkpoint (FSDP2's default) keeps the weights as ``state_dict``; the average is in the
    optimizer's state there. With ``ModelCheckpoint(save_weights_only=True)`` Lightning calls no
    callback, and saves the weights.

    After ``test(ckpt_path=...)`` and the like, the module holds the checkpoint's average itself,
    and nothing is put in its place until the next ``fit``.

    Args:
        every_n_epochs: an int ``>= 1``: during ``fit``, the validation after every so many epochs
            uses the average, the others the weights. Give ``ModelCheckpoint`` the same number, so
            that it ranks averages alone.
        ema_decay: None, or a decay for optimizers without averages of their own.
        options: other arguments of their :class:`~fused_ema.FusedEMA`, such as ``kappa``.

    Raises:
        ValueError: ``every_n_epochs`` is out of range; at the start of ``fit``: no optimizer has
            an average.
    """

    def __init__(self, every_n_epochs: int = 1, ema_decay: EmaDecay = None, **options: Any) -> None:
        if not isinstance(every_n_epochs, int) or every_n_epochs < 1:
            raise ValueError(
                f"every_n_epochs={every_n_epochs!r} is out of range; allowed: an int >= 1"
            )
        self.every_n_epochs = every_n_epochs
        self._decay, self._options = ema_decay, options
        self._added: list[FusedEMA] = []
        self._open = ExitStack()
        self._resumed: dict[str, Any] = {}
        self._replaced = False

    def averages(self, trainer: Trainer, module: LightningModule) -> list[FusedScaledOptimizer]:
        """The optimizers and ``FusedEMA`` that hold averages of the module's parameters."""
        params = set(module.parameters())
        return [
            optimizer
            for optimizer in (*map(unwrapped, trainer.optimizers), *self._added)
            if isinstance(optimizer, FusedScaledOptimizer)
            and optimizer._averaged_groups()
            and not params.isdisjoint(optimizer._params())
        ]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the averages that the optimizers lack."""
        optimizers = [o for o in map(unwrapped, trainer.optimizers) if _params(o)]
        if self._decay is not None:
            self._added = [
                FusedEMA(optimizer, self._decay, model=pl_module, **self._options)
                for optimizer in optimizers
                if not isinstance(optimizer, FusedScaledOptimizer)
            ]
        self._replaced = False
        if optimizers and not self.averages(trainer, pl_module):
            raise ValueError(
                "EMACallback: no optimizer has an average; pass ema_decay= to an optimizer of "
                "fused_ema, or to EMACallback"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore averages that are not part of an optimizer's state."""
        resumed, self._resumed = self._resumed, {}
        for average, state in zip(self._added, resumed.get("averages", ()), strict=False):
            average.load_state_dict(state)
        if AVERAGING in resumed:
            for optimizer in self.averages(trainer, pl_module):
                load_ema(optimizer, pl_module, resumed["state_dict"])

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the average into the weights, at every ``every_n_epochs``-th epoch of a fit."""
        fitting = trainer.state.fn == TrainerFn.FITTING
        if not fitting or (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._enter(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the average into the weights."""
        self._enter(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the average into the weights."""
        self._enter(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the weights."""
        self._open.close()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the weights."""
        self._open.close()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the weights."""
        self._open.close()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Restore the weights."""
        self._open.close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the weights."""
        self._open.close()

    def state_dict(self) -> dict[str, Any]:
        """Return the averages that are not part of an optimizer's state."""
        return {"averages": [average.state_dict() for average in self._added]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the averages until ``fit`` has made their optimizers."""
        self._resumed = state_dict

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Replace the weights by the average, and keep the weights beside it."""
        weights = checkpoint["state_dict"]
        averages = self.averages(trainer, pl_module)
        if not averages or self._replaced or any(map(is_sharded, weights.values())):
            return
        with ExitStack() as stack:
            for average in averages:
                stack.enter_context(average.ema_weights(model=pl_module))
            shown = trainer.strategy.lightning_module_state_dict()
            checkpoint["state_dict"] = {name: _copied(value) for name, value in shown.items()}
        checkpoint[WEIGHTS] = weights
        checkpoint[AVERAGING] = {"n_averaged": torch.tensor(trainer.global_step)}

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Continue a fit from the weights; elsewhere, keep the checkpoint's average."""
        if trainer.state.fn != TrainerFn.FITTING:
            self._replaced = True
        elif WEIGHTS in checkpoint:
            if self.state_key not in checkpoint.get("callbacks", {}):  # of WeightAveraging
                self._resumed = {name: checkpoint[name] for name in ("state_dict", AVERAGING)}
            _load_weights(trainer, pl_module, checkpoint[WEIGHTS])

    def _enter(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._replaced:
            for average in self.averages(trainer, pl_module):
                self._open.enter_context(average.ema_weights(model=pl_module))


def _params(optimizer: Any) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group.get("params", ())]


def _copied(value: Any) -> Any:
    """A copy of an entry of a state dict, on the CPU, which a GPU may have no memory for."""
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else copy.copy(value)


def _load_weights(trainer: Trainer, module: LightningModule, weights: Mapping[str, Any]) -> None:
    strict = module.strict_loading
    if any(map(is_sharded, module.parameters())):  # the strategy would load nothing
        options = StateDictOptions(full_state_dict=True, strict=strict)
        set_model_state_dict(module, dict(weights), options=options)
    else:
        trainer.strategy.load_model_state_dict({"state_dict": weights}, strict=strict)
