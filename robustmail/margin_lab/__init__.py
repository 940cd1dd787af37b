"""The margin lab: measures whether a margin is continuous, independent of the attack path, and predicts robustness."""
