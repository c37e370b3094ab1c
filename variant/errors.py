"""Errors whose message is all that a user needs."""


class UserError(Exception):
    """Something in a request, a file or the machine; the message is one line and says what helps.

    The command line prints it without a traceback and exits with 1.
    """
