"""Benchmarks of sae_kernels against dense torch, on the machine they run on."""
