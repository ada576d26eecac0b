"""Numbers of the model: base, adapter, codecs. Imports nothing; modules are imported by name."""
