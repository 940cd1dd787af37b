"""Experiment trackers: TensorBoard, Weights & Biases, MLflow, Trackio. They read records; no loop knows of them."""
