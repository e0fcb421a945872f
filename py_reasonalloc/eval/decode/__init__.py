"""Decode and judge on this machine: what is left to do, who does it, what is correct."""
