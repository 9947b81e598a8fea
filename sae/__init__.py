from sae.errors import InputError as InputError
