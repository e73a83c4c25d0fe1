"""The Triton kernels and their launchers, one file per purpose.

A launcher takes the same arguments as the public function and may be given a plan. It also takes
CPU tensors where ``TRITON_INTERPRET=1`` was set before this package was imported.
"""
