"""Built-in compression methods, one module each, found only through their entry points."""
