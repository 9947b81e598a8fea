from qwen_eqx.errors import InputError as InputError
