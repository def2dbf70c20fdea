"""Command line of the experiments."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from . import distributed
from .config import add_options, chosen
from .dry_run import table
from .folder import Folder

NAMES = ("noisy_parabola", "polyak", "byol", "dino", "batchnorm", "speech", "progressive")
PRESETS = ("quick", "cifar10", "paper")
OUT = Path("fused_ema_experiments")
MODULES = ("jiwer", "matplotlib", "scipy", "sklearn", "timm", "torchvision", "tqdm")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiments that the command line names.

    Returns:
        The exit status: 0, or 130 when the user stopped it.
    """
    require(*MODULES)
    options = parser().parse_args(argv)
    names: Sequence[str] = (options.name,)
    if options.name == "all":
        names = [name for name in NAMES if options.preset in experiment(name).PRESETS]
    try:
        with distributed.processes() as group:
            for name in names:
                out = options.out or OUT / options.preset / options.name
                run(name, options, out / name if options.name == "all" else out, group)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as stop:
        print(str(stop) or "Stopped.", file=sys.stderr)
        return 130
    return 0


def run(name: str, options: argparse.Namespace, out: Path, group: distributed.Group) -> None:
    """Run one experiment and print its results."""
    module = experiment(name)
    if options.preset not in module.PRESETS:
        allowed = ", ".join(module.PRESETS)
        raise ValueError(f"preset={options.preset!r}: {name} has none; allowed: {allowed}")
    config = chosen(module.PRESETS, options.preset, vars(options))
    with Folder(out, name, config, writes=group.is_first) as folder:
        if options.dry_run:
            plan(module, config, folder, group)
            return
        module.run(config, folder, group)
    if group.is_first:
        print(f"{name}: {out}/summary.json, {out}/figure.png")


def plan(module: Any, config: Any, folder: Folder, group: distributed.Group) -> None:
    """Print what a command would do; nothing is written."""
    if not hasattr(module, "sessions"):
        print(f"{folder.experiment}: seconds on one core, without a batch")
        return
    tasks = getattr(module, "TASKS", None)
    makers = [tasks[task] for task in config.tasks] if tasks else [module]
    for maker, session in zip(makers, module.sessions(config, folder, group), strict=True):
        model = maker.make_model(session.recipe, session.data)
        if group.is_first:
            print(table(session, model, maker.views_of(session.recipe)), end="\n\n")


def parser() -> argparse.ArgumentParser:
    """The argument parser, with a command for each experiment, and ``all``."""
    top = argparse.ArgumentParser(
        prog="python -m fused_ema.experiments",
        description='Experiments of "How to Scale Your EMA" with the fused optimizers. Results go '
        "to a folder: config.json, metrics.jsonl while running, checkpoint.pt, summary.json, "
        "figure.json and figure.png. Ctrl-C stops after the current step; the same command "
        "continues from there. Only one run at a time can use a folder. Under torchrun all "
        "processes share the batch.",
    )
    commands = top.add_subparsers(dest="name", required=True, metavar="NAME")
    for name in NAMES:
        module = experiment(name)
        about, *_ = module.__doc__.split("\n")
        command = commands.add_parser(
            name,
            help=about,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add_shared(command)
        values = "value of each preset" if len(PRESETS) > 1 else "value"
        group = command.add_argument_group(f"options of the preset [{values}]")
        add_options(group, module.PRESETS)
    together = commands.add_parser("all", help="all of them", description="All experiments.")
    add_shared(together)
    return top


def add_shared(command: argparse.ArgumentParser) -> None:
    """Arguments that every command has."""
    command.add_argument(
        "--preset",
        choices=PRESETS,
        default="quick",
        help="quick: embedded data, minutes on 2 cores; cifar10: one GPU, --data-root; paper: the "
        "full-scale recipe, --data-root and torchrun (default: %(default)s)",
    )
    command.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help=f"folder for the results, with one for each under 'all' (default: {OUT}/PRESET/NAME)",
    )
    command.add_argument(
        "--dry-run",
        action="store_true",
        help="show batches, kappa, scaled rho and learning rate, steps and memory, and end",
    )


def experiment(name: str) -> Any:
    """The module of an experiment."""
    return importlib.import_module(f"{__package__}.{name}")


def require(*modules: str) -> None:
    """Exit with advice if a module is missing that only the experiments need."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        sys.exit(
            f"The experiments need {' and '.join(missing)}: pip install 'fused_ema[experiments]'"
        )


if __name__ == "__main__":
    sys.exit(main())
