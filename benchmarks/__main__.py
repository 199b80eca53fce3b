"""Run the benchmarks named, or all, and print their figures as they come."""

from __future__ import annotations

import importlib
import pkgutil
import sys

import benchmarks


def main() -> None:
    names = sys.argv[1:] or [m.name for m in pkgutil.iter_modules(benchmarks.__path__)]
    for name in names:
        run = getattr(importlib.import_module(f"benchmarks.{name}"), "run", None)
        if run is not None:
            for figure, value in run().items():
                print(f"{name:<12}{figure:<44}{value:>12.4g}", flush=True)  # noqa: T201  # the table


if __name__ == "__main__":
    main()
