"""Everything worth knowing about the kernels on a GPU, by one command within a short loan.

``python -m benchmarks.gpu_check --out DIR --budget 540`` goes through the stages of `stages`: what
would be missed most comes first, and whatever fails costs itself alone. All lines are in
DIR/gpu_check.jsonl as they come, and ``--resume`` goes on where a run was cut off. Without a GPU
``--dry-run`` goes the same way on tiny shapes with the same kernels, emulated; such records are
never published.
"""
