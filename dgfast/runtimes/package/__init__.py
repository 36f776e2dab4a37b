"""AOTInductor: a function as machine code in one `.pt2` file, with or without its weights."""
