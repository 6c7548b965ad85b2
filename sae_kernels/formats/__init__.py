"""Reading and writing SAE files: this package's own, and those of other tools (docs/formats.md)."""

from sae_kernels.formats.circuit_tracer import (
    read_circuit_tracer,
    write_circuit_tracer,
    write_transcoder_set,
)
from sae_kernels.formats.circuit_tracer_clt import read_cross_layer, write_cross_layer
from sae_kernels.formats.dictionary_learning import read_dictionary_learning
from sae_kernels.formats.dictionary_learning_writer import write_dictionary_learning
from sae_kernels.formats.gemma_scope import read_gemma_scope
from sae_kernels.formats.layout import Weights
from sae_kernels.formats.lazy_cross_layer import LazyCrossLayer
from sae_kernels.formats.load import Found, find, load, locate
from sae_kernels.formats.native import folded, read_native, write_native
from sae_kernels.formats.origin import named
from sae_kernels.formats.saelens import read_saelens
from sae_kernels.formats.saelens_writer import write_saelens
from sae_kernels.formats.sparsify import read_sparsify, write_sparsify
from sae_kernels.formats.table import FORMATS, Format, describe, detect, known, present, read, write

__all__ = [
    "FORMATS",
    "Format",
    "Found",
    "LazyCrossLayer",
    "Weights",
    "describe",
    "detect",
    "find",
    "folded",
    "known",
    "load",
    "locate",
    "named",
    "present",
    "read",
    "read_circuit_tracer",
    "read_cross_layer",
    "read_dictionary_learning",
    "read_gemma_scope",
    "read_native",
    "read_saelens",
    "read_sparsify",
    "write",
    "write_circuit_tracer",
    "write_cross_layer",
    "write_dictionary_learning",
    "write_native",
    "write_saelens",
    "write_sparsify",
    "write_transcoder_set",
]
