from arc.errors import InputError as InputError
