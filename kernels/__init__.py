"""Triton kernels, one file per operator. Installed as ``fastvit.kernels``."""
