"""The error that the command line prints without a traceback."""


class UserError(Exception):
    """A request, a file or the machine is unsuitable; the message is one line and names a remedy.

    The command line prints the message without a traceback and exits with 1.
    """
