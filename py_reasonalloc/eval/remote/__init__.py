"""Decode on other machines: servers, and what client and server say to each other."""
