"""What is done to training images and their targets: (x, targets, rng) -> (x, targets), drawn for each image by itself.

x: [B, C, H, W] in [0, 1], on any device. targets: [B, classes] float32, probabilities. rng: a generator on the host,
from which everything is drawn, so that the draws are the same on every device. Neither x nor targets is written into,
and an augmentation that mixes no labels returns the very targets that it was given.
"""
