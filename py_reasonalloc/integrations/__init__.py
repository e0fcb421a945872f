"""A session inside other frameworks that make their own `llama_cpp.Llama`: see docs/embedding.md.

A module for each framework, imported only by those who have it.
"""
