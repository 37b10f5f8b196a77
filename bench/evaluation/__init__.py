"""What does a model lose on latents, and what do other caches lose?"""
