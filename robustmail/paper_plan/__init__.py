"""What to measure on a GPU, as a plan that anybody with one can carry out: `robustmail bench --paper`."""
