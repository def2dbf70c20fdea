"""The demo, ``python -m fused_ema.demo``: three short experiments on scikit-learn's digits.

:mod:`.agreement` trains with torch's AdamW and a hand-written EMA, and again with
:class:`fused_ema.FusedScaledAdamW`; :mod:`.batch_scaling` grows the batch with and without the EMA
rule; :mod:`.timing` times a step. :mod:`.problem` holds data and network, :mod:`.console` and
:mod:`.figure` the output. It needs the extra ``fused_ema[demo]``.
"""
