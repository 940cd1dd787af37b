"""The margin lab: is a margin continuous, independent of the path, and true? Measured, for any margin, on any model."""
