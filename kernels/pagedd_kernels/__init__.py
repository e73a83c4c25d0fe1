"""Triton kernels over the paged KV pool, each beside a torch reference."""
