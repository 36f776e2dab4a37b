"""Readers of other people's checkpoints; none of them runs code that a file brings along.

`nvidia_pickle`: network snapshots of NVIDIA's EDM. `openai_pt`: state dicts in `.pt` or safetensors files, among them
OpenAI's noise-aware classifiers and DG's discriminator. `python -m dgfast.convert` puts either into a bundle.
"""

from dgfast.errors import one_line as one_line
