"""Triton kernels; every file name starts with its operator's. Installed as ``fastvit.kernels``."""
