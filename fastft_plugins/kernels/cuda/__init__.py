"""Kernels in CUDA C++, for what Triton cannot express; compiled when first needed."""
