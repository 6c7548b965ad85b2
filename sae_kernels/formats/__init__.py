"""Reading and writing SAE files."""
