"""The papers' networks, registered in timm; the Classifier that wraps every network; faster forms of it for attacks."""
