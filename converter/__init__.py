"""The file side: sources, layouts, scales, the byte-exact bake, its proof and the command line."""

__version__ = "0.1.0"
