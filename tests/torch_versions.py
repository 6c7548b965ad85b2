"""What torch can do only from some version on, as conditions of tests."""

import pytest
import torch

# The package itself runs from torch 2.6 on. Older Dynamo cannot look into named tuples with
# defaults or dataclasses.replace, and wants a flag for results whose size depends on the data.
one_graph = pytest.mark.skipif(
    torch.__version__ < "2.11",
    reason="torch.compile(fullgraph=True) of the operators needs torch 2.11",
)
