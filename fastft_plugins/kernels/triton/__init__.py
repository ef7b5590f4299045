"""The kernels written in Triton. Nothing here is imported before a call has been found to need it."""
