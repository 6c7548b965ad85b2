"""Training an SAE through a language model, on how it changes the model's predictions."""

from sae_kernels.training.end_to_end.layer import prepare_end_to_end
from sae_kernels.training.end_to_end.loop import train_end_to_end
from sae_kernels.training.end_to_end.loss import EndToEnd, EndToEndLoss, end_to_end_loss

__all__ = ["EndToEnd", "EndToEndLoss", "end_to_end_loss", "prepare_end_to_end", "train_end_to_end"]
