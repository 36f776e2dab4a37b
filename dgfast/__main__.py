"""Sampling from pretrained diffusion models under guidance.

`dgfast sample` draws 64 digits with the bundle that comes along; `dgfast COMMAND --help` lists a command's options.
Exporting has commands of its own: `python -m dgfast.export.to_onnx --help` and `python -m dgfast.export.to_trt --help`.
"""

from importlib import import_module

import click

from dgfast.options import CommandGroup

_COMMANDS = ("sample", "convert", "train", "evaluate", "report")


class _Commands(CommandGroup):
    """Each command from its own module, imported when somebody asks for it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return import_module(f"dgfast.{cmd_name}").main if cmd_name in _COMMANDS else None


main = _Commands("dgfast", help=__doc__)

if __name__ == "__main__":
    main()
