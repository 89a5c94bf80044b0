"""Benchmarks: sampling against plain diffusers calls, training against TRL's AlignPropTrainer."""
