"""Readers of other people's checkpoints; none of them runs code that a file brings along.

`network.read` reads any of them for `python -m dgfast.convert`. `nvidia_pickle`: network snapshots of NVIDIA's EDM.
`openai_pt`: state dicts in files of torch.save or safetensors, among them OpenAI's networks and DG's discriminator;
`dit`: DiT's. `wrappers`: where in a training checkpoint they lie. `foreign`: what is not read, by its name.
"""

from dgfast.errors import one_line as one_line

DENOISERS = ("score", "reference")
ENCODERS = ("classifier", "discriminator")
"""Roles in a bundle, by what kind of network has them."""
