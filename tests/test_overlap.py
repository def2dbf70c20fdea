"""Parameters that share memory are stepped one behind the other, in torch's order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fused_ema import FusedScaledSGD
from fused_ema.step.overlap import turns

BACKENDS = ("native", "triton", "foreach", "reference")
SIZE = 70_000  # more than one thread takes at a time


def test_what_lies_apart_has_no_turn():
    assert turns([(8, 16), (16, 24), (0, 8), (0, 0), (30, 40)]) == [None] * 5


def test_turns_follow_the_order_of_parameters_not_of_addresses():
    #   2nd and 3rd lie apart and both overlap the 1st; the 4th overlaps the 3rd alone
    assert turns([(4, 12), (8, 16), (0, 6), (0, 3)]) == [0, 1, 1, 2]
    assert turns([(0, 4)] * 3) == [0, 1, 2]
    assert turns([(100, 120), (0, 10), (90, 101)]) == [0, None, 1]


def test_turns_agree_with_all_pairs():
    generator = np.random.default_rng(0)
    for _ in range(200):
        begins = generator.integers(0, 60, size=12)
        spans = [
            (int(b), int(b + n)) for b, n in zip(begins, generator.integers(0, 9, 12), strict=True)
        ]
        meets = [
            [j for j in range(12) if j != i and max(b, spans[j][0]) < min(e, spans[j][1])]
            for i, (b, e) in enumerate(spans)
        ]
        found = turns(spans)
        for i, others in enumerate(meets):
            if not others:
                assert found[i] is None
            else:
                assert found[i] == max((found[j] + 1 for j in others if j < i), default=0)


def shared_parameters(dtype=torch.float32):
    """Two of the same memory, one of half of it, one of its own."""
    buffer = torch.linspace(-1, 1, SIZE).to(dtype)
    views = [buffer, buffer.view(SIZE), buffer[SIZE // 2 :], torch.ones(SIZE, dtype=dtype)]
    return buffer, [nn.Parameter(view) for view in views]


def run(params, backend, steps=3, **options):
    opt = FusedScaledSGD(params, lr=0.25, weight_decay=0.5, backend=backend, **options)
    for step in range(steps):
        for i, param in enumerate(params):
            param.grad = torch.full_like(param, 2.0 ** -(i + step))
        opt.step()
    return opt


def in_sequence(steps=3, rho=None, before=False):
    """Weights and averages by float64 arithmetic, one parameter after another."""
    buffer = np.linspace(-1, 1, SIZE, dtype=np.float32).astype(np.float64)
    views = [buffer, buffer[:], buffer[SIZE // 2 :], np.ones(SIZE)]
    averages = [view.copy() for view in views]

    def follow():
        for view, average in zip(views, averages, strict=True):
            average += (1 - rho) * (view - average)

    for step in range(steps):
        if rho is not None and before:
            follow()
        for i, view in enumerate(views):
            view -= 0.25 * (2.0 ** -(i + step) + 0.5 * view)
        if rho is not None and not before:
            follow()
    return views, averages


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("engine", ["native", "foreach", "reference"])
@pytest.mark.parametrize("order", ["after", "before"])
def test_shared_memory_is_stepped_in_order(order, engine, two_threads):
    _, params = shared_parameters()
    opt = run(params, engine, ema_decay=0.5, ema_order=order)
    weights, averages = in_sequence(rho=0.5, before=order == "before")
    for param, weight, average in zip(params, weights, averages, strict=True):
        # sixteen roundings of numbers below two
        np.testing.assert_allclose(param.detach().numpy(), weight, rtol=0, atol=16 * 2.0**-24)
        ema = opt.state[param]["ema"].numpy()
        np.testing.assert_allclose(ema, average, rtol=0, atol=16 * 2.0**-24)


def test_threads_give_the_same_bits(two_threads):
    found = []
    for threads in (1, 2, 2, 2):
        torch.set_num_threads(threads)
        buffer, params = shared_parameters()
        opt = run(params, "native", ema_decay=0.5)
        found.append([buffer, *(opt.state[p]["ema"] for p in params)])
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize("engine", ["native", "foreach"])
def test_torch_steps_them_alike(engine):
    buffer, params = shared_parameters()
    run(params, engine)
    theirs, their_params = shared_parameters()
    opt = torch.optim.SGD(their_params, lr=0.25, weight_decay=0.5, foreach=False)
    for step in range(3):
        for i, param in enumerate(their_params):
            param.grad = torch.full_like(param, 2.0 ** -(i + step))
        opt.step()
    torch.testing.assert_close(buffer, theirs, rtol=0, atol=16 * 2.0**-24)


def test_slices_of_one_buffer_are_one_bucket():
    buffer = torch.ones(300)
    opt = run([nn.Parameter(part) for part in buffer.split(100)], "native", ema_decay=0.5)
    assert opt.backends == ("native",)


def test_what_shares_nothing_stays_together():
    _, params = shared_parameters()
    others = [nn.Parameter(torch.ones(5)) for _ in range(6)]
    opt = run([*others, *params], "native")
    # those apart and the first of the three, then the second, then the third
    assert len(opt.backends) == 3


@pytest.mark.parametrize("engine", BACKENDS)
@pytest.mark.parametrize("other", ["weight", "average"])
def test_an_average_that_comes_to_share_memory_is_refused(other, engine):
    student, teacher = (
        nn.ParameterList([nn.Parameter(torch.ones(8)) for _ in range(2)]) for _ in "ab"
    )
    opt = FusedScaledSGD(student, lr=0.5, ema_decay=0.5, teacher=teacher, backend=engine)
    for param in student:
        param.grad = torch.ones(8)
    opt.step()
    kept, source = teacher[0].data, student[0] if other == "weight" else teacher[1]
    teacher[0].data = source.data
    before = [t.detach().clone() for t in (*student, *teacher)]
    for _ in range(2):
        with pytest.raises(ValueError, match="shares memory"):
            opt.step()
    assert all(map(torch.equal, before, (*student, *teacher)))
    teacher[0].data = kept
    opt.step()
    # 1, 0.5, 0: averages of 0.75, then 0.375
    assert torch.equal(teacher[0], torch.full((8,), 0.375))


def test_averages_of_parameters_that_share_memory_may_not():
    _, params = shared_parameters()
    opt = run(params, "native", steps=1, ema_decay=0.5)
    opt.state[params[0]]["ema"] = opt.state[params[1]]["ema"]
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match="shares memory"):
        opt.step()
    assert all(map(torch.equal, before, params))


def test_lazy_clones_are_memory_of_their_own():
    values = torch.ones(10)
    params = [nn.Parameter(torch._lazy_clone(values)) for _ in range(2)]
    opt = run(params, "native", ema_decay=0.5, ema_format="delta")
    assert len(opt.backends) == 1
    assert torch.equal(values, torch.ones(10))


def test_memory_shared_later_is_seen(two_threads):
    params = [nn.Parameter(torch.linspace(-1, 1, SIZE)) for _ in range(2)]
    opt = run(params, "native", steps=1)
    assert len(opt.backends) == 1
    params[1].data = params[0].data
    start = params[0].detach().double()
    for param, value in zip(params, (1.0, 2.0), strict=True):
        param.grad = torch.full_like(param, value)
    opt.step()
    assert len(opt.backends) == 2
    expected = start - 0.25 * (1.0 + 0.5 * start)
    expected = expected - 0.25 * (2.0 + 0.5 * expected)
    torch.testing.assert_close(params[0].double(), expected, rtol=0, atol=8 * 2.0**-24)
    params[1].data = torch.zeros(SIZE)
    opt.step()
    assert len(opt.backends) == 1


@pytest.mark.parametrize("engine", BACKENDS)
def test_a_frozen_view_moves_its_average_behind_the_step(engine):
    buffer = torch.ones(10)
    frozen, moving = nn.Parameter(buffer, requires_grad=False), nn.Parameter(buffer)
    opt = FusedScaledSGD([frozen, moving], lr=1.0, ema_decay=0.5, backend=engine)
    moving.grad = torch.ones(10)
    opt.step()
    assert torch.equal(buffer, torch.zeros(10))
    for param in (frozen, moving):
        assert torch.equal(opt.state[param]["ema"], torch.full((10,), 0.5))


@pytest.mark.parametrize("options", [{"master_weights": True}, {"ema_format": "delta"}])
def test_what_holds_the_weights_twice_is_refused(options):
    buffer, params = shared_parameters(torch.bfloat16)
    start = buffer.clone()
    with pytest.raises(ValueError, match="shares memory"):
        run(params, "native", ema_decay=0.5, **options)
    assert torch.equal(buffer, start)


def test_rounded_averages_and_states_agree_between_backends():
    found = []
    for backend in ("native", "reference"):
        buffer, params = shared_parameters()
        formats = {"ema_format": "bf16", "state_format": "bf16"}
        opt = run(params, backend, ema_decay=0.5, momentum=0.5, **formats)
        found.append(
            [buffer, *(opt.state[p][k] for p in params for k in ("ema", "momentum_buffer"))]
        )
    assert all(map(torch.equal, *found))
