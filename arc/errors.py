"""What is wrong with the input, in one line a person can act on."""


class InputError(ValueError):
    """Bad input: the message names file or argument, field, found and expected; commands exit with 2."""
