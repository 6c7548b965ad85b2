"""Runs the GPU kernels without a GPU: executes the PTX that the compilers really emit.

``src/`` is the emulator, C++ with the interface of CUDA's driver library; :mod:`emulator.library`
builds it, :mod:`emulator.triton_driver` puts it behind Triton's compiler and launcher, and
:mod:`emulator.cuda_kernels` behind what nvcc makes of csrc/cuda. What it finds and what it cannot
see stands in docs/gpu.md.
"""
