"""The kernel core that the features share: each operation has a plain-torch reference and the kernels that beat it."""
