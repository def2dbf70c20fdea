"""Reference experiments of "How to Scale Your EMA": ``python -m fused_ema.experiments NAME``.

One file an experiment, whose loop reads like the paper's algorithm and uses the public optimizers
alone: :mod:`.noisy_parabola`, :mod:`.polyak`, :mod:`.byol`, :mod:`.progressive`. Beside them:
:mod:`.config` (options and presets), :mod:`.data`, :mod:`.networks`, :mod:`.evaluation`,
:mod:`.training` (what a loop asks for around a step), :mod:`.folder` (what is on disk),
:mod:`.distributed`, :mod:`.plots`. It needs the extra ``fused_ema[experiments]``.
"""
