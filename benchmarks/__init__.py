"""Speed and memory against the implementations that a user would otherwise run.

`benchmarks.harness` runs the sides of a comparison in turn, each in its own process; every other module is one case.
Measured figures, with command, hardware and date, lie beside them as Markdown files. No test asserts a time.
"""
