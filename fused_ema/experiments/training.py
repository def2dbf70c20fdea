"""Everything in a training loop around the steps: epochs, batches, evaluation, checkpoints."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import nn

from .. import FusedScaledOptimizer, ProgressiveScaling, scale_batchnorm_momentum
from .data import Data, Views, epoch_keys, loader, usable
from .distributed import Group, Place, without_reduction
from .folder import Folder
from .recipe import Recipe

Evaluate = Callable[[], Mapping[str, float]]
MicroBatch = tuple[Views, torch.Tensor]


@dataclass(frozen=True)
class Run:
    """One training of an experiment.

    Attributes:
        kind: its name without the seed; results are averaged over the runs of a kind.
        seed: seed of weights, order of the samples and augmentation.
        kappas: ``kappa`` from each epoch on.
        optimizer: ``"SGD"`` or ``"AdamW"``.
        rule: whether the average that the loss uses follows the EMA rule.
        norm_rule: whether BatchNorm's statistics do.
        centre_rule: whether DINO's centre does.
        pseudo: whether the loss uses pseudo-labels.
    """

    kind: str
    seed: int
    kappas: Mapping[int, float]
    optimizer: str = "SGD"
    rule: bool = True
    norm_rule: bool = True
    centre_rule: bool = True
    pseudo: bool = False

    @property
    def name(self) -> str:
        """The kind and the seed."""
        return f"{self.kind}, seed {self.seed}"


class Session:
    """The trainings of an experiment, one after another, in one folder.

    Args:
        recipe: the options that the trainings share.
        folder: the folder of rows and checkpoints.
        group: the processes that share every batch.
        runs: all trainings, in order.
        data: the samples.

    Raises:
        ValueError: the data or a batch size do not fit; raised before any training.
    """

    def __init__(
        self, recipe: Recipe, folder: Folder, group: Group, runs: Sequence[Run], data: Data
    ) -> None:
        self.recipe, self.folder, self.group, self.runs = recipe, folder, group, runs
        self.place = Place.of(group, recipe.device, recipe.precision)
        self.data = data
        batches = [recipe.batch(kappa) for run in runs for kappa in run.kappas.values()]
        for batch in batches:
            group.share(batch, recipe.per_device_batch)
        self.epoch_size = usable(len(self.data.train), batches)
        self.checkpoint: dict[str, Any] | None = None
        self.stopping = False

    def _take_up(self) -> set[str]:
        """Return the names of the finished runs, and remove rows of steps that are taken again."""
        self.folder.take()
        self.checkpoint = self.folder.checkpoint()
        rows = self.folder.rows()
        if self.checkpoint is not None:
            rows = rows[: self.checkpoint["rows"]]
        else:
            ends = [i for i, row in enumerate(rows) if row.get("finished")]
            rows = rows[: ends[-1] + 1] if ends else []
        finished = {row["run"] for row in rows if row.get("finished")}
        self._check_length(rows, finished)
        self.group.any(False)  # all processes have read before the first one writes
        self.folder.begin(len(rows))
        return finished

    def _check_length(self, rows: Sequence[Mapping[str, Any]], finished: set[str]) -> None:
        """Raise ValueError if runs that have finished saw another number of samples."""
        names = {run.name for run in self.runs} & finished
        seen = max(
            (row["samples"] for row in rows if row["run"] in names and "samples" in row),
            default=None,
        )
        wanted = self.recipe.epochs * self.epoch_size
        if seen is not None and seen != wanted:
            raise ValueError(
                f"--out {self.folder.path}: with these kappas a run sees {wanted} samples, and "
                f"those that have finished saw {seen}; give another folder"
            )

    def rows(self) -> list[dict[str, Any]]:
        """The metrics of this session's runs; the folder may hold others."""
        names = {run.name for run in self.runs}
        return [row for row in self.folder.rows() if row["run"] in names]

    def complete(self, train: Callable[[Any, Run, Session], None]) -> None:
        """Train every run that remains; ``train`` takes the recipe, the run and this session."""
        for run in self.unfinished():
            train(self.recipe, run, self)

    def unfinished(self) -> Iterator[Run]:
        """The runs that remain; meanwhile Ctrl-C waits for the end of the current step."""
        from tqdm import tqdm

        finished = self._take_up() & {run.name for run in self.runs}
        total = len(self.runs) * self.recipe.epochs * self.epoch_size
        done = len(finished) * self.recipe.epochs * self.epoch_size
        bar = tqdm(
            total=total,
            initial=done,
            desc=self.folder.experiment,
            disable=not self.group.is_first,
            mininterval=0.2 if sys.stderr.isatty() else 30.0,
            unit=" samples",
            unit_scale=True,
        )
        with bar as self.bar, stop_signals(self._stop):
            for run in self.runs:
                if run.name not in finished:
                    self.bar.set_postfix_str(run.name, refresh=False)
                    yield run

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.stopping:
            raise KeyboardInterrupt("Stopped at once; the last checkpoint remains.")
        self.stopping = True

    def start(
        self,
        run: Run,
        model: nn.Module,
        optimizer: FusedScaledOptimizer,
        scaling: ProgressiveScaling,
        evaluate: Evaluate,
    ) -> Training:
        """A training at its start, or at its checkpoint."""
        training = Training(self, run, model, optimizer, scaling, evaluate)
        if self.checkpoint is not None and self.checkpoint["run"] == run.name:
            try:
                training.load(self.checkpoint)
            except (KeyError, RuntimeError, ValueError) as error:
                path = self.folder.path / "checkpoint.pt"
                raise ValueError(
                    f"{path} does not fit the run; delete it to start that run again ({error})"
                ) from error
        self.checkpoint = None
        return training


