"""Activations of real models on real text, as data sets to train on."""

from sae_kernels.harvest.collect import harvest
from sae_kernels.harvest.model import layer_output, load_model, minilm_folder, resolve_layer
from sae_kernels.harvest.text import python_corpus, read_documents, split_documents

__all__ = [
    "harvest",
    "layer_output",
    "load_model",
    "minilm_folder",
    "python_corpus",
    "read_documents",
    "resolve_layer",
    "split_documents",
]
