"""Training: a loop that yields records, a state that continues to the bit, a folder that keeps both."""
