"""Training of the networks that a bundle holds; `python -m dgfast.train` is the door."""
