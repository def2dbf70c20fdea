"""Reference experiments of "How to Scale Your EMA": ``python -m fused_ema.experiments NAME``.

Each experiment is one file whose loop reads like the paper's algorithm and uses only the public
optimizers: :mod:`.noisy_parabola`, :mod:`.polyak`, :mod:`.byol`, :mod:`.progressive`. They share
:mod:`.config` (options and presets), :mod:`.data`, :mod:`.networks`, :mod:`.evaluation`,
:mod:`.training` (everything in a loop around the step), :mod:`.folder` (files on disk),
:mod:`.distributed`, :mod:`.plots`. They need the extra ``fused_ema[experiments]``.
"""
