"""What Trimtab costs, measured: each module has a `run` that returns figures by name.

`python -m benchmarks` runs all of them, `python -m benchmarks watch` one. CPU time, not wall time,
wherever it can be: a busy machine changes it least.
"""
