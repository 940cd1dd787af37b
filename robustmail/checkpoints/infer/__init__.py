"""Which network has these tensors: candidates read off names and shapes."""
