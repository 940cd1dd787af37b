"""How time and memory of what robustmail does grow with its size: `robustmail bench --growth`."""
