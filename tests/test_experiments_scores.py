"""Batches, samples and scores of the experiments: shared out, and the same at every kappa."""

from __future__ import annotations

import threading

import pytest
import torch
from pages import one_thread  # noqa: F401

for module in ("sklearn", "torchvision"):
    pytest.importorskip(module)

from fused_ema.experiments import data  # noqa: E402
from fused_ema.experiments.distributed import Group  # noqa: E402
from fused_ema.experiments.evaluation import knn, linear_probe  # noqa: E402


def test_every_batch_size_sees_the_same_samples():
    found = data.digits(64, views=2)
    for batch in (8, 32):
        keys = data.epoch_keys(64, seed=1, epoch=2)
        batches = [keys[start : start + batch] for start in range(0, 64, batch)]
        views, classes = zip(*data.loader(found.train, batches, 0, False), strict=True)
        joined = [torch.cat(view) for view in zip(*views, strict=True)], torch.cat(classes)
        if batch == 8:
            first = joined
    assert all(torch.equal(a, b) for a, b in zip(first[0], joined[0], strict=True))
    assert torch.equal(first[1], joined[1])
    assert not torch.equal(*first[0])


def test_processes_share_a_batch_or_say_why_not():
    assert Group(world=2).share(32, 4) == (4, 4)
    assert Group(world=2).share(4, 8) == (2, 1)
    with pytest.raises(ValueError, match="a batch of 9 does not divide over 2 processes"):
        Group(world=2).share(9, 4)
    with pytest.raises(ValueError, match=r"which per_device_batch=3 does not divide; allowed: div"):
        Group(world=2).share(32, 3)


def test_all_runs_see_as_many_samples_as_every_batch_divides():
    assert data.usable(1_281_167, [1024, 4096]) == 312 * 4096
    with pytest.raises(ValueError, match="100 training images are too few for batches of"):
        data.usable(100, [64, 128])


def test_scores_of_features():
    """Two classes of directions: the nearest neighbours and a line tell them apart."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[3.0, 0.0, 0.0], [0.0, 3.0, 0.0]])

    def features(count):
        classes = torch.arange(count) % 2
        return centres[classes] + 0.1 * torch.randn(count, 3, generator=generator), classes

    train, test = features(40), features(20)
    assert knn(train, test, neighbours=5) == 1.0
    assert linear_probe(train, test) == 1.0
    wrong = (train[0], 1 - train[1])
    assert knn(wrong, test, neighbours=5) == 0.0
    assert linear_probe(wrong, test) == 0.0


def test_features_that_processes_share_score_as_in_one(monkeypatch):
    """Each process holds half; what they exchange is put together here."""
    generator = torch.Generator().manual_seed(0)
    train = torch.randn(60, 5, generator=generator), torch.randint(0, 3, (60,), generator=generator)
    test = torch.randn(30, 5, generator=generator), torch.randint(0, 3, (30,), generator=generator)
    whole = knn(train, test, neighbours=7), linear_probe(train, test)
    barrier, lock, found = threading.Barrier(2), threading.Lock(), {}
    shared: dict[int, object] = {}

    class Half(Group):
        def gather(self, value):
            shared[self.rank] = value
            barrier.wait()
            values = [shared[0], shared[1]]
            barrier.wait()
            return values

        def total(self, mine):
            return sum(self.gather(mine.clone()))

    def score(rank):
        group = Half(rank=rank, world=2)
        mine = [tuple(part[rank::2] for part in features) for features in (train, test)]
        scores = knn(*mine, neighbours=7, group=group), linear_probe(*mine, group=group)
        with lock:
            found[rank] = scores

    threads = [threading.Thread(target=score, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == pytest.approx(whole, abs=1 / 30 + 1e-9)
    assert found[0][0] == whole[0]
    assert found[1] == found[0]
