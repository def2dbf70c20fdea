"""Speech: a CTC transformer, its Polyak average, and pseudo-labels from an average.

Section 3.3 of the paper, on strings of spoken digits. Supervised runs keep two averages, with
``rho**kappa`` and with ``rho`` left alone. Runs with pseudo-labels (slimIPL, Likhomanenko et al.
2020, arXiv 2010.11524, with an average as teacher) add the loss of unlabelled strings against what
the teacher reads in them; there the rule affects the training itself.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import ctc_loss, log_softmax

from .. import ProgressiveScaling, YoungAverageWarning
from ..ema.decay import Decay
from ..optim.options import EmaOptions
from .config import option, positive
from .data import Data, loader
from .distributed import Group
from .folder import Folder
from .optimizers import make_optimizer
from .polyak import averages
from .recipe import Recipe
from .results import curves, last
from .spoken_digits import DIGITS, MELS, TEST_RECORDINGS, Strings, recordings
from .training import Run, Session

WORDS = ("", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEST_STRINGS, TEST_TOKEN = 256, 0


@dataclass(frozen=True)
class Config(Recipe):
    """Options of speech."""

    data: str = option("spoken-digits", "data set", choices=("spoken-digits",))
    train_size: int | None = option(1920, "strings of digits in an epoch")
    labelled: int = option(2, "recordings of each digit and speaker that have labels")
    start_epoch: int = option(5, "epoch from which pseudo-labels are used")
    weight: float = option(0.3, "weight of the loss against pseudo-labels")
    width: int = option(64, "width of the transformer")
    layers: int = option(2, "layers of the transformer")

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "labelled", "weight", "width", "layers")


QUICK = Config(
    base_batch=8,
    kappas=(1.0, 8.0),
    seeds=4,
    adamw_lr=2e-3,
    adamw_weight_decay=0.01,
    beta2=0.98,
    rho=0.995,
    epochs=10,
)
PRESETS = {"quick": QUICK}


class Acoustic(nn.Module):
    """A strided convolution and a transformer, with log-probabilities of blank and ten digits."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(MELS, width, 7, stride=3, padding=3)
        self.place = nn.Conv1d(width, width, 15, padding=7, groups=width)
        layer = nn.TransformerEncoderLayer(
            width, 4, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.transformer = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, DIGITS + 1)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return log-probabilities ``[n, frames, 11]`` for each pair of features and lengths."""
        pairs = zip(inputs[::2], inputs[1::2], strict=True)
        return tuple(self._read(features, lengths) for features, lengths in pairs)

    def _read(self, features: Tensor, lengths: Tensor) -> Tensor:
        hidden = nn.functional.gelu(self.conv(features.transpose(1, 2)))
        absent = torch.arange(hidden.shape[2], device=lengths.device) >= shorter(lengths)[:, None]
        hidden = hidden.masked_fill(absent[:, None], 0.0)
        hidden = (hidden + self.place(hidden)).transpose(1, 2)
        hidden = self.norm(self.transformer(hidden, src_key_padding_mask=absent))
        return log_softmax(self.head(hidden), dim=2)


def shorter(lengths: Tensor) -> Tensor:
    """Frames after the convolution's stride."""
    return (lengths + 2) // 3


def loss_of(log_probabilities: Tensor, lengths: Tensor, targets: Tensor) -> Tensor:
    """CTC's loss of targets that are padded with 0."""
    sizes = (targets > 0).sum(1)
    inputs = log_probabilities.transpose(0, 1)
    return ctc_loss(inputs, targets, shorter(lengths), sizes, zero_infinity=True)


def read(log_probabilities: Tensor, lengths: Tensor) -> Tensor:
    """The best path's digits, without repetitions and blanks, padded with 0."""
    best = log_probabilities.argmax(2)
    known = torch.arange(best.shape[1], device=best.device) < shorter(lengths)[:, None]
    new = torch.ones_like(known)
    new[:, 1:] = best[:, 1:] != best[:, :-1]
    found = torch.where(known & new, best, 0)
    # digits first, in their order
    order = (found == 0).to(torch.uint8).sort(dim=1, stable=True).indices
    return found.gather(1, order)[:, : max(1, int((found > 0).sum(1).max()))]


def words(targets: Tensor) -> list[str]:
    """The digits of each string as words."""
    return [" ".join(WORDS[k] for k in row if k) for row in targets.tolist()]


def load(config: Config) -> Data:
    """Strings for training, of a labelled and of any recordings, and strings for testing."""
    found = recordings()
    end = found.starts.shape[2]
    first = TEST_RECORDINGS
    if not 0 < config.labelled <= end - first:
        raise ValueError(
            f"labelled={config.labelled} is out of range; allowed: 1 to {end - first} recordings"
        )
    pools = [(first, first + config.labelled), (first, end)]
    train = Strings(found, config.train_size or 1920, pools, masked=True)
    test = Strings(found, TEST_STRINGS, [(0, first)], masked=False)
    return Data(train, train, test, classes=DIGITS, channels=MELS)


def make_model(config: Config, data: Data) -> Acoustic:
    """The network with new weights."""
    return Acoustic(config.width, config.layers)


def views_of(config: Config) -> dict[int, int]:
    """None: an estimate of memory leaves the activations out."""
    return {}


