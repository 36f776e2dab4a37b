"""C++ for the CPU, compiled on the user's machine: what the libraries that PyTorch calls leave on the table."""
