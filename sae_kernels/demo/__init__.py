"""The demo: harvests MiniLM's activations, trains a TopK SAE on them and writes a report."""

from sae_kernels.demo.run import DemoResult, run_demo, sae_config, train_config

__all__ = ["DemoResult", "run_demo", "sae_config", "train_config"]
