"""Forms of dictionaries: what each keeps, minimizes and keeps true."""
