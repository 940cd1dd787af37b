"""Many runs that belong together: a grid of recipes, settings and seeds, what they share, and what they say."""
