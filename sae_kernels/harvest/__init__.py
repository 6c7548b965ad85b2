"""Activations of language models, stored or streamed, and SAEs spliced back into the models."""

from sae_kernels.harvest.collect import harvest
from sae_kernels.harvest.hub_text import DatasetDocuments, dataset_documents
from sae_kernels.harvest.language_model import LanguageModelLoss, language_model_loss
from sae_kernels.harvest.model import (
    layer_device,
    layer_output,
    load_causal_model,
    load_model,
    minilm_folder,
    resolve_layer,
)
from sae_kernels.harvest.splice import splice, spliced_logits
from sae_kernels.harvest.stream import LiveBatches
from sae_kernels.harvest.text import python_corpus, read_documents, split_documents
from sae_kernels.harvest.tokens import TokenBatch, token_batches

__all__ = [
    "DatasetDocuments",
    "LanguageModelLoss",
    "LiveBatches",
    "TokenBatch",
    "dataset_documents",
    "harvest",
    "language_model_loss",
    "layer_device",
    "layer_output",
    "load_causal_model",
    "load_model",
    "minilm_folder",
    "python_corpus",
    "read_documents",
    "resolve_layer",
    "splice",
    "spliced_logits",
    "split_documents",
    "token_batches",
]
