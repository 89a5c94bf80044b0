"""Builds everything that ships: the emoji data, the base model, the CLIP, the rewards and the reward LoRAs."""
