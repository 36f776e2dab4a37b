"""The CPU's compiler: `build.compile` is its one entry."""
