"""The harness behind ``sae-kernels bench``: cases, contestants, a gate, a clock, reports."""
