"""Atomic writes of files and folders, and safe reading of tensor files from untrusted sources."""
