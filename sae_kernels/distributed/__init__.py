"""Training on several processes: latents over ranks. It alone imports torch.distributed."""
