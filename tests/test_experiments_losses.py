"""Parts of DINO and of speech against definitions written down otherwise."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

for module in ("matplotlib", "sklearn", "timm", "torchvision", "tqdm"):
    pytest.importorskip(module)
jiwer = pytest.importorskip("jiwer")
np = pytest.importorskip("numpy")

from fused_ema.experiments import dino, speech, spoken_digits  # noqa: E402
from fused_ema.experiments.networks import DinoHead  # noqa: E402
from fused_ema.experiments.optimizers import exempt  # noqa: E402


def test_the_centre_moves_as_kappa_base_steps_do():
    """The same batch mean each time, so that both forms are exact."""
    mean = torch.tensor([1.0, -2.0])
    scaled, base = dino.Centre(2, 0.9), dino.Centre(2, 0.9)
    scaled.update(mean, 8.0)
    for _ in range(8):
        base.update(mean, 1.0)
    expected = mean * (1 - 0.9**8)
    torch.testing.assert_close(scaled.mean, expected, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(base.mean, expected, rtol=1e-6, atol=0.0)


def test_distillation_loss_is_the_mean_cross_entropy_of_different_views():
    generator = torch.Generator().manual_seed(0)
    students = [torch.randn(3, 4, generator=generator) for _ in range(3)]
    teachers = [torch.randn(3, 4, generator=generator).softmax(1) for _ in range(2)]
    total, count = 0.0, 0
    for t, target in enumerate(teachers):
        for s, output in enumerate(students):
            if t == s:
                continue
            for q, logits in zip(target.tolist(), output.tolist(), strict=True):
                scaled = [math.exp(x / 0.5) for x in logits]
                total -= sum(a * math.log(b / sum(scaled)) for a, b in zip(q, scaled, strict=True))
                count += 1
    found = dino.distillation_loss(students, teachers, 0.5)
    assert found.item() == pytest.approx(total / count, rel=1e-5)


def test_dinos_head_gives_cosines():
    head = DinoHead(5, 8, 6, 7, norm=True)
    with torch.no_grad():
        found = head(torch.randn(9, 5, generator=torch.Generator().manual_seed(0)))
        head.last.weight.mul_(10.0)
    assert found.shape == (9, 7)
    assert found.abs().max() <= 1.0 + 1e-6


def test_the_teachers_temperature_rises_by_epochs():
    config = dataclasses.replace(
        dino.QUICK, teacher_temperature=0.07, teacher_temperature_start=0.04,
        teacher_temperature_epochs=3,
    )  # fmt: skip
    found = [config.teacher_temperature_at(epoch) for epoch in range(5)]
    assert found == pytest.approx([0.04, 0.05, 0.06, 0.07, 0.07])


def test_what_timm_exempts_has_no_weight_decay():
    import timm

    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32)
    assert exempt(vit) >= {"pos_embed", "cls_token"}
    assert exempt(torch.nn.Linear(2, 2)) == set()


def test_best_paths_are_read_as_ctc_defines():
    """By the definition: repetitions merge, then blanks go."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20, 30, 11, generator=generator)
    logits[..., 0] += 1.5
    lengths = torch.randint(40, 89, (20,), generator=generator)
    found = speech.read(logits, lengths)
    for row, path, length in zip(found.tolist(), logits.argmax(2).tolist(), lengths, strict=True):
        path = path[: (int(length) + 2) // 3]
        merged = [k for k, before in zip(path, [None, *path], strict=False) if k != before]
        assert [k for k in row if k] == [k for k in merged if k]
    assert speech.words(torch.tensor([[2, 1, 0]])) == ["one zero"]


@pytest.fixture(scope="module")
def found():
    return spoken_digits.recordings()


def test_the_file_of_features_is_small_and_complete(found):
    assert spoken_digits.FEATURES.stat().st_size < 4_000_000
    assert "CC BY-SA 4.0" in (spoken_digits.FEATURES.parent / "README.md").read_text()
    assert found.lengths.shape == (6, 10, 50)
    assert found.lengths.sum() == len(found.frames)
    torch.testing.assert_close(found.frames.mean(0), torch.zeros(32), rtol=0.0, atol=1e-3)


def test_features_show_a_tone_in_its_band():
    """A tone of 1 kHz is loudest in the filter around it; white noise is about flat."""
    seconds = torch.arange(8000) / 8000
    found = spoken_digits.log_mels(torch.sin(2 * math.pi * 1000 * seconds), 8000, 256, 100, 32)
    assert found.shape == (81, 32)
    filters = spoken_digits.mel_filters(8000, 256, 32)
    assert found[40].argmax() == filters[:, 32].argmax()  # bin 32 is 1 kHz
    assert filters.shape == (32, 129)
    assert (filters.sum(1) > 0).all()


def test_strings_depend_on_epoch_and_index_alone(found):
    strings = spoken_digits.Strings(found, 16, [(5, 7), (5, 50)], masked=True)
    views, digits = strings.__getitems__([(3, 4), (3, 9)])
    again, digits_again = strings.__getitems__([(3, 9)])
    length = int(again[2])
    assert torch.equal(again[0][0], views[0][1, :length])
    assert torch.equal(digits_again[0], digits[1])
    assert not torch.equal(strings.__getitems__([(4, 9)])[1], digits_again)
    masked, clean, lengths = views[:3]
    assert ((masked == clean) | (masked == 0)).all()
    assert not torch.equal(masked, clean)
    assert lengths.tolist() == [int((row != 0).any(1).sum()) for row in clean]
    assert set((digits > 0).sum(1).tolist()) <= {2, 3, 4, 5}


def test_labelled_strings_come_from_their_recordings(found):
    strings = spoken_digits.Strings(found, 4, [(5, 6)], masked=False)
    (_, clean, lengths), digits = strings.__getitems__([(0, 0)])
    plan = strings.plans(0)[0]
    speaker = int(plan["speaker"][0])
    parts = []
    for digit in digits[0][digits[0] > 0] - 1:
        start, size = found.starts[speaker, digit, 5], found.lengths[speaker, digit, 5]
        parts.append(found.frames[start : start + size])
    assert torch.equal(clean[0, : int(lengths)], torch.cat(parts))


def test_no_features_are_told(tmp_path):
    with pytest.raises(ValueError, match=r"none.npz is missing; it is in the repository, not"):
        spoken_digits.recordings(tmp_path / "none.npz")
    config = dataclasses.replace(speech.QUICK, labelled=99)
    with pytest.raises(ValueError, match="labelled=99 is out of range; allowed: 1 to 45"):
        speech.load(config)
