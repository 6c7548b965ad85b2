"""``python -m sae_kernels``."""

import sys

from sae_kernels.cli import main

if __name__ == "__main__":
    sys.exit(main())
