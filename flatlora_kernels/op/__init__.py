"""The op: the public functions, their checks, the schema that torch knows, and its derivative."""
