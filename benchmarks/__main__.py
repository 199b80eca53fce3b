"""Run the benchmarks named, or the usual ones, and print their figures as they come.

`picker_faults` takes many minutes and runs only when named; the simulation study is a command of
its own (`python -m benchmarks.study`).
"""

from __future__ import annotations

import importlib
import sys

USUAL = ("parse", "push", "watch", "picker")


def main() -> None:
    for name in sys.argv[1:] or USUAL:
        for figure, value in importlib.import_module(f"benchmarks.{name}").run().items():
            print(f"{name:<12}{figure:<44}{value:>12.4g}", flush=True)  # noqa: T201  # the table


if __name__ == "__main__":
    main()
