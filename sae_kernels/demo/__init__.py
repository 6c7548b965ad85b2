"""The demo: a transformer's activations, an SAE trained on them, a page about it."""

from sae_kernels.demo.run import DemoResult, run_demo, sae_config, train_config

__all__ = ["DemoResult", "run_demo", "sae_config", "train_config"]
