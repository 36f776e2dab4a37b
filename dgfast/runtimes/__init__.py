"""Ways to execute the guided denoiser. Each module has `build(function, example) -> callable`.

A runtime changes how the function runs and never what it returns. Eager needs none: it is the function itself.
"""
