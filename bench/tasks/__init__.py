"""What a model does with a compressed cache: programs it writes, what it finds far back, and how it goes on."""
