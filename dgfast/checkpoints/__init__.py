"""Readers of other people's checkpoints; none of them runs code that a file brings along.

`network.read` reads any of them for `python -m dgfast.convert`. `nvidia_pickle`: network snapshots of NVIDIA's EDM.
`openai_pt`: state dicts in files of torch.save or safetensors, among them OpenAI's networks and DG's discriminator;
`dit`: DiT's. `wrappers`: where in a training checkpoint they lie. `foreign`: what is not read, by its name.
"""

DENOISERS = ("score", "reference")
ENCODERS = ("classifier", "discriminator")
"""Roles in a bundle, by what kind of network has them."""


def one_line(text: object, most: int = 300) -> str:
    """What an error says, fit for a terminal: it may quote the file, control characters included."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)[:most]).split())
