"""How long does a decode step take?"""
