"""Names of cases and processors in the report and the figures."""

from __future__ import annotations

from .rows import Row

TITLES = {
    "resnet18": "ResNet-18",
    "resnetv2_50": "ResNetv2-50",
    "vit_b16": "ViT-B/16",
    "vit_l16": "ViT-L/16",
    "tiny_10000x64": "10,000 × 64",
    "one_100m": "one tensor of 100 M",
    "groups50": "ViT-B/16, 50 groups",
}
# The case whose bytes hardly matter.
SMALL = "tiny_10000x64"


def title(case: str) -> str:
    return TITLES.get(case, case)


def processor(row: Row) -> str:
    return f"{row.cpu}, {number_of(row.cores, 'core')}, {number_of(row.threads, 'thread')}"


def number_of(count: str, what: str) -> str:
    return f"{count} {what}{'' if count == '1' else 's'}"
