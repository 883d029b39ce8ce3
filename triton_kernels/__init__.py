"""Prodigy's step in Triton. Importing this package does not import triton; its module ``kernels`` does."""
