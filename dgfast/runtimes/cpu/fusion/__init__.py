"""Fusion of what stands between library calls, by generated C++: for the CPU."""