def train(config: Config, run: Run, session: Session) -> None:
    """Train by Algorithm 1 with CTC's loss, which may use the average as a teacher."""
    torch.manual_seed(run.seed)
    place = session.place
    model = make_model(config, session.data).to(place.device)
    average = copy.deepcopy(model).requires_grad_(False)
    network, teacher = place.wrap(model), place.in_precision(average)
    options: EmaOptions = {"model": model, "backend": config.backend}
    if run.pseudo:
        options |= {"teacher": average, "kappa_scales": "all" if run.rule else "optimizer"}
    kept: dict[str, Decay] = {"teacher": config.rho} if run.pseudo else averages(config, run)
    decays = config.rho if run.pseudo else tuple(kept.values())
    optimizer = make_optimizer(config, run, [(model, decays)], options)
    batch_sizes = {epoch: config.batch(kappa) for epoch, kappa in run.kappas.items()}
    scaling = ProgressiveScaling(optimizer, config.base_batch, batch_sizes)

    def evaluate() -> dict[str, float]:
        scores = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", YoungAverageWarning)  # curves begin at the first step
            for index, name in enumerate(kept):
                with optimizer.ema_weights(index):
                    scores[f"{name}_error"] = error_rate(model, session)
        return {**scores, "weights_error": error_rate(model, session)}

    training = session.start(run, model, optimizer, scaling, evaluate)
    for epoch in training.epochs():
        guessing = run.pseudo and epoch >= config.start_epoch
        for batch in training.batches():
            optimizer.zero_grad()
            for views, digits in batch.over(network):
                masked, _, lengths, masked_2, clean_2, lengths_2 = views
                if guessing:
                    with torch.no_grad():
                        (heard,) = teacher(clean_2, lengths_2)
                    mine, mine_2 = network(masked, lengths, masked_2, lengths_2)
                    guess = loss_of(mine_2, lengths_2, read(heard, lengths_2))
                    loss = loss_of(mine, lengths, digits) + config.weight * guess
                else:
                    (mine,) = network(masked, lengths)
                    loss = loss_of(mine, lengths, digits)
                (loss / len(batch)).backward()
            optimizer.step()
        scaling.step()


@torch.no_grad()
def error_rate(model: nn.Module, session: Session) -> float:
    """Share of wrong digits in the test strings: jiwer's word error rate."""
    import jiwer

    place, images = session.place, session.data.test
    mine = [(TEST_TOKEN, index) for index in place.group.slice(len(images))]
    was_training = model.training
    model.eval()
    spoken, heard = [], []
    for views, digits in loader(
        images, [mine[k : k + 64] for k in range(0, len(mine), 64)], 0, False
    ):
        _, clean, lengths = map(place.take, views)
        (found,) = place.in_precision(model)(clean, lengths)
        spoken += words(digits)
        heard += words(read(found, lengths))
    model.train(was_training)
    found = jiwer.process_words(spoken, heard)
    wrong = found.substitutions + found.deletions + found.insertions
    counts = torch.tensor([wrong, found.hits + found.substitutions + found.deletions])
    wrong, total = place.group.total(counts).tolist()
    return float(wrong / total)


def fixed(kappa: float, pseudo: bool, rule: bool, seed: int) -> Run:
    """A training at one batch size."""
    kind = f"{'pseudo-labels' if pseudo else 'supervised'}, kappa {kappa:g}"
    return Run(
        kind + ("" if rule else ", rho left alone"), seed, {0: kappa}, "AdamW", rule, pseudo=pseudo
    )


def kinds(config: Config) -> list[tuple[float, bool, bool]]:
    """What trainings differ in: kappa, pseudo-labels, and whether the teacher follows the rule."""
    supervised = [(kappa, False, True) for kappa in config.kappas]
    return supervised + [
        (kappa, True, rule) for kappa in config.kappas for rule in (True, False)[: 1 + (kappa != 1)]
    ]


def sessions(config: Config, folder: Folder, group: Group) -> list[Session]:
    """The trainings."""
    runs = [fixed(*kind, seed) for kind in kinds(config) for seed in config.all_seeds]
    return [Session(config, folder, group, runs, load(config))]


def run(config: Config, folder: Folder, group: Group) -> None:
    """Train at every kappa, supervised and with pseudo-labels, with every seed, and summarise."""
    (its,) = sessions(config, folder, group)
    its.complete(train)
    if group.is_first:
        summarise(config, folder, its.rows())


def summarise(config: Config, folder: Folder, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the errors at the end and on the way there, and the figure's curves."""
    summary: list[dict[str, Any]] = []
    for kappa, pseudo, rule in kinds(config):
        kind = fixed(kappa, pseudo, rule, 0).kind
        both = (
            {"teacher": "rule" if rule else "none"} if pseudo else {"rule": "rule", "none": "none"}
        )
        for name, average in both.items():
            error = curves(rows, kind, f"{name}_error")
            task = "pseudo-labels" if pseudo else "supervised"
            about = {"task": task, "kappa": kappa, "average": average}
            summary.append({**about, "error": error})
    folder.write(
        "summary.json",
        {"runs": [{**curve, "error": last(curve["error"])} for curve in summary]},
    )
    about = {"base_batch": config.base_batch, "rho": config.rho, "seeds": config.seeds}
    folder.write_figure({**about, "curves": summary})


if __name__ == "__main__":
    from .__main__ import main

    sys.exit(main(["speech", *sys.argv[1:]]))
