"""The one exception for what a user can mend."""

import click


class UserError(click.ClickException, ValueError):
    """Bad input: what is wrong, where, and what to do, in one line. The command line exits with code 2."""

    exit_code = 2
