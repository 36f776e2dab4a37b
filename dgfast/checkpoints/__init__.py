"""Readers of other people's checkpoints; none of them runs code that a file brings along.

`nvidia_pickle`: network snapshots of NVIDIA's EDM. `openai_pt`: state dicts in `.pt` or safetensors files, among them
OpenAI's noise-aware classifiers and DG's discriminator. `python -m dgfast.convert` puts either into a bundle.
"""


def one_line(text: object, most: int = 300) -> str:
    """What an error says, fit for a terminal: it may quote the file, control characters included."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)[:most]).split())
