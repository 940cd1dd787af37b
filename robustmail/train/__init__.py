"""Training: one step, the loop that yields records, the state that resumes to the same bits, and the run's folder."""
