"""Every benchmark of the project: python benchmarks/bench.py COMMAND [--help]. Results go to benchmarks/results/."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

import ablation
import accuracy
import features
import host
import masks
import speed
import summary

RESULTS = Path(os.path.relpath(Path(__file__).parent / "results"))

# command -> what it answers, its options, what runs it, the device it needs
COMMANDS = {
    "host": ("microseconds of one call on tiny tensors, beside torch's", host.add_options, host.run, None),
    "cpu": ("rates on this CPU, beside torch's", lambda p: speed.add_options(p, "cpu"), speed.cpu, None),
    "accuracy": ("worst error over the list of test cases", accuracy.add_options, accuracy.run, None),
    "fwd": ("forward rates on this GPU, beside cuDNN's and others", speed.add_forward_options, speed.gpu_forward, "cuda"),
    "bwd": ("backward rates on this GPU, beside cuDNN's and others", lambda p: speed.add_options(p, "cuda"), speed.gpu_backward, "cuda"),
    "masks": ("forward rates of windows, block masks, packed sequences", masks.add_options, masks.run, "cuda"),
    "ablation": ("what each technique of the Hopper kernel is worth", ablation.add_options, ablation.run, "cuda"),
    "features": ("forward rates with bias, mask, dropout; of few query rows", features.add_options, features.run, "cuda"),
    "readme": ("put the results into README.md", lambda p: None, summary.run, None),
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (answers, add_options, _, _) in COMMANDS.items():
        command = commands.add_parser(name, help=answers, description=answers, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        command.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON and the picture")
        add_options(command)
    options = parser.parse_args(arguments)
    _, _, run, needs = COMMANDS[options.command]
    if needs == "cuda" and not torch.cuda.is_available():
        sys.exit(f"bench.py {options.command} needs a GPU that torch can see")
    run(options)


if __name__ == "__main__":
    main()
