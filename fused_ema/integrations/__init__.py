"""Thin adapters for training frameworks; each module imports its framework, and nothing else does.

``lightning``: a callback. ``timm``: names for its optimizer factory, and a ``ModelEmaV3``.
``transformers``: a mixin for ``Trainer``. ``accelerate``: an ``Accelerator``.
"""
