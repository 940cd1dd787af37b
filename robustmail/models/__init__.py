"""Networks of the papers, registered in timm, and the Classifier that every network is wrapped in."""
