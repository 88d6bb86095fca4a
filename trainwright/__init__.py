"""trainwright: train large models from one typed recipe on a laptop, CUDA GPUs or AWS Trainium."""

__version__ = "0.1.0"
