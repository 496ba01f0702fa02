"""What a module of torch is made of, whatever it computes: its class, code, attributes and submodules."""
