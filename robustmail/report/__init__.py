"""What is left of a run: lines, tables and pictures, made from records and files alone."""
