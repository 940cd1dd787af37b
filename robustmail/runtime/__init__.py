"""Where a run executes: devices, processes, random numbers, files, signals."""
