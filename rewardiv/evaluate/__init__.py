"""Sweeps: prompts x methods x seeds x LoRAs, each image and score kept once; the frontier of reward and diversity; a report."""