@contextmanager
def stop_signals(stop: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """A context in which ``stop`` handles Ctrl-C and the signal that ends a job."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, stop) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


class Training:
    """One run: its position, and the objects that are saved with it.

    Args:
        session: the experiment's session.
        run: the run.
        model: the network that is trained, not wrapped.
        optimizer: its optimizer, with base learning rates.
        scaling: the batch size of each epoch.
        evaluate: gives the content of the metrics' rows.
    """

    def __init__(
        self,
        session: Session,
        run: Run,
        model: nn.Module,
        optimizer: FusedScaledOptimizer,
        scaling: ProgressiveScaling,
        evaluate: Evaluate,
    ) -> None:
        self.session, self.run, self.model = session, run, model
        self.optimizer, self.scaling, self.evaluate = optimizer, scaling, evaluate
        self.lrs = [group["lr"] for group in optimizer.param_groups]
        self.epoch = self.position = 0
        self.saved = time.monotonic()

    @property
    def samples(self) -> int:
        """Samples seen so far, over all processes."""
        return self.epoch * self.session.epoch_size + self.position

    def epochs(self) -> Iterator[int]:
        """The epochs that remain; evaluates, saves and stops between them."""
        session, recipe = self.session, self.session.recipe
        if self.samples == 0:
            self.log()
        while self.epoch < recipe.epochs:
            self.model.train()
            yield self.epoch
            self.epoch, self.position = self.epoch + 1, 0
            if self.epoch % recipe.evaluate_epochs == 0 or self.epoch == recipe.epochs:
                self.log()
            if self.epoch % recipe.checkpoint_epochs == 0:
                self.save()
            self.stop_if_asked()
        session.folder.log({"run": self.run.name, "finished": True})
        session.folder.drop_checkpoint()

    def batches(self) -> Iterator[Batch]:
        """The batches that remain in the epoch; sets the learning rate of each."""
        session, recipe = self.session, self.session.recipe
        size, place = round(self.scaling.batch_size), session.place
        micro, parts = session.group.share(size, recipe.per_device_batch)
        kappa = micro * session.group.world / recipe.base_batch
        scale_batchnorm_momentum(self.model, kappa if self.run.norm_rule else 1.0)
        keys = epoch_keys(len(session.data.train), self.run.seed, self.epoch)
        mine = [
            keys[first : first + micro]
            for start in range(self.position, session.epoch_size, size)
            for first in self._firsts(start, micro, parts)
        ]
        pin = place.device.type == "cuda"
        found = iter(loader(session.data.train, mine, recipe.workers, pin))
        while self.position < session.epoch_size:
            self._set_lr((self.samples + size / 2) / session.epoch_size)
            yield Batch(found, parts, place)
            self.position += size
            session.bar.update(size)
            if self.position < session.epoch_size:
                self.stop_if_asked(time.monotonic())

    def _firsts(self, start: int, micro: int, parts: int) -> list[int]:
        """The first samples of this process's micro-batches in a batch."""
        mine = start + self.session.group.rank * micro * parts
        return [mine + part * micro for part in range(parts)]

    def _set_lr(self, epoch: float) -> None:
        factor = self.session.recipe.lr_factor(epoch)
        for group, lr in zip(self.optimizer.param_groups, self.lrs, strict=True):
            group["lr"] = lr * factor

    def log(self) -> None:
        """Evaluate, and add a row to the metrics."""
        self._share_buffers()
        position = {"epoch": self.epoch, "samples": self.samples}
        self.session.folder.log({"run": self.run.name, **position, **self.evaluate()})

    def _share_buffers(self) -> None:
        """Copy BatchNorm's statistics, which differ between processes, from the first process."""
        held = (entry.get("ema_buffers", {}) for entry in self.optimizer.state.values())
        self.session.group.as_the_first(self.model.buffers())
        self.session.group.as_the_first(
            value for entry in held for average in entry.values() for value in average.values()
        )

    def stop_if_asked(self, now: float = 0.0) -> None:
        """Save and stop in all processes if one was asked to; save if it was not done for long."""
        late = now - self.saved > 60.0 * self.session.recipe.checkpoint_minutes
        stopping, late = self.session.group.any(self.session.stopping, late)
        if stopping or late:
            self.save()
        if stopping:
            raise KeyboardInterrupt(
                f"Stopped in {self.run.name!r} after {self.samples} samples; the same command goes "
                "on from there."
            )

    def save(self) -> None:
        """Write the checkpoint, with everything on which the rest of the run depends."""
        self.saved = time.monotonic()
        generators = [torch.get_rng_state()]
        if self.session.place.device.type == "cuda":
            generators.append(torch.cuda.get_rng_state(self.session.place.device))
        self.session.folder.save_checkpoint(
            {
                "run": self.run.name,
                "epoch": self.epoch,
                "position": self.position,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaling": self.scaling.state_dict(),
                "generators": self.session.group.gather(generators),
            }
        )

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue where :meth:`save` was called.

        Raises:
            ValueError: the state is from another number of processes, or does not fit.
        """
        if len(state["generators"]) != self.session.group.world:
            raise ValueError(
                f"it is of {len(state['generators'])} processes, not {self.session.group.world}"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaling.load_state_dict(state["scaling"])
        self.epoch, self.position = state["epoch"], state["position"]
        self.session.bar.update(self.samples)
        cpu, *cuda = state["generators"][self.session.group.rank]
        torch.set_rng_state(cpu)
        for generator in cuda:
            torch.cuda.set_rng_state(generator, self.session.place.device)


class Batch:
    """This process's share of a batch, in micro-batches whose gradients add up.

    Args:
        found: the epoch's micro-batches.
        parts: number of micro-batches in a batch.
        place: the device and precision for them.
    """

    def __init__(self, found: Iterator[MicroBatch], parts: int, place: Place) -> None:
        self.found, self.parts, self.place = found, parts, place

    def __len__(self) -> int:
        return self.parts

    def over(self, model: nn.Module) -> Iterator[MicroBatch]:
        """The micro-batches; processes exchange gradients of ``model`` only at the last one."""
        for part in range(self.parts):
            views, classes = next(self.found)
            with without_reduction(model, last=part == self.parts - 1):
                yield tuple(map(self.place.take, views)), self.place.take(classes)
