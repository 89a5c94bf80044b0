"""Reward-diversity tradeoffs in text-to-image diffusion: sampling, measuring, training and voting (arXiv 2409.06493)."""

__version__ = "0.1.0"
