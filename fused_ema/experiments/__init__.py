"""Reference experiments of "How to Scale Your EMA": ``python -m fused_ema.experiments NAME``.

Each experiment is one file whose loop reads like the paper's algorithm and uses only the public
optimizers: :mod:`.noisy_parabola`, :mod:`.polyak`, :mod:`.byol`, :mod:`.dino`, :mod:`.speech`,
:mod:`.batchnorm`, :mod:`.progressive`. They share :mod:`.config` (options and presets),
:mod:`.data`, :mod:`.spoken_digits`, :mod:`.networks`, :mod:`.optimizers`, :mod:`.evaluation`,
:mod:`.training` (everything in a loop around the step), :mod:`.folder` (files on disk),
:mod:`.distributed`, :mod:`.dry_run`, :mod:`.plots`. They need the extra ``fused_ema[experiments]``.
"""
