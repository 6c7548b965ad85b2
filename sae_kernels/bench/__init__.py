"""The benchmark behind ``sae-kernels bench``: cases, contestants, correctness, timing, pages."""
