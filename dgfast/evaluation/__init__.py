"""How good sets of images are: features of each, what metrics say of them, and how sure that is."""
