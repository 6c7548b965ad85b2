"""Everything worth knowing about the kernels on a GPU, by one command.

``python -m benchmarks.gpu_check --out DIR --minutes 8`` builds, tests, sanitizes and measures, each
stage within its share of the time and none able to stop the next. Without a GPU it goes through the
same motions on tiny shapes and marks what it writes as dry: such records are never published.
"""
