"""The door `python -m dgfast.convert`, called in this process."""

from click.testing import CliRunner

from dgfast.convert import main


def convert(*arguments: object) -> tuple[int, str]:
    """Exit code and what was printed."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    return result.exit_code, result.output


def refused(*arguments: object) -> str:
    """The one line with which the conversion ends."""
    code, output = convert(*arguments)
    assert code == 2 and output.startswith("Error: ") and output.count("\n") == 1, output
    return output
