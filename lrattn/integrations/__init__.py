"""One engine, one module: how a model or a server comes to attend on latents."""
