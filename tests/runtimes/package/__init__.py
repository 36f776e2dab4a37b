"""Functions compiled ahead of time into a file."""
